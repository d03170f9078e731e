"""The saliency and the NMS as one exported graph, with a dynamic number of rows, and of visual tokens if wanted."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.shared_folder import kept_between_runs
from tests.trio.module_digest import module_digest
from trio_edge.trio.compaction import compact_rows
from trio_edge.trio.nms import FeatureNms
from trio_edge.trio.saliency import ProxySaliency

INPUTS = ("hidden", "cos", "sin", "visual_rows", "num_visual", "length")
OUTPUTS = ("kept", "scores", "unsettled", "rows", "visual_rows_out")


class SelectGraph(nn.Module):
    """Scores, kept indices and the rows of the reduced sequence."""

    def __init__(self, saliency: ProxySaliency, nms: FeatureNms) -> None:
        super().__init__()
        self.saliency, self.nms = saliency, nms

    def forward(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        visual_rows: Tensor,
        num_visual: Tensor,
        length: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        scores = self.saliency(hidden, cos, sin, visual_rows, num_visual, length)
        kept, unsettled = self.nms(hidden.index_select(0, visual_rows), scores, num_visual)
        compacted = compact_rows(kept, visual_rows, num_visual, length, padded_length=hidden.shape[0])
        return kept, scores, unsettled, compacted.rows_R, compacted.visual_rows_K


def example_inputs(
    module: SelectGraph, *, num_visual: int, num_text: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    layer: Any = module.saliency.layer
    rows = num_visual + num_text
    hidden = torch.randn(rows, layer.hidden_size, dtype=dtype)
    angle = torch.randn(rows, module.saliency.head_size, dtype=dtype)
    visual_rows = torch.arange(3, 3 + num_visual, dtype=torch.int32)
    scalars = (torch.tensor([n], dtype=torch.int32) for n in (num_visual, rows))
    return hidden, angle.cos(), angle.sin(), visual_rows, *scalars


def export_select(
    module: SelectGraph,
    path: Path,
    *,
    num_visual: int,
    several_sizes: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write ``module`` as ONNX with the row axis dynamic, and the visual one if there are several sizes.

    The first of all test runs that asks for a graph traces it.
    """
    name = f"select-{num_visual}-{several_sizes}-{dtype}-{module_digest(module.eval())}.onnx"
    traced = partial(_trace, module, num_visual=num_visual, several_sizes=several_sizes, dtype=dtype)
    shutil.copyfile(kept_between_runs(name, traced), path)
    return path


def _trace(
    module: SelectGraph, path: Path, *, num_visual: int, several_sizes: bool, dtype: torch.dtype
) -> None:
    rows = {0: torch.export.Dim.DYNAMIC}
    axes: tuple[Any, ...] = (rows, rows, rows, rows if several_sizes else None, None, None)
    program = torch.onnx.export(
        module, example_inputs(module, num_visual=num_visual, num_text=21, dtype=dtype), dynamo=True,
        opset_version=18, input_names=INPUTS, output_names=OUTPUTS, dynamic_shapes=axes, verbose=False,
    )  # fmt: skip
    assert program is not None
    program.save(path)
