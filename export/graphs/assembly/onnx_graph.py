"""Turns a torch module into an ONNX file whose weights stay in the bundle's weight files.

The module is traced under FakeTensorMode, so no weight is ever in memory; initializers become external data that points
into the stored files. A trace is optimized while its initializers have no values, so that no weight is folded into the
graph, and before a layer is copied, so that this is done once. Without the optimization TensorRT finds axes that are not
constant.
"""

from __future__ import annotations

import logging
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from operator import mul
from typing import TYPE_CHECKING, Any
from unittest import mock

import onnx_ir as ir
import torch
from onnxscript import opset18, optimizer, version_converter
from onnxscript.function_libs.torch_lib.ops import core
from torch._higher_order_ops.scan import scan_op

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import nn

    from trio_edge.export.checkpoints.weights import StoredName
    from trio_edge.runtime.bundle.manifest import GraphSpec, PieceName, StoredTensor, TensorSpec

# Number of elements: arithmetic on shapes and small tables is folded, but nothing as large as a weight.
_FOLD_INPUT_SIZE = 512
_FOLD_OUTPUT_SIZE = 4096
IR_FROM_DTYPE = {
    "float32": "FLOAT",
    "float16": "FLOAT16",
    "int32": "INT32",
    "int64": "INT64",
    "int8": "INT8",
    "int4": "INT4",
    "float8_e4m3fn": "FLOAT8E4M3FN",
}
# torch 2.13 warns of equal axis names, on some releases through copyreg, and logs for each trace the torchvision operators
# that are not installed; neither concerns the graph.
_TRACING_LOG = "torch.onnx._internal.exporter._registration"
# onnx_ir 0.1 logs every constant that it cannot merge because it is an output.
_OPTIMIZER_LOG = "onnx_ir.passes.common.initializer_deduplication"
# Sizes of symbols while tracing. All differ, and none is 0 or 1, so that torch.export neither merges nor fixes axes.
_TRACE_BASE = {"B": 3, "C": 11}


_aten = torch.ops.aten
# Operators that torch would take apart before it translates them, for which it would capture the module a second time.
_TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    _aten.contiguous.default: core.aten_contiguous,
    _aten.flatten.using_ints: core.aten_flatten,
    _aten.numpy_T.default: lambda x: opset18.Transpose(x),
    _aten.reshape.default: core.aten_view,  # torch's translation takes a size of 0 for a wildcard
    _aten.rsub.Scalar: lambda x, other: opset18.Sub(opset18.CastLike(other, x), x),
    _aten.to.dtype: lambda x, dtype, *_: opset18.Cast(x, to=dtype),
    _aten.__and__.Tensor: lambda x, y: opset18.And(x, y) if _is_bool(x) else opset18.BitwiseAnd(x, y),
    _aten.__or__.Tensor: lambda x, y: opset18.Or(x, y) if _is_bool(x) else opset18.BitwiseOr(x, y),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TracedGraph:
    """A graph without weights, and the source of each initializer."""

    spec: GraphSpec
    """Description, with ``weight_bytes`` still 0."""
    model: ir.Model
    weights: dict[str, StoredName]
    """Initializer name -> array in the bundle."""
    constants: dict[str, NDArray[Any]]
    """Initializer name -> values computed by the export."""
    piece: PieceName | None = None
    """Set if ``pieces.py`` joins the graph with others; all have the joined graph's name."""


def example_input(spec: TensorSpec, *, trace_sizes: Mapping[str, int]) -> torch.Tensor:
    """Return an input for tracing; under FakeTensorMode it needs no memory."""
    sizes = {**_TRACE_BASE, **trace_sizes}
    shape = [sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape]
    return torch.zeros(shape, dtype=getattr(torch, spec.dtype))


def dynamic_axes(spec: TensorSpec, *, dims: Mapping[str, Any]) -> dict[int, Any]:
    """Return torch.export's dynamic axes of ``spec``: those whose symbols are in ``dims``."""
    return {
        axis: dims[size] for axis, size in enumerate(spec.shape) if isinstance(size, str) and size in dims
    }


def trace_graph(
    module: nn.Module,
    *,
    args: tuple[Any, ...],
    dynamic_shapes: tuple[Any, ...],
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    opset: int,
) -> ir.Model:
    """Return ``module`` as an optimized ONNX model.

    Its I/O tensors have the names and shapes of ``inputs`` and ``outputs``. Parameters and buffers of ``module`` become
    initializers without values; literals have values.
    """
    with _errors_only(_TRACING_LOG), _captured_once(), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                module.eval(),
                args,
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=opset,
                dynamic_shapes=dynamic_shapes,
                custom_translation_table=_TRANSLATIONS,
            )
        except RuntimeError as error:
            raise _system_error(error) or error from None
    if program is None:
        raise AssertionError("expected a program from torch.onnx.export with dynamo=True, got none")
    # In a copy, names of new values do not depend on the number of names used while tracing.
    model = program.model.clone()
    _name_values(model.graph.inputs, inputs)
    _name_values(model.graph.outputs, outputs)
    for value in model.graph.initializers.values():
        value.const_value = None  # fake, under FakeTensorMode; attach_weights sets the real one
    _optimize(model)
    return model


@contextmanager
def _captured_once() -> Iterator[None]:
    """Let torch capture a module once if each of its operators has a translation, which takes half the time."""
    program_type = torch.export.ExportedProgram
    decompose = program_type.run_decompositions

    def decompose_if_needed(
        program: torch.export.ExportedProgram, table: Any
    ) -> torch.export.ExportedProgram:
        program.graph.eliminate_dead_code()
        graphs = [
            part.graph for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)
        ]
        nodes = [node for graph in graphs for node in graph.nodes if node.op == "call_function"]
        return decompose(program, table) if any(_is_apart(node, table) for node in nodes) else program

    with mock.patch.object(program_type, "run_decompositions", decompose_if_needed):
        yield


def _is_bool(value: ir.Value) -> bool:
    return value.dtype == ir.DataType.BOOL


def _is_apart(node: torch.fx.Node, table: Any) -> bool:
    """Return whether torch has to take the operator of ``node`` apart.

    It has no translation, writes to its input, holds a graph (a scan's has its translation), or is a view whose translation may
    differ from that of its parts. So does a wildcard next to a product of sizes, the rows of all answers: it has no value where
    these are 0, while a probe runs.
    """
    operator = node.target
    if operator is _aten.reshape.default:
        sizes: Any = node.args[1]
        return -1 in sizes and any(getattr(size, "target", None) is mul for size in sizes)
    if not isinstance(operator, torch._ops.OpOverload):
        return isinstance(operator, torch._ops.HigherOrderOperator) and operator is not scan_op
    if operator._schema.is_mutable:
        return True
    if operator in _TRANSLATIONS or not node.users:  # checks of sizes have no users
        return False
    is_view = any(output.alias_info is not None for output in operator._schema.returns)
    return operator in table or (is_view and operator._can_decompose())


def _system_error(error: BaseException) -> OSError | None:
    """Return the error of the system, such as a full disk, that torch has wrapped into ``error``; None if it is another."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error if isinstance(error, OSError) else None


@contextmanager
def _errors_only(log: str) -> Iterator[None]:
    """Let the logger ``log`` report errors only."""
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
        if value.dtype != ir.DataType[IR_FROM_DTYPE[spec.dtype]]:
            raise AssertionError(f"{spec.name}: expected {spec.dtype}, the trace has {value.dtype}")
        value.name = spec.name
        value.shape = ir.Shape(spec.shape)


def attach_weights(
    model: ir.Model, stored: Mapping[str, StoredTensor], inline: Mapping[str, NDArray[Any]], *, bundle: Path
) -> int:
    """Give a value to every initializer of ``model`` without one, and return the number of bytes of the stored ones.

    Args:
        model: The graph; changed.
        stored: External data by initializer name, with paths relative to ``bundle``.
        inline: Values to write into the graph, by initializer name.
        bundle: The bundle's folder.
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
            ir.DataType[IR_FROM_DTYPE[tensor.dtype]],
            shape=ir.Shape(tensor.shape),
            name=name,
            base_dir=bundle,
        )
        total += tensor.num_bytes
    return total


def _optimize(model: ir.Model) -> None:
    """Fold small constants, merge equal ones, and remove source paths and stack traces."""
    with _errors_only(_OPTIMIZER_LOG):
        optimizer.optimize_ir(model, input_size_limit=_FOLD_INPUT_SIZE, output_size_limit=_FOLD_OUTPUT_SIZE)
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


def raise_opset(model: ir.Model, opset: int) -> None:
    """Convert ``model`` to ``opset`` if it has a lower one."""
    if model.opset_imports[""] < opset:
        version_converter.convert_version(model, opset)


def add_constants(graph: ir.Graph, constants: Mapping[str, NDArray[Any]]) -> list[ir.Value]:
    """Add an initializer for each scalar in ``constants``, still without its value, and return them."""
    values = [
        ir.Value(name=name, shape=ir.Shape(()), type=ir.TensorType(ir.DataType.from_numpy(value.dtype)))
        for name, value in constants.items()
    ]
    graph.initializers.update({str(value.name): value for value in values})
    return values


def add_node(
    graph: ir.Graph,
    kind: str,
    inputs: Sequence[ir.Value],
    name: str,
    dtype: ir.DataType | None,
    shape: ir.Shape | None = None,
    **attributes: Any,
) -> ir.Value:
    """Append a node with one output to ``graph`` and return the output; both are called ``name``."""
    assert dtype is not None
    output = ir.Value(name=name, shape=shape, type=ir.TensorType(dtype))
    graph.append(ir.node(kind, inputs, attributes, outputs=[output], name=name))
    return output
