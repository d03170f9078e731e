"""Checks a graph against the operators, types and limits of TensorRT 10.3 (JetPack 6) and 10.16 (JetPack 7.2).

The check needs no TensorRT and no GPU, and reads no weights. The rules, each with its source, are data in
``tensorrt_rules.json``; this file has one small function per kind of limit. A graph that passes may still fail to build
(no tactic, no memory). One that does not pass fails in TensorRT's parser or breaks one of our own rules.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from trio_edge.runtime.bundle.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

RELEASES = ("10.3", "10.16")
"""The TensorRT releases of JetPack 6.1 to 6.2 and of JetPack 7.2."""
_READABLE_ELEMENTS = 4096  # constants up to this size are read


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One violation of a TensorRT release's rule in a graph."""

    release: str
    where: str
    """A node with its operator, an input or an initializer."""
    operator: str
    """ONNX operator; empty if the finding is not about a node."""
    expected: str
    got: str
    remedy: str
    source: tuple[str, ...]
    """Keys of the rules' ``sources``."""

    def __str__(self) -> str:
        return (
            f"{self.where}: expected {self.expected} (TensorRT {self.release}), got {self.got}; {self.remedy}"
        )


def check_graph(model: ir.Model, *, release: str, symbols: Collection[str] | None = None) -> list[Finding]:
    """Return every violation of the rules of ``release`` in ``model``.

    Values without a type get one by shape inference, in place. ``symbols`` are the dynamic axes to which the optimization
    profiles give a size; other names are violations.
    """
    if any(value.dtype is None for node in _nodes(model) for value in node.outputs):
        ShapeInferencePass()(model)
    return list(_Check(model, release).findings(symbols))


def require_supported(model: ir.Model, *, name: str, symbols: Collection[str] | None = None) -> None:
    """Raise CheckpointError unless ``model`` passes ``check_graph`` for all ``RELEASES``; it names the first finding."""
    findings = [
        finding for release in RELEASES for finding in check_graph(model, release=release, symbols=symbols)
    ]
    if findings:
        others = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
        raise CheckpointError(f"graph {name!r}, {findings[0]}{others}")


class _Limit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A restriction on some operators."""

    operators: tuple[str, ...]
    check: str
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


class _Check:
    """The check of one model for one release."""

    def __init__(self, model: ir.Model, release: str) -> None:
        self.model = model
        self.release = release
        self.rules = load_rules()
        self.limits = self.rules.releases[release]
        self.types = self.rules.operator_types(release)

    def findings(self, symbols: Collection[str] | None) -> Iterator[Finding]:
        yield from self._model()
        for value in self.model.graph.inputs:
            yield from self._input(value, symbols)
        for value in self.model.graph.initializers.values():
            yield from self._stored(value)
        for node in _nodes(self.model):
            yield from self._node(node)

    def _model(self) -> Iterator[Finding]:
        opset = self.model.opset_imports.get("", 0)
        int4 = any(
            value is not None and value.dtype == ir.DataType.INT4
            for node in _nodes(self.model)
            for value in node.inputs
        )
        low, high = self.limits.min_opset, self.limits.max_opset_with_int4 if int4 else self.limits.max_opset
        if not low <= opset <= high:
            yield self._finding(
                "opset", expected=f"{low}..{high}", got=str(opset), remedy="export with a lower --opset"
            )
        if self.model.functions:
            names = sorted(str(key) for key in self.model.functions)
            yield self._finding(
                "functions", expected="none", got=names[0], remedy="inline them", source=("own",)
            )

    def _input(self, value: ir.Value, symbols: Collection[str] | None) -> Iterator[Finding]:
        where = f"input {value.name!r}"
        if value.dtype is None or value.dtype.name not in self.limits.io_types:
            allowed = _names(self.limits.io_types)
            yield self._finding(where, expected=allowed, got=_type_name(value), remedy="convert it before")
        for axis, size in enumerate(value.shape or ()):
            if isinstance(size, int):
                continue
            name = size.value
            if name is None or (symbols is not None and name not in symbols):
                known = f"one of {_names(sorted(symbols))}" if symbols else "a name"
                yield self._finding(
                    where,
                    expected=f"{known} as the dynamic axis {axis}",
                    got=repr(name),
                    remedy="give it a size in every optimization profile",
                    source=("own",),
                )

    def _stored(self, value: ir.Value) -> Iterator[Finding]:
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            return
        path = PurePosixPath(str(tensor.location))
        if path.is_absolute() or ".." in path.parts or "\\" in str(path) or ":" in str(path):
            yield self._finding(
                f"initializer {value.name!r}",
                expected="external data inside the bundle's folder",
                got=str(tensor.location),
                remedy="write a relative path",
                source=("own",),
            )

    def _node(self, node: ir.Node) -> Iterator[Finding]:
        if node.domain not in ("", "ai.onnx"):
            yield self._finding(
                node,
                expected="operators of the default ONNX domain",
                got=f"domain {node.domain!r}",
                remedy="write it with standard operators, as a bundle has no plugins",
                source=("own",),
            )
            return
        if node.op_type not in self.types:
            others = [release for release in RELEASES if node.op_type in self.rules.operator_types(release)]
            yield self._finding(
                node,
                expected="an operator that the parser reads",
                got=node.op_type,
                remedy=f"TensorRT {others[0]} reads it" if others else "write it with other operators",
            )
            return
        yield from self._types(node)
        for limit in self.rules.limits:
            if node.op_type in limit.operators and self.release in limit.releases:
                yield from self._limit(node, limit)

    def _types(self, node: ir.Node) -> Iterator[Finding]:
        allowed = self.types[node.op_type]
        for value in self.rules.checked_values(node):
            if value.dtype is None or value.dtype.name not in allowed:
                yield self._finding(
                    node,
                    expected=f"{_names(allowed)} for {value.name!r}",
                    got=_type_name(value),
                    remedy="cast it before",
                )
        for value in node.outputs:
            if value.shape is not None and len(value.shape) > self.limits.max_rank:
                yield self._finding(
                    node,
                    expected=f"at most {self.limits.max_rank} axes",
                    got=f"{len(value.shape)}",
                    remedy="merge axes",
                    source=("parser-10.1",),
                )

    def _limit(self, node: ir.Node, limit: _Limit) -> Iterator[Finding]:
        for expected, got in _CHECKS[limit.check](node, limit):
            yield self._finding(node, expected=expected, got=got, remedy=limit.remedy, source=limit.source)

    def _finding(
        self,
        where: str | ir.Node,
        *,
        expected: str,
        got: str,
        remedy: str,
        source: tuple[str, ...] = ("table-10.1", "table-10.15"),
    ) -> Finding:
        return Finding(
            release=self.release,
            where=where if isinstance(where, str) else _where(where),
            operator="" if isinstance(where, str) else where.op_type,
            expected=expected,
            got=got,
            remedy=remedy,
            source=source,
        )


# Each yields (expected, got) for every violation of a limit by a node.


def _never(_node: ir.Node, limit: _Limit) -> Iterator[tuple[str, str]]:
    yield "another operator", limit.why


def _constant(node: ir.Node, limit: _Limit) -> Iterator[tuple[str, str]]:
    for index, value in _inputs(node, limit):
        if not _is_constant(value):
            yield f"a constant as {_input_name(node, index)}", f"the computed {value.name!r}"


def _fixed_steps(node: ir.Node, _limit: _Limit) -> Iterator[tuple[str, str]]:
    count = int(_attribute_value(node, "num_scan_inputs", default=0))
    axes = _attribute_value(node, "scan_input_axes", default=[0] * count)
    for value, axis in zip(node.inputs[len(node.inputs) - count :], axes):
        steps = None if value is None or value.shape is None else value.shape[axis]
        if not isinstance(steps, int):
            name = None if value is None else value.name
            yield "a fixed number of steps", f"{steps} of {name!r}"


def _constant_at_most(node: ir.Node, limit: _Limit) -> Iterator[tuple[str, str]]:
    for index, value in _inputs(node, limit):
        largest = max((int(number) for number in _numbers(value)), default=0)
        if largest > limit.value:
            yield f"{_input_name(node, index)} <= {limit.value}", str(largest)


def _attribute(node: ir.Node, limit: _Limit) -> Iterator[tuple[str, str]]:
    value = _attribute_value(node, limit.name, default=limit.default)
    if value not in limit.allowed:
        yield f"attribute {limit.name} in {_names(limit.allowed)}", str(value)


def _attribute_absent(node: ir.Node, limit: _Limit) -> Iterator[tuple[str, str]]:
    value = _attribute_value(node, limit.name, default=None)
    if value is not None:
        yield f"no attribute {limit.name}", str(value)


def _attribute_all_ones(node: ir.Node, limit: _Limit) -> Iterator[tuple[str, str]]:
    values = _attribute_value(node, limit.name, default=())
    if any(value != 1 for value in values):
        yield f"attribute {limit.name} all 1", str(list(values))


def _absent_inputs(node: ir.Node, limit: _Limit) -> Iterator[tuple[str, str]]:
    for index, value in _inputs(node, limit):
        yield f"no {_input_name(node, index)}", repr(value.name)


def _max_outputs(node: ir.Node, limit: _Limit) -> Iterator[tuple[str, str]]:
    used = sum(bool(value.name) for value in node.outputs)
    if used > limit.value:
        yield f"at most {limit.value} outputs", str(used)


def _rank(node: ir.Node, limit: _Limit) -> Iterator[tuple[str, str]]:
    for index, value in _inputs(node, limit):
        if value.shape is not None and len(value.shape) not in limit.allowed:
            yield f"{_names(limit.allowed)} axes of {_input_name(node, index)}", str(len(value.shape))


def _input_type(node: ir.Node, limit: _Limit) -> Iterator[tuple[str, str]]:
    for index, value in _inputs(node, limit):
        if value.dtype is None or value.dtype.name not in limit.allowed:
            yield f"{_names(limit.allowed)} for {_input_name(node, index)}", _type_name(value)


def _static_shape(node: ir.Node, limit: _Limit) -> Iterator[tuple[str, str]]:
    for index, value in _inputs(node, limit):
        if value.shape is None or not value.shape.is_static():
            yield f"fixed sizes of {_input_name(node, index)}", str(value.shape)


def _zero(node: ir.Node, limit: _Limit) -> Iterator[tuple[str, str]]:
    for index, value in _inputs(node, limit):
        numbers = _numbers(value)
        if not numbers:
            yield f"a small constant or no {_input_name(node, index)}", repr(value.name)
        elif any(number != 0 for number in numbers):
            yield f"{_input_name(node, index)} 0", str(next(number for number in numbers if number != 0))


def _int4_weight(node: ir.Node, _limit: _Limit) -> Iterator[tuple[str, str]]:
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


_CHECKS: dict[str, Callable[[ir.Node, _Limit], Iterator[tuple[str, str]]]] = {
    "never": _never,
    "constant": _constant,
    "constant_at_most": _constant_at_most,
    "fixed_steps": _fixed_steps,
    "attribute": _attribute,
    "attribute_absent": _attribute_absent,
    "attribute_all_ones": _attribute_all_ones,
    "absent_inputs": _absent_inputs,
    "max_outputs": _max_outputs,
    "rank": _rank,
    "input_type": _input_type,
    "static_shape": _static_shape,
    "zero": _zero,
    "int4_weight": _int4_weight,
}


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Yield the nodes of the graph and of its subgraphs."""
    yield from ir.traversal.RecursiveGraphIterator(model.graph)


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _inputs(node: ir.Node, limit: _Limit) -> Iterator[tuple[int, ir.Value]]:
    """Yield those of the limit's inputs that ``node`` has."""
    for index in limit.inputs:
        if (value := _input(node, index)) is not None:
            yield index, value


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


def _attribute_value(node: ir.Node, name: str, *, default: Any) -> Any:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.value


def _where(node: ir.Node) -> str:
    return f"node {node.name or node.outputs[0].name!r} ({node.op_type})"


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
