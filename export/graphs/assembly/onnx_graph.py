"""Turns a torch module into an ONNX file whose weights stay in the bundle's weight files.

The module is traced under FakeTensorMode, so no weight is ever in memory; initializers become external data that
points into the stored files. A trace is optimized while its initializers have no values yet, so that no weight, nor its
transpose, is folded into the graph, and before a layer is repeated, so that it is done once. Without it TensorRT finds axes
that are no constants.
"""

from __future__ import annotations

import logging
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from onnxscript import optimizer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import nn

    from trio_edge.runtime.bundle.manifest import StoredTensor, TensorSpec

# Elements. Arithmetic on shapes and small tables is folded, nothing as large as a weight is.
_FOLD_INPUT_SIZE = 512
_FOLD_OUTPUT_SIZE = 4096
_TORCH_FROM_DTYPE = {
    "float32": torch.float32,
    "float16": torch.float16,
    "int32": torch.int32,
    "int64": torch.int64,
}
_IR_FROM_DTYPE = {
    "float32": "FLOAT",
    "float16": "FLOAT16",
    "int32": "INT32",
    "int64": "INT64",
    "int8": "INT8",
    "int4": "INT4",
    "float8_e4m3fn": "FLOAT8E4M3FN",
}
# torch 2.13 warns of equal axis names, through copyreg on some releases, and logs for each trace which operators of
# torchvision it leaves out when that is not installed; none of it concerns the graph.
_TRACING_LOG = "torch.onnx._internal.exporter._registration"
# onnx_ir 0.1 logs every constant that it cannot merge with another because it is an output.
_OPTIMIZER_LOG = "onnx_ir.passes.common.initializer_deduplication"
# Sizes that symbols get while tracing. All differ and none is 0 or 1, so that torch.export merges and fixes nothing.
_TRACE_BASE = {"B": 3, "C": 11}


def example_input(spec: TensorSpec, *, trace_sizes: Mapping[str, int]) -> torch.Tensor:
    """Return an input for tracing; under FakeTensorMode it has no memory."""
    sizes = {**_TRACE_BASE, **trace_sizes}
    shape = [sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape]
    return torch.zeros(shape, dtype=_TORCH_FROM_DTYPE[spec.dtype])


def dynamic_axes(spec: TensorSpec, *, dims: Mapping[str, Any]) -> dict[int, Any]:
    """Return torch.export's description of the axes of ``spec`` whose symbols are in ``dims``; others are fixed."""
    return {
        axis: dims[size] for axis, size in enumerate(spec.shape) if isinstance(size, str) and size in dims
    }


def graph_value(spec: TensorSpec) -> ir.Value:
    """Return a graph input or output as ``spec`` describes it."""
    kind = ir.TensorType(ir.DataType[_IR_FROM_DTYPE[spec.dtype]])
    return ir.Value(name=spec.name, shape=ir.Shape(spec.shape), type=kind)


def trace(
    module: nn.Module,
    *,
    args: tuple[Any, ...],
    dynamic_shapes: tuple[Any, ...],
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    opset: int,
) -> ir.Model:
    """Return ``module`` as an optimized ONNX model.

    Its I/O tensors carry the names and shapes of ``inputs`` and ``outputs``. An initializer has a value if it is a literal of the
    trace, none if it is a parameter or buffer of ``module``.
    """
    with _errors_only(_TRACING_LOG), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(),
            args,
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=opset,
            dynamic_shapes=dynamic_shapes,
        )
    if program is None:
        raise AssertionError("torch.onnx.export with dynamo=True returns a program")
    # A copy names what it is optimized into by itself, not by how many names the tracing has used up.
    model = program.model.clone()
    _name_values(model.graph.inputs, inputs)
    _name_values(model.graph.outputs, outputs)
    for value in model.graph.initializers.values():
        value.const_value = None  # under FakeTensorMode it holds nothing; attach_weights gives it one
    _optimize(model)
    return model


@contextmanager
def _errors_only(log: str) -> Iterator[None]:
    """Hold back what the logger ``log`` says below its errors."""
    logger = logging.getLogger(log)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _name_values(values: Sequence[ir.Value], specs: Sequence[TensorSpec]) -> None:
    if len(values) != len(specs):
        raise AssertionError(
            f"expected {len(specs)} I/O tensors, the trace has {[value.name for value in values]}"
        )
    for value, spec in zip(values, specs):
        if value.dtype != ir.DataType[_IR_FROM_DTYPE[spec.dtype]]:
            raise AssertionError(f"{spec.name}: expected {spec.dtype}, the trace has {value.dtype}")
        value.name = spec.name
        value.shape = ir.Shape(spec.shape)


def attach_weights(
    model: ir.Model, stored: Mapping[str, StoredTensor], inline: Mapping[str, NDArray[Any]], *, bundle: Path
) -> int:
    """Give every initializer of ``model`` that has no value one, and return the bytes of the stored ones.

    ``stored`` and ``inline`` are by initializer name: external data, whose paths are relative to ``bundle``, and values that
    are written into the graph.
    """
    total = 0
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            continue
        if name in inline:
            value.const_value = ir.tensor(inline[name], name=name)
            continue
        tensor = stored[name]
        value.const_value = ir.ExternalTensor(
            tensor.file,
            tensor.offset,
            tensor.num_bytes,
            ir.DataType[_IR_FROM_DTYPE[tensor.dtype]],
            shape=ir.Shape(tensor.shape),
            name=name,
            base_dir=bundle,
        )
        total += tensor.num_bytes
    return total


def _optimize(model: ir.Model) -> None:
    """Fold what is small and merge what is equal; leave no trace of this machine."""
    with _errors_only(_OPTIMIZER_LOG):
        optimizer.optimize_ir(model, input_size_limit=_FOLD_INPUT_SIZE, output_size_limit=_FOLD_OUTPUT_SIZE)
    # source paths and stacks, in loops' bodies too
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    model.metadata_props.clear()


def save(model: ir.Model, path: Path) -> None:
    """Write ``model``; external data stays where it is."""
    model.producer_name, model.producer_version = "trio-edge", None
    ir.save(model, path)
