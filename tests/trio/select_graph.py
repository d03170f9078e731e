"""The saliency and the NMS as one exported graph, with a dynamic number of rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trio_edge.trio.compaction import compact_rows
from trio_edge.trio.nms import FeatureNms
from trio_edge.trio.saliency import ProxySaliency

INPUTS = ("hidden", "cos", "sin", "visual_start", "num_visual", "length")
OUTPUTS = ("kept", "scores", "unsettled", "rows", "new_length")


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
        visual_start: Tensor,
        num_visual: Tensor,
        length: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        scores = self.saliency(hidden, cos, sin, visual_start, num_visual, length)
        visual = visual_start.long() + torch.arange(self.saliency.max_visual)
        features = hidden.index_select(0, visual.clamp(max=hidden.shape[0] - 1))
        kept, unsettled = self.nms(features, scores, num_visual)
        rows, new_length = compact_rows(
            kept, visual_start, num_visual, length, padded_length=hidden.shape[0],
            max_visual=self.saliency.max_visual,
        )  # fmt: skip
        return kept, scores, unsettled, rows, new_length


def example_inputs(module: SelectGraph, *, rows: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    layer: Any = module.saliency.layer
    hidden = torch.randn(rows, layer.hidden_size, dtype=dtype)
    angle = torch.randn(rows, module.saliency.head_size, dtype=dtype)
    count = module.saliency.max_visual
    return hidden, angle.cos(), angle.sin(), *(torch.tensor([n], dtype=torch.int32) for n in (3, count, rows))


def export_select(
    module: SelectGraph, path: Path, *, opset: int = 18, dtype: torch.dtype = torch.float32
) -> Path:
    """Write ``module`` as ONNX with the row axis dynamic."""
    rows = {0: torch.export.Dim.DYNAMIC}
    axes: tuple[Any, ...] = (rows, rows, rows, None, None, None)
    program = torch.onnx.export(
        module.eval(), example_inputs(module, rows=module.saliency.max_visual + 21, dtype=dtype), dynamo=True,
        opset_version=opset, input_names=INPUTS, output_names=OUTPUTS, dynamic_shapes=axes, verbose=False,
    )  # fmt: skip
    assert program is not None
    program.save(path)
    return path
