"""Decides the stored form of each initializer of each graph: floating point or quantized, smoothed or not.

A tensor that several graphs read in the same form is stored once. A probe reads weights in the form of their own graphs.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec

from trio_edge.export.checkpoints.checkpoint import EMBEDDING_NAME
from trio_edge.export.quantize.graph import SUFFIXES, is_linear, quantize_graph
from trio_edge.export.quantize.numerics import BLOCK_SIZE, block_size
from trio_edge.export.quantize.plan import OPSETS, PARTS
from trio_edge.export.quantize.store import StoredForm
from trio_edge.export.quantize.unpacking import stored_block
from trio_edge.runtime.bundle.graph_io import is_probe
from trio_edge.runtime.bundle.manifest import PART_FROM_ROLE, Quantization

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from trio_edge.export.checkpoints.checkpoint import Checkpoint
    from trio_edge.export.checkpoints.weights import SourceTensor, StoredName
    from trio_edge.export.graphs.assembly.onnx_graph import TracedGraph
    from trio_edge.export.quantize.plan import QuantizePlan
    from trio_edge.export.quantize.scales import CalibratedScales
    from trio_edge.runtime.bundle.manifest import Part, QuantizedFormat, Role

_LAYER = re.compile(r"language_model\.layers\.(\d+)\.")
DECODER_LINEAR = re.compile(
    r"language_model\.layers\.\d+\.(?:self_attn\.(?:[qkvo]|out)_proj|mlp\.(?:gate|up|down)_proj|feed_forward\.w[123])\.weight|lm_head\.weight"
)
"""Weights of linear layers that probes also read."""
_RATES = re.compile(r"language_model\.layers\.\d+\.linear_attn\.in_proj_[ab]\.weight")
"""Decay and learning rate of linear attention: one row for each head, whose errors add up in the state."""


def quantize_graphs(
    graphs: Sequence[TracedGraph], plan: QuantizePlan, scales: CalibratedScales, *, checkpoint: Checkpoint
) -> tuple[list[TracedGraph], tuple[StoredForm, ...]]:
    """Return the graphs with quantized linear layers, and the forms of all tensors that are not stored as they are.

    ``graphs`` are all graphs of the bundle, before their weights are attached. The weights of the returned graphs are the
    stored names of these forms and of their scales. If the checkpoint is quantized already, parts that the plan does not
    name keep its integers if these are symmetric; otherwise they get the values in floating point.
    """
    layer_roles = _layer_roles(graphs)
    forms = [
        {
            name: _form(graph, name, stored_name.tensor, plan, scales, layer_roles, checkpoint)
            for name, stored_name in graph.weights.items()
        }
        for graph in graphs
    ]
    tables = row_tables(graphs, plan)
    every = itertools.chain(filter(None, tables), *(of_graph.values() for of_graph in forms))
    stored = {name: form for form in every if (name := form.stored_name).changes}
    result = [_rewritten(graph, of_graph, scales) for graph, of_graph in zip(graphs, forms)]
    return result, tuple(stored.values())


def is_quantized(role: Role, *, plan: QuantizePlan, checkpoint: Checkpoint) -> bool:
    """Return whether the linear layers of the decoder's graphs with ``role`` are going to be quantized."""
    if plan.names(role):
        kind = plan.of_role(role)
        if role == "head" and kind == "int4":
            return int4_block(checkpoint.tensor(EMBEDDING_NAME).shape) is not None  # the head's shape, too
        return kind != "none"
    packed = (name for name in checkpoint.packed if DECODER_LINEAR.fullmatch(name))
    return any((_LAYER.match(name) is None) == (role == "head") for name in packed)


def _layer_roles(graphs: Iterable[TracedGraph]) -> dict[int, Role]:
    """Return the role of each decoder layer's own graph."""
    return {
        layer: graph.spec.role
        for graph in graphs
        if graph.spec.num_layers and graph.spec.first_layer is not None
        for layer in range(graph.spec.first_layer, graph.spec.first_layer + graph.spec.num_layers)
    }


def _form(
    graph: TracedGraph,
    name: str,
    tensor: str,
    plan: QuantizePlan,
    scales: CalibratedScales,
    layer_roles: Mapping[int, Role],
    checkpoint: Checkpoint,
) -> StoredForm:
    layer, is_decoder_linear = _LAYER.match(tensor), _is_decoder_linear(tensor)
    own_role: Role = "head" if layer is None else layer_roles[int(layer[1])]
    role = own_role if is_probe(graph.spec) else graph.spec.role
    kind, packed = plan.of_role(role), checkpoint.packed.get(tensor)
    may = is_linear(graph.model.graph.initializers[name]) and _RATES.fullmatch(tensor) is None
    may |= (is_probe(graph.spec) or graph.spec.role == "select") and is_decoder_linear
    keeps_integers = kind == ("int4" if plan.names(role) else "none")
    if packed is not None and packed.format.is_symmetric and may and keeps_integers:
        return StoredForm(
            name=tensor, kind="int4", block=stored_block(packed), is_packed=True, is_taken_over=True
        )
    # A selection may read smoothed weights only if it shares them with its layer: the factors cancel only if all weights of
    # the layer have them.
    # The gradient of a quantized head reads rows of the lm_head as they are.
    shares = kind != "none" and graph.spec.name != "gradient"
    shares = shares and (role != "select" or kind == plan.of_role(own_role))
    smoothing = scales.smoothing.get(tensor) if shares else None
    block = int4_block(checkpoint.tensor(tensor).shape) if kind == "int4" else None
    if kind == "none" or not may or (kind == "int4" and block is None):
        kind, block = "none", None
    return StoredForm(
        name=tensor,
        kind=kind,
        block=block,
        columns_K=scales.outliers.get(tensor) if kind == "int4" else None,
        smoothing=smoothing,
        is_packed=packed is not None,
    )


def _is_decoder_linear(tensor: str) -> bool:
    return (
        DECODER_LINEAR.fullmatch(tensor) is not None or tensor == EMBEDDING_NAME
    )  # the embeddings are a tied head


def int4_block(shape: Sequence[int]) -> int | None:
    """Return the inputs per INT4 block of a weight; None if it cannot be INT4, for which TensorRT needs an even O."""
    return block_size(shape[1]) if len(shape) == 2 and shape[0] % 2 == 0 else None


def _rewritten(graph: TracedGraph, forms: Mapping[str, StoredForm], scales: CalibratedScales) -> TracedGraph:
    quantized = {name: form for name, form in forms.items() if form.kind != "none"}
    weights = {name: form.stored_name for name, form in forms.items()}
    if not quantized:
        return replace(graph, weights=weights)
    for name, form in quantized.items():
        weights |= {name + suffix: array for suffix, array in zip(SUFFIXES, form.array_names)}
    # A probe's forward half shares the layer's own products.
    rounds_inputs = graph.piece == "probe" or not (graph.spec.role == "select" or is_probe(graph.spec))
    ranges = scales.activation_max if rounds_inputs else {}
    opset = max(graph.model.opset_imports[""], *(OPSETS[form.kind] for form in quantized.values()))
    constants = quantize_graph(graph.model, quantized, activation_max=ranges, opset=opset)
    return replace(
        graph,
        spec=msgspec.structs.replace(graph.spec, opset=opset),
        weights=weights,
        constants={**graph.constants, **constants},
    )


def plain_tensors(
    graphs: Iterable[TracedGraph], checkpoint: Checkpoint, forms: Iterable[StoredForm] = ()
) -> dict[str, SourceTensor]:
    """Return the tensors that are stored as they are, including the embeddings unless they are in ``forms``."""
    tables = {form.name for form in forms if form.is_table}
    used = {name.tensor for graph in graphs for name in graph.weights.values() if not name.changes}
    return {name: checkpoint.tensor(name) for name in sorted(used | ({EMBEDDING_NAME} - tables))}


def row_tables(graphs: Iterable[TracedGraph], plan: QuantizePlan) -> tuple[StoredForm, StoredForm | None]:
    """Return the forms of the token embeddings, and of the lm_head's rows if a gradient reads them; a tied head has one form."""
    kind = plan.of_part("embedding")
    embedding = StoredForm(name=EMBEDDING_NAME, kind=kind, is_table=kind != "none")
    by_name = {graph.spec.name: graph for graph in graphs}
    if "gradient" not in by_name:
        return embedding, None
    (name,) = {
        stored.tensor for stored in by_name["head"].weights.values() if _is_decoder_linear(stored.tensor)
    }
    is_tied = name == EMBEDDING_NAME
    return embedding, embedding if is_tied else StoredForm(name=name, kind="int8", is_table=True)


def quantization_of(
    forms: Sequence[StoredForm],
    plan: QuantizePlan,
    scales: CalibratedScales,
    *,
    graphs: Sequence[TracedGraph],
) -> Quantization | None:
    """Return the manifest's entry for ``forms`` and the KV caches; None if nothing is quantized."""
    if not plan.has_cache and all(form.kind == "none" for form in forms):
        return None
    taken = {form.stored_name for form in forms if form.is_taken_over}
    quantized = {form.stored_name for form in forms if form.kind != "none"}
    blocks = {form.block for form in forms if form.kind == "int4" and form.block is not None}
    weights = _weights_of_parts(graphs)
    formats: dict[str, QuantizedFormat] = {
        part: "int4" for part, names in weights.items() if not taken.isdisjoint(names)
    }
    for part in PARTS:
        has_any = part not in weights or not quantized.isdisjoint(weights[part])
        if (kind := plan.of_part(part)) != "none" and has_any:
            formats[part] = kind
    return Quantization(
        formats=formats,
        method="checkpoint" if taken else scales.method,
        block_size=BLOCK_SIZE if BLOCK_SIZE in blocks else max(blocks, default=None),
        num_samples=scales.num_samples,
        outliers=plan.outliers,
        inputs=_with_inputs(graphs),
    )


def _weights_of_parts(graphs: Iterable[TracedGraph]) -> dict[Part, set[StoredName]]:
    """Return the weights of each part's graphs without probes; TRIO's selections have none."""
    found: dict[Part, set[StoredName]] = {}
    for graph in graphs:
        if not is_probe(graph.spec) and (part := PART_FROM_ROLE.get(graph.spec.role)) is not None:
            found.setdefault(part, set()).update(graph.weights.values())
    return found


def unquantized_parts(
    forms: Iterable[StoredForm], plan: QuantizePlan, *, graphs: Iterable[TracedGraph]
) -> dict[Part, QuantizedFormat]:
    """Return the parts that ``plan`` quantizes but that have no weight which the format can store."""
    quantized = {form.stored_name for form in forms if form.kind != "none"}
    return {
        part: kind
        for part, names in _weights_of_parts(graphs).items()
        if names and quantized.isdisjoint(names) and (kind := plan.of_part(part)) != "none"
    }


def _with_inputs(graphs: Iterable[TracedGraph]) -> tuple[Part, ...]:
    """Return the parts whose graphs quantize the inputs of their products."""
    rounded = {
        PART_FROM_ROLE[graph.spec.role]
        for graph in graphs
        if not is_probe(graph.spec)
        and any(
            node.op_type == "QuantizeLinear" and not node.outputs[0].is_graph_output()
            for node in graph.model.graph
        )
    }
    return tuple(part for part in PARTS if part in rounded)
