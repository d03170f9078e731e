"""A selector alone: random inputs, as an ONNX graph, on ONNX Runtime, and through TensorRT."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from tests.shared_folder import kept_between_runs
from tests.trio.decoder_layers import HIDDEN, rotary_tables
from tests.trio.module_digest import module_digest
from trio_edge.export.check.tensorrt import require_supported
from trio_edge.export.graphs.assembly import onnx_graph
from trio_edge.trio.selectors.interface import PromptInputs, Selection, StageInputs

NAMES = (
    "hidden", "previous", "cos", "sin", "visual_rows", "num_visual", "length",
    "prompt_embeds", "prompt_is_visual", "prompt_length",
)  # fmt: skip
ROOM, BEFORE = 24, 3
LOST = 6
"""Tokens of a lost picture."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes and oddities of one sequence; N rows of room for the picture, ``ROOM`` for the text around it."""

    num_rows: int = 40
    num_visual: int = 40
    num_text: int = 9
    tokens: str = "random"
    """"random", "identical" (all visual tokens alike) or "zero" (all rows 0: every attention equal)."""
    garbage: float = 0.0
    """What padding is filled with."""
    dropped: int = 5
    """Visual tokens that earlier stages took away, the first ones."""
    gap: int = 0
    """Text rows in the middle of the visual tokens, as between two pictures."""
    lost_picture: int = 0
    """Text rows before a last picture whose tokens earlier stages took all away; 0 where there is none."""

    def inputs(self, dtype: torch.dtype = torch.float64, *, seed: int = 0) -> StageInputs:
        generator = torch.Generator().manual_seed(seed)
        num_text = self.gap + self.lost_picture + self.num_text
        rows, length = self.num_rows + ROOM, BEFORE + self.num_visual + num_text
        assert length <= rows
        visual = self._visual_rows(self.num_rows)
        span = visual[: self.num_visual]
        hidden, previous = (self._rows(rows, length, span, generator) for _ in range(2))
        in_prompt = self._visual_rows(self.num_visual + self.dropped, first_part=self.dropped)
        prompt_length = length + self.dropped
        if self.lost_picture:
            prompt_length += LOST
            lost = prompt_length - self.num_text - 1 - torch.arange(LOST).flip(0)
            in_prompt = torch.cat([in_prompt, lost])
        prompt = self._rows(rows + 17, prompt_length, in_prompt, generator)
        is_visual = torch.zeros(rows + 17, dtype=torch.int32).index_fill(0, in_prompt, 1)
        cos, sin = rotary_tables(torch.arange(rows) * 2)
        num_visual, num_rows, num_prompt = (
            torch.tensor([n], dtype=torch.int32) for n in (self.num_visual, length, prompt_length)
        )
        return StageInputs(
            hidden.to(dtype), cos.to(dtype), sin.to(dtype), visual.to(torch.int32), num_visual, num_rows,
            previous.to(dtype), PromptInputs(prompt.to(dtype), is_visual, num_prompt),
        )  # fmt: skip

    def _visual_rows(self, count: int, *, first_part: int = 0) -> Tensor:
        """Return the rows of ``count`` visual tokens, of which half, and ``first_part``, stand before the gap."""
        index = torch.arange(count)
        return BEFORE + index + self.gap * (index >= first_part + self.num_visual // 2)

    def _rows(self, rows: int, length: int, span: Tensor, generator: torch.Generator) -> Tensor:
        if self.tokens == "zero":
            result = torch.zeros(rows, HIDDEN)
        else:
            result = torch.randn(rows, HIDDEN, generator=generator) * 0.6
            result[span] += torch.randn(HIDDEN, generator=generator)
        if self.tokens == "identical" and self.num_visual:
            # One feature only: then a similarity is one product, equal for all tokens however a matrix product sums.
            # With more, the last bit depends on the processor and on the token's column, and decides their order.
            result[span] = torch.zeros(HIDDEN).index_fill(0, torch.tensor(7), 1.5)
        result[length:] = self.garbage
        return result.double()


CASES = {
    "random": Case(),
    "fewer tokens than rows": Case(num_visual=31),
    "one token more than is kept": Case(num_visual=13),
    "fewer tokens than are kept": Case(num_visual=7),
    "a single token": Case(num_visual=1),
    "no picture": Case(num_visual=0),
    "one text row after the picture": Case(num_text=1),
    "three text rows after the picture": Case(num_text=3, num_visual=35),
    "no text after the picture": Case(num_text=0),
    "two pictures": Case(gap=4),
    "two pictures with padding": Case(num_visual=31, gap=1, num_text=5),
    "a last picture that is lost": Case(gap=2, lost_picture=5),
    "no padding": Case(num_text=ROOM - BEFORE),
    "huge padding": Case(num_visual=29, garbage=1e30),
    "identical tokens": Case(tokens="identical"),
    "equal scores everywhere": Case(tokens="zero", num_visual=33, garbage=-1e30),
}


class StageGraph(nn.Module):
    """A selector with plain tensors at its edges."""

    def __init__(self, selector: Any) -> None:
        super().__init__()
        self.selector = selector

    def forward(
        self, hidden: Tensor, previous: Tensor, cos: Tensor, sin: Tensor, visual_rows: Tensor, num_visual: Tensor,
        length: Tensor, prompt_embeds: Tensor, prompt_is_visual: Tensor, prompt_length: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        prompt = PromptInputs(prompt_embeds, prompt_is_visual, prompt_length)
        selection = self.selector(
            StageInputs(hidden, cos, sin, visual_rows, num_visual, length, previous, prompt)
        )
        return tuple(value for value in selection if value is not None)


def flat(inputs: StageInputs) -> tuple[Tensor, ...]:
    assert inputs.previous_SD is not None
    assert inputs.prompt is not None
    return (inputs.hidden_SD, inputs.previous_SD, *inputs[1:6], *inputs.prompt)


def export_stage(selector: Any, path: Path, case: Case, *, several_sizes: bool = False) -> Path:
    """Write the selector with the row axes dynamic, and the visual one if there are several sizes.

    The first of all test runs that asks for a graph traces it.
    """
    wanted = f"{module_digest(StageGraph(selector).eval())} {case} {several_sizes}"
    name = f"stage-{hashlib.sha256(wanted.encode()).hexdigest()[:16]}.onnx"
    kept = kept_between_runs(name, lambda out: _trace_stage(selector, out, case, several_sizes=several_sizes))
    shutil.copyfile(kept, path)
    require_supported(ir.load(path), name=path.stem)
    return path


def _trace_stage(selector: Any, path: Path, case: Case, *, several_sizes: bool) -> None:
    rows = {0: torch.export.Dim.DYNAMIC}
    axes = (*[rows] * 4, rows if several_sizes else None, None, None, rows, rows, None)
    outputs = ["kept", "scores", "unsettled", "weights"]
    with onnx_graph._captured_once():  # as the exporter traces
        program = torch.onnx.export(
            StageGraph(selector).eval(), flat(case.inputs(_dtype(selector))), dynamo=True, opset_version=18,
            input_names=NAMES, output_names=outputs, dynamic_shapes=axes, verbose=False,
            custom_translation_table=onnx_graph._TRANSLATIONS,
        )  # fmt: skip
    assert program is not None
    program.save(path)


class OnnxStage:
    """An exported selector on ONNX Runtime."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def __call__(self, inputs: StageInputs) -> Selection:
        wanted = {value.name for value in self.session.get_inputs()}
        feeds = {name: value.numpy() for name, value in zip(NAMES, flat(inputs)) if name in wanted}
        return Selection(*(torch.from_numpy(np.asarray(value)) for value in self.session.run(None, feeds)))


def build(path: Path, case: Case) -> int:
    """Build an engine for several lengths and one number of visual rows; return its size in bytes."""
    trt = pytest.importorskip("tensorrt_rtx", reason="needs the rtx extra")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(path.read_bytes()), [str(parser.get_error(i)) for i in range(parser.num_errors)]
    profile = builder.create_optimization_profile()
    values = dict(zip(NAMES, flat(case.inputs())))
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if -1 in tuple(tensor.shape):
            rows, *width = values[tensor.name].shape
            steps = (0, 0, 0) if tensor.name == "visual_rows" else (0, 32, 512)
            profile.set_shape(tensor.name, *((rows + step, *width) for step in steps))
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None
    return int(engine.nbytes)


def agree(got: Selection, kept: list[int], scores: Tensor | None, weights: Tensor | None = None) -> None:
    """Assert that a selection equals a reference's, which knows real tokens only; the rest must be padding."""
    num_real = len(kept)
    assert got.kept_K[:num_real].tolist() == kept
    assert len(set(got.kept_K.tolist())) == len(got.kept_K)
    if scores is not None:
        torch.testing.assert_close(
            got.scores_N[: len(scores)].double(), scores.double(), rtol=1e-4, atol=1e-5
        )
        assert (got.scores_N[len(scores) :] == -1).all()
    if weights is not None:
        assert got.weights_KN is not None
        shape = weights.shape
        torch.testing.assert_close(
            got.weights_KN[: shape[0], : shape[1]].double(), weights.double(), rtol=1e-6, atol=1e-6
        )
        assert (got.weights_KN[: shape[0], shape[1] :] == 0).all()
    assert got.unsettled.tolist() == [0]


def _dtype(selector: Any) -> torch.dtype:
    return next((weight.dtype for weight in selector.parameters()), torch.float64)
