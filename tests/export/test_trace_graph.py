"""A traced module computes what torch does, whether its operators are translated as they are or taken apart first."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from trio_edge.export.graphs.assembly.onnx_graph import trace_graph
from trio_edge.runtime.bundle.manifest import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable

SIZES = [0, 1, 5]
AS_THEY_ARE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "reshape with a size of 0": lambda x, _: x.reshape(2, x.shape[0], 3),
    "flatten to two axes": lambda x, _: x.reshape(x.shape[0], 2, 3).flatten(0, 1),
    "transpose": lambda x, _: x.T.contiguous(),
    "a number less a tensor": lambda x, _: 2.5 - x,
    "a number less a whole tensor": lambda _, n: (7 - n).to(torch.float32),
    "both of two conditions": lambda x, n: ((x > 0) & (n > 1)).to(torch.float32),
    "one of two conditions": lambda x, n: ((x > 0) | (n > 1)).to(torch.float32),
    "bits of two tensors": lambda _, n: ((n & (n + 1)) | (n + 2)).to(torch.float32),
}
APART: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bits of a tensor and a number": lambda _, n: (n & 3).to(torch.float32),
    "a view without a translation": lambda x, _: x.unflatten(1, (2, 3)).sum(1),
    "a write to an input of a product": lambda x, _: (x * 2).add_(1) * x,
    "a write to a part": lambda x, _: _with_column_twice(x),
}


def _with_column_twice(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0] = x[:, 1]
    return y


class _Module(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self._function = function

    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        return self._function(x, n)


@pytest.mark.parametrize("name", [*AS_THEY_ARE, *APART])
def test_a_trace_equals_torch_for_every_size(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken_apart = []
    decompose = torch.export.ExportedProgram.run_decompositions

    def count(program: torch.export.ExportedProgram, table: object) -> torch.export.ExportedProgram:
        taken_apart.append(program)
        return decompose(program, table)

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", count)
    module = _Module((AS_THEY_ARE | APART)[name])
    examples = _inputs(11)
    shape = tuple(module(*examples).shape)
    model = trace_graph(
        module,
        args=examples,
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC}, {0: torch.export.Dim.DYNAMIC}),
        inputs=[
            TensorSpec(name="x", dtype="float32", shape=("N", 6)),
            TensorSpec(name="n", dtype="int64", shape=("N", 6)),
        ],
        outputs=[
            TensorSpec(name="y", dtype="float32", shape=tuple(f"Y{axis}" for axis in range(len(shape))))
        ],
        opset=18,
    )
    assert bool(taken_apart) == (name in APART)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    for size in SIZES:
        x, n = _inputs(size)
        expected = module(x, n).numpy()
        (found,) = session.run(None, {"x": x.numpy(), "n": n.numpy()})
        np.testing.assert_array_equal(found, expected, strict=True)


def _inputs(size: int) -> tuple[Tensor, Tensor]:
    count = torch.arange(size * 6).reshape(size, 6)
    return (count % 7 - 3).to(torch.float32), count % 5
