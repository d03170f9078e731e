"""Checks a graph against the operators, types and limits of TensorRT 10.3 (JetPack 6) and 10.16 (JetPack 7.2).

The check needs no TensorRT and no GPU, and reads no weights. The rules, each with its source, are data in
``tensorrt_rules.json``; this file says what each kind of limit means. A graph that passes may still fail to build (no tactic,
no memory). One that does not pass fails in TensorRT's parser or breaks one of our own rules.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import resources
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from trio_edge.runtime.bundle.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

RELEASES = ("10.3", "10.16")
"""The TensorRT releases of JetPack 6.1 to 6.2 and of JetPack 7.2."""
_READABLE_ELEMENTS = 4096  # constants up to this size are read
_Check = Literal[
    # of a node
    "never", "attribute", "attribute_absent", "attribute_all_ones", "max_outputs", "steps_of_shapes", "int4_weight",
    # of each of the limit's inputs that a node has
    "constant", "constant_at_most", "absent_inputs", "rank", "input_type", "static_shape", "zero",
]  # fmt: skip


class Finding(NamedTuple):
    """One violation of a TensorRT release's rule in a graph."""

    release: str
    where: str
    """A node with its operator, an input or an initializer."""
    expected: str
    got: str
    remedy: str

    def __str__(self) -> str:
        return (
            f"{self.where}: expected {self.expected} (TensorRT {self.release}), got {self.got}; {self.remedy}"
        )


def require_supported(model: ir.Model, *, name: str, symbols: Collection[str] | None = None) -> None:
    """Raise CheckpointError unless ``model`` passes ``check_graph`` for all ``RELEASES``; it names the first finding."""
    findings = [
        finding for release in RELEASES for finding in check_graph(model, release=release, symbols=symbols)
    ]
    if findings:
        others = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
        raise CheckpointError(f"graph {name!r}, {findings[0]}{others}")


def check_graph(model: ir.Model, *, release: str, symbols: Collection[str] | None = None) -> list[Finding]:
    """Return every violation of the rules of ``release`` in ``model``.

    Values without a type get one by shape inference, in place. ``symbols`` are the dynamic axes to which the optimization
    profiles give a size; other names are violations.
    """
    nodes = list(ir.traversal.RecursiveGraphIterator(model.graph))  # with those of subgraphs
    if any(value.dtype is None for node in nodes for value in node.outputs):
        ShapeInferencePass()(model)
    rules = load_rules()
    types = rules.operator_types(release)
    found = [*_of_model(model, nodes, rules.releases[release])]
    for value in model.graph.inputs:
        found += _of_input(value, rules.releases[release], symbols)
    for value in model.graph.initializers.values():
        found += _of_initializer(value)
    for node in nodes:
        where = f"node {node.name or node.outputs[0].name!r} ({node.op_type})"
        found += [(where, *more) for more in _of_node(node, rules, types, release)]
    return [Finding(release, *violation) for violation in found]


class _Limit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A restriction on some operators."""

    operators: tuple[str, ...]
    check: _Check
    releases: tuple[str, ...]
    remedy: str
    source: tuple[str, ...]
    status: Literal["verified", "derived", "own"]
    inputs: tuple[int, ...] = ()
    name: str = ""
    allowed: tuple[int | float | str, ...] = ()
    default: int | float | str | None = None
    value: int = 0
    why: str = ""


class _Release(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    jetpack: str
    basis: str
    min_opset: int
    max_opset: int
    max_opset_with_int4: int
    opset_note: str
    max_rank: int
    io_types: tuple[str, ...]
    operators: dict[str, tuple[str, ...]]
    """Exceptions from the rules' ``operators``."""


class Rules(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of ``tensorrt_rules.json``."""

    about: str
    notes: tuple[str, ...]
    sources: dict[str, str]
    type_sets: dict[str, tuple[str, ...]]
    releases: dict[str, _Release]
    operators: dict[str, tuple[str, ...]]
    """Operators by the type set that they allow."""
    typed_inputs: dict[str, tuple[str, ...]]
    """Operators by the inputs that the type set restricts; for other operators it is input 0."""
    typed_outputs: tuple[str, ...]
    """Operators whose outputs it restricts, too."""
    limits: tuple[_Limit, ...]

    def operator_types(self, release: str) -> dict[str, tuple[str, ...]]:
        """Return the allowed ONNX types of each operator that ``release`` reads."""
        result = {}
        for table in (self.operators, self.releases[release].operators):
            for type_set, operators in table.items():
                result.update(dict.fromkeys(operators, self.type_sets[type_set]))
        return result

    def checked_values(self, node: ir.Node) -> Iterator[ir.Value]:
        """Yield the inputs and outputs of ``node`` whose types are restricted."""
        places = next((key for key, names in self.typed_inputs.items() if node.op_type in names), "0")
        wanted = {"all": range(len(node.inputs)), "none": range(0)}.get(places)
        indices = [int(place) for place in places.split()] if wanted is None else wanted
        yield from (value for index in indices if (value := _input(node, index)) is not None)
        if node.op_type in self.typed_outputs:
            yield from node.outputs


@cache
def load_rules() -> Rules:
    """Return the packaged rules."""
    text = resources.files("trio_edge.export.check").joinpath("tensorrt_rules.json").read_bytes()
    return msgspec.json.decode(text, type=Rules)


def _of_model(
    model: ir.Model, nodes: Collection[ir.Node], limits: _Release
) -> Iterator[tuple[str, str, str, str]]:
    opset = model.opset_imports.get("", 0)
    values = (value for node in nodes for value in node.inputs if value is not None)
    has_int4 = any(value.dtype == ir.DataType.INT4 for value in values)
    low, high = limits.min_opset, limits.max_opset_with_int4 if has_int4 else limits.max_opset
    if not low <= opset <= high:
        yield "opset", f"{low}..{high}", str(opset), "export with a lower --opset"
    if model.functions:
        yield "functions", "none", min(map(str, model.functions)), "inline them"


def _of_input(
    value: ir.Value, limits: _Release, symbols: Collection[str] | None
) -> Iterator[tuple[str, str, str, str]]:
    where = f"input {value.name!r}"
    if _type_name(value) not in limits.io_types:
        yield where, _names(limits.io_types), _type_name(value), "convert it before"
    for axis, size in enumerate(value.shape or ()):
        if isinstance(size, int) or (size.value is not None and (symbols is None or size.value in symbols)):
            continue
        known = f"one of {_names(sorted(symbols))}" if symbols else "a name"
        remedy = "give it a size in every optimization profile"
        yield where, f"{known} as the dynamic axis {axis}", repr(size.value), remedy


def _of_initializer(value: ir.Value) -> Iterator[tuple[str, str, str, str]]:
    if isinstance(tensor := value.const_value, ir.ExternalTensor):
        path = PurePosixPath(location := str(tensor.location))
        if path.is_absolute() or ".." in path.parts or "\\" in location or ":" in location:
            expected = "external data inside the bundle's folder"
            yield f"initializer {value.name!r}", expected, location, "write a relative path"


def _of_node(
    node: ir.Node, rules: Rules, types: dict[str, tuple[str, ...]], release: str
) -> Iterator[tuple[str, str, str]]:
    """Yield what was expected, what came, and the remedy."""
    if node.domain not in ("", "ai.onnx"):
        remedy = "write it with standard operators, as a bundle has no plugins"
        yield "operators of the default ONNX domain", f"domain {node.domain!r}", remedy
        return
    if node.op_type not in types:
        others = [other for other in RELEASES if node.op_type in rules.operator_types(other)]
        remedy = f"TensorRT {others[0]} reads it" if others else "write it with other operators"
        yield "an operator that the parser reads", node.op_type, remedy
        return
    for value in rules.checked_values(node):
        if _type_name(value) not in types[node.op_type]:
            allowed = _names(types[node.op_type])
            yield f"{allowed} for {value.name!r}", _type_name(value), "cast it before"
    most = rules.releases[release].max_rank
    for value in node.outputs:
        if value.shape is not None and len(value.shape) > most:
            yield f"at most {most} axes", str(len(value.shape)), "merge axes"
    for limit in rules.limits:
        if node.op_type in limit.operators and release in limit.releases:
            yield from ((*violation, limit.remedy) for violation in _of_limit(node, limit))


def _of_limit(node: ir.Node, limit: _Limit) -> Iterator[tuple[str, str]]:
    """Yield what was expected and what came, for every violation of a limit."""
    for index in limit.inputs:
        if (value := _input(node, index)) is not None:
            yield from _of_limited_input(_input_name(node, index), value, limit)
    attribute, num_outputs = _attribute(node, limit), sum(bool(value.name) for value in node.outputs)
    match limit.check:
        case "never":
            yield "another operator", limit.why
        case "attribute" if attribute not in limit.allowed:
            yield f"attribute {limit.name} in {_names(limit.allowed)}", str(attribute)
        case "attribute_absent" if attribute is not None:
            yield f"no attribute {limit.name}", str(attribute)
        case "attribute_all_ones" if any(one != 1 for one in attribute or ()):
            yield f"attribute {limit.name} all 1", str(list(attribute))
        case "max_outputs" if num_outputs > limit.value:
            yield f"at most {limit.value} outputs", str(num_outputs)
        case "steps_of_shapes":
            yield from _steps_of_shapes(node)
        case "int4_weight":
            yield from _int4_weight(node)


def _of_limited_input(name: str, value: ir.Value, limit: _Limit) -> Iterator[tuple[str, str]]:
    shape, numbers, allowed = value.shape, _numbers(value), _names(limit.allowed)
    match limit.check:
        case "constant" if not _is_constant(value):
            yield f"a constant as {name}", f"the computed {value.name!r}"
        case "constant_at_most" if numbers and max(numbers) > limit.value:
            yield f"{name} <= {limit.value}", f"{max(numbers):.0f}"
        case "absent_inputs":
            yield f"no {name}", repr(value.name)
        case "rank" if shape is not None and len(shape) not in limit.allowed:
            yield f"{allowed} axes of {name}", str(len(shape))
        case "input_type" if _type_name(value) not in limit.allowed:
            yield f"{allowed} for {name}", _type_name(value)
        case "static_shape" if shape is None or not shape.is_static():
            yield f"fixed sizes of {name}", str(shape)
        case "zero" if not numbers:
            yield f"a small constant or no {name}", repr(value.name)
        case "zero" if any(numbers):
            yield f"{name} 0", str(next(filter(None, numbers)))


def _steps_of_shapes(node: ir.Node) -> Iterator[tuple[str, str]]:
    """Yield the inputs of a Scan that give it a number of steps that does not follow from the profile's sizes."""
    count = node.attributes["num_scan_inputs"].as_int()
    axes = (
        node.attributes["scan_input_axes"].as_ints() if "scan_input_axes" in node.attributes else [0] * count
    )
    for value, axis in zip(node.inputs[len(node.inputs) - count :], axes):
        steps = None if value is None or value.shape is None else value.shape[axis]
        # an expression of the graph's symbols, as torch.export writes it; what depends on data has a small letter
        names = set(re.findall(r"[A-Za-z_]\w*", str(steps))) - {"Min", "Max"}
        if steps is None or not all(re.fullmatch("[A-Z]{1,8}", symbol) for symbol in names):
            name = None if value is None else value.name
            yield "a number of steps that follows from shapes", f"{steps} of {name!r}"


def _int4_weight(node: ir.Node) -> Iterator[tuple[str, str]]:
    weight, scale = _input(node, 0), _input(node, 1)
    if weight is None or weight.dtype != ir.DataType.INT4:
        return
    if not _is_constant(weight):
        yield "a constant INT4 weight", f"the computed {weight.name!r}"
    sizes, scales = _static_sizes(weight), _static_sizes(scale)
    if sizes is None or len(sizes) != 2 or sizes[-1] % 2:
        yield "an INT4 weight [rows, an even number of columns]", str(weight.shape)
    elif scales is not None and len(scales) == 2 and not _is_blocked(sizes, scales):
        yield f"scales in whole blocks along one axis of {list(sizes)}", str(list(scales))


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _is_constant(value: ir.Value) -> bool:
    """Whether ``value`` is an initializer or the output of a Constant node."""
    return ir.convenience.get_const_tensor(value) is not None


def _numbers(value: ir.Value | None) -> list[float]:
    """Return the elements of a small constant; empty for other values and external data."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    if tensor is None or isinstance(tensor, ir.ExternalTensor) or tensor.size > _READABLE_ELEMENTS:
        return []
    return [float(number) for number in tensor.numpy().astype("float64").reshape(-1)]


def _static_sizes(value: ir.Value | None) -> tuple[int, ...] | None:
    if value is None or value.shape is None or not value.shape.is_static():
        return None
    return value.shape.numpy()


def _is_blocked(sizes: tuple[int, ...], scales: tuple[int, ...]) -> bool:
    """Whether exactly one axis of ``sizes`` is divided into equal blocks."""
    shortened = [(size, scale) for size, scale in zip(sizes, scales) if size != scale]
    return len(shortened) == 1 and shortened[0][1] > 0 and shortened[0][0] % shortened[0][1] == 0


def _attribute(node: ir.Node, limit: _Limit) -> Any:
    attribute = node.attributes.get(limit.name)
    return limit.default if attribute is None else attribute.value


def _input_name(node: ir.Node, index: int) -> str:
    """Return the input's name in ONNX's schema."""
    if not onnx.defs.has(node.op_type):
        return f"input {index}"
    formal = onnx.defs.get_schema(node.op_type).inputs
    return f"input {formal[index].name}" if index < len(formal) else f"input {index}"


def _type_name(value: ir.Value) -> str:
    return "an unknown type" if value.dtype is None else value.dtype.name


def _names(items: Collection[object]) -> str:
    return ", ".join(str(item) for item in items)
