"""Inputs and outputs of the graphs that are built here."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from trio_edge.runtime.bundle import graph_io
from trio_edge.runtime.bundle.manifest import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio_edge.runtime.bundle.manifest import Dimensions, DType


class GraphTensors(NamedTuple):
    """Inputs and outputs of a graph, in order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def range_tensors(
    layers: range,
    *,
    dimensions: Dimensions,
    dtype: DType,
    kv_dtype: DType,
    position_axes: int,
    num_deepstack: int = 0,
    with_previous: bool = False,
) -> GraphTensors:
    """Return the tensors of a range of decoder layers; the range that starts at layer 0 reads embeddings.

    DeepStack planes, one for each of the first ``num_deepstack`` layers, are the last inputs.
    """
    past_shape = (1, dimensions.num_kv_heads, "C", dimensions.head_size)
    new_shape = (1, dimensions.num_kv_heads, "S", dimensions.head_size)
    hidden_shape = (1, "S", dimensions.hidden_size)
    parts = [f"{layer}.{part}" for layer in layers for part in ("key", "value")]
    hidden = graph_io.EMBEDS if layers.start == 0 else graph_io.HIDDEN
    inputs = (
        TensorSpec(name=hidden, dtype=dtype, shape=hidden_shape),
        TensorSpec(name=graph_io.POSITIONS, dtype="int32", shape=(position_axes, "S")),
        _one(graph_io.PAST_LENGTH),
        *(
            TensorSpec(name=f"{graph_io.PAST_PREFIX}{part}", dtype=kv_dtype, shape=past_shape)
            for part in parts
        ),
        *_planes(graph_io.DEEPSTACK, layers[: max(num_deepstack - layers.start, 0)], hidden_shape, dtype),
    )
    outputs = (
        TensorSpec(name=graph_io.HIDDEN_OUT, dtype=dtype, shape=hidden_shape),
        *(
            TensorSpec(name=f"{graph_io.PRESENT_PREFIX}{part}", dtype=kv_dtype, shape=new_shape)
            for part in parts
        ),
    )
    if with_previous:
        outputs = (*outputs, TensorSpec(name=graph_io.PREVIOUS, dtype=dtype, shape=hidden_shape))
    return GraphTensors(inputs, outputs)


def select_tensors(
    num_keep: int,
    *,
    dimensions: Dimensions,
    dtype: DType,
    position_axes: int,
    with_previous: bool,
    with_prompt: bool,
    with_saliency: bool = False,
    with_images: bool = False,
    others: Sequence[TensorSpec] = (),
    planes: range = range(0),
) -> GraphTensors:
    """Return the tensors of a select graph that keeps ``num_keep`` visual tokens.

    ``others`` are inputs that a selector adds. ``planes`` are the layers after the stage to whose outputs DeepStack adds a plane.
    """
    width = dimensions.hidden_size
    inputs = [
        TensorSpec(name=graph_io.HIDDEN, dtype=dtype, shape=(1, "S", width)),
        TensorSpec(name=graph_io.POSITIONS, dtype="int32", shape=(position_axes, "S")),
        TensorSpec(name=graph_io.VISUAL_ROWS, dtype="int32", shape=("N",)),
        _one(graph_io.NUM_VISUAL),
        _one(graph_io.LENGTH),
    ]
    if with_previous:
        inputs.append(TensorSpec(name=graph_io.PREVIOUS, dtype=dtype, shape=(1, "S", width)))
    if with_prompt:
        inputs.append(TensorSpec(name=graph_io.PROMPT_EMBEDS, dtype=dtype, shape=(1, "F", width)))
        inputs += [
            TensorSpec(name=graph_io.PROMPT_IS_VISUAL, dtype="int32", shape=("F",)),
            _one(graph_io.PROMPT_LENGTH),
        ]
    if with_saliency:
        inputs.append(TensorSpec(name=graph_io.SALIENCY, dtype="float32", shape=("N",)))
    kept_images = []
    if with_images:
        inputs.append(TensorSpec(name=graph_io.VISUAL_IMAGES, dtype="int32", shape=("N",)))
        kept_images.append(TensorSpec(name=graph_io.KEPT_VISUAL_IMAGES, dtype="int32", shape=(num_keep,)))
    inputs += [*others, *_planes(graph_io.DEEPSTACK, planes, (1, "S", width), dtype)]
    outputs = (
        TensorSpec(name=graph_io.KEPT_HIDDEN, dtype=dtype, shape=(1, "R", width)),
        TensorSpec(name=graph_io.KEPT_POSITIONS, dtype="int32", shape=(position_axes, "R")),
        TensorSpec(name=graph_io.KEPT_VISUAL_ROWS, dtype="int32", shape=(num_keep,)),
        TensorSpec(name=graph_io.KEPT_INDICES, dtype="int32", shape=(num_keep,)),
        TensorSpec(name=graph_io.SCORES, dtype="float32", shape=("N",)),
        _one(graph_io.UNSETTLED),
        *kept_images,
        *_planes(graph_io.KEPT_DEEPSTACK, planes, (1, "R", width), dtype),
    )
    return GraphTensors(tuple(inputs), outputs)


def _planes(
    prefix: str, layers: Sequence[int], shape: tuple[int | str, ...], dtype: DType
) -> list[TensorSpec]:
    return [TensorSpec(name=f"{prefix}{layer}", dtype=dtype, shape=shape) for layer in layers]


def token_planes(prefix: str, count: int, *, rows: int | str, width: int, dtype: DType) -> list[TensorSpec]:
    """Return the ``count`` DeepStack planes of a graph before the decoder, [rows, D] each."""
    return _planes(prefix, range(count), (rows, width), dtype)


def probe_tensors(
    *, dimensions: Dimensions, dtype: DType, position_axes: int, with_keys: bool, with_mlp: bool
) -> GraphTensors:
    """Return the tensors of a probe's forward half; without ``with_mlp`` its gradient goes around the layer's MLP."""
    inputs = (
        TensorSpec(name=graph_io.PROBE_HIDDEN, dtype=dtype, shape=(1, "PS", dimensions.hidden_size)),
        TensorSpec(name=graph_io.PROBE_POSITIONS, dtype="int32", shape=(position_axes, "PS")),
        TensorSpec(name=graph_io.PROBE_VISUAL_ROWS, dtype="int32", shape=("PN",)),
        TensorSpec(name=graph_io.PROBE_ROWS, dtype="int32", shape=("PR",)),
        _one(graph_io.PROBE_LENGTH),
    )
    output = TensorSpec(name=graph_io.PROBE_OUTPUT, dtype="float32", shape=("PR", dimensions.hidden_size))
    state = _probe_state(
        "PR", "PN", dimensions, graph_io.PROBE_RESULTS[1:], with_keys=with_keys, with_mlp=with_mlp
    )
    return GraphTensors(inputs, (output, *state))


def saliency_tensors(
    *, dimensions: Dimensions, dtype: DType, position_axes: int, with_keys: bool, with_mlp: bool
) -> GraphTensors:
    """Return the tensors of a probe's backward half."""
    state = (graph_io.GRADIENT_STATE, graph_io.GRADIENT_ATTENTION, graph_io.GRADIENT_KEYS)
    inputs = (
        TensorSpec(name=graph_io.GRADIENT_HIDDEN, dtype=dtype, shape=(1, "GS", dimensions.hidden_size)),
        TensorSpec(name=graph_io.GRADIENT_POSITIONS, dtype="int32", shape=(position_axes, "GS")),
        TensorSpec(name=graph_io.GRADIENT_VISUAL_ROWS, dtype="int32", shape=("GN",)),
        _one(graph_io.GRADIENT_NUM_VISUAL),
        TensorSpec(name=graph_io.GRADIENT, dtype="float32", shape=("GR", dimensions.hidden_size)),
        *_probe_state("GR", "GN", dimensions, state, with_keys=with_keys, with_mlp=with_mlp),
    )
    return GraphTensors(inputs, (TensorSpec(name=graph_io.SALIENCY_SCORES, dtype="float32", shape=("GN",)),))


def _probe_state(
    rows: str,
    visual: str,
    dimensions: Dimensions,
    names: Sequence[str],
    *,
    with_keys: bool,
    with_mlp: bool,
) -> list[TensorSpec]:
    """Return the tensors between a probe's halves: ``ProbeState`` of trio_edge.trio.saliency."""
    dims = dimensions
    width = dims.num_heads * (dims.head_size + dims.hidden_size)
    if with_mlp:
        width += dims.hidden_size + 2 * dims.intermediate_size
    state, attention, keys = names
    tensors = [
        TensorSpec(name=state, dtype="float32", shape=(rows, width)),
        TensorSpec(name=attention, dtype="float32", shape=(dims.num_heads, rows, visual)),
    ]
    if with_keys:
        shape = (visual, dims.num_kv_heads * dims.head_size)
        tensors.append(TensorSpec(name=keys, dtype="float32", shape=shape))
    return tensors


def head_tensors(*, dimensions: Dimensions, dtype: DType, is_shared: bool = False) -> GraphTensors:
    """Return the tensors of the head; a head that probes share has L rows: 1, 0 while its gradient runs, or all probe rows."""
    count = graph_io.num_candidates(dimensions)
    rows, top = ("L", ("L", count)) if is_shared else (1, (count,))
    inputs = (
        TensorSpec(name=graph_io.HIDDEN, dtype=dtype, shape=(1, "S", dimensions.hidden_size)),
        TensorSpec(name=graph_io.LAST_ROW, dtype="int32", shape=(rows,)),
    )
    outputs = (
        TensorSpec(name=graph_io.LOGITS, dtype="float32", shape=(rows, dimensions.vocab_size)),
        TensorSpec(name=graph_io.TOP_LOGITS, dtype="float32", shape=top),
        TensorSpec(name=graph_io.TOP_IDS, dtype="int32", shape=top),
    )
    return GraphTensors(inputs, outputs)


def gradient_tensors(*, dimensions: Dimensions, candidates_dtype: DType | None = None) -> GraphTensors:
    """Return the tensors of the head's gradient; ``candidates_dtype`` is that of the candidates' rows, if they are given."""
    width = dimensions.hidden_size
    inputs = [TensorSpec(name=graph_io.PROBE_OUTPUT, dtype="float32", shape=("GR", width))]
    if candidates_dtype is not None:
        count = graph_io.num_candidates(dimensions)
        inputs += [
            TensorSpec(name=graph_io.CANDIDATE_LOGITS, dtype="float32", shape=("GR", count)),
            TensorSpec(name=graph_io.CANDIDATE_ROWS, dtype=candidates_dtype, shape=("GR", count, width)),
        ]
    output = TensorSpec(name=graph_io.OUTPUT_GRADIENT, dtype="float32", shape=("GR", width))
    return GraphTensors(tuple(inputs), (output,))


def _one(name: str) -> TensorSpec:
    return TensorSpec(name=name, dtype="int32", shape=(1,))
