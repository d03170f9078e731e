"""Inputs and outputs of the graphs: the exporter makes them, and the runtime checks them before it binds."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from trio_edge.runtime.bundle.errors import ManifestError
from trio_edge.runtime.bundle.limits import MOST_TENSOR_BYTES
from trio_edge.runtime.bundle.manifest import DTYPE_BYTES, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio_edge.runtime.bundle.manifest import Dimensions, DType, GraphSpec, Manifest

# Names of the tensors. The exporter writes them into the graphs, the runtime binds by them.

# Graphs before the decoder.
VISUAL_TOKENS = "visual_tokens"
KEPT_PATCHES = "kept_patches"
KEPT_TOKENS = "kept_tokens"
"""Output of a graph that drops tokens: the kept patches of each tile, or the kept visual tokens of the image."""
PREVIOUS_TOKENS = "previous_tokens"
"""Input of a reduce graph that compares frames: ``VISUAL_TOKENS`` of the previous pair of frames."""
HAS_PREVIOUS = "has_previous"
"""[1], 0 for an image and for the first pair of frames, for which ``PREVIOUS_TOKENS`` mean nothing."""
REDUCED_TOKENS = "reduced_tokens"
DEEPSTACK_TOKENS = "deepstack_tokens."
REDUCED_DEEPSTACK = "reduced_deepstack_tokens."
"""Prefixes of the DeepStack planes that belong to ``VISUAL_TOKENS`` and ``REDUCED_TOKENS``; a number follows."""
CLIP_TEXT: Literal["clip_text"] = "clip_text"
"""Name and role of the text tower's graph."""

# Decoder layer ranges.
EMBEDS = "inputs_embeds"
"""Input of the range that starts at layer 0; the other ranges read ``HIDDEN``."""
HIDDEN = "hidden_states"
POSITIONS = "position_ids"
PAST_LENGTH = "past_length"
PAST_PREFIX = "past_key_values."
HIDDEN_OUT = "hidden_states_out"
PRESENT_PREFIX = "present."
DEEPSTACK = "deepstack_embeds."
"""DeepStack plane of layer i, ``deepstack_embeds.{i}``: rows that are added to the layer's output, 0 at text."""
PREVIOUS = "previous_hidden_states"
"""Hidden states that entered the layer before a stage's layer: output of a range, input of the select graph after it."""

# Probes: the forward half returns a layer's output on the probe rows, the backward half takes the gradient of that output.
PROBE_HIDDEN = "probe_hidden_states"
PROBE_POSITIONS = "probe_position_ids"
PROBE_VISUAL_ROWS = "probe_visual_rows"
PROBE_ROWS = "probe_rows"
PROBE_LENGTH = "probe_length"
PROBE_OUTPUT = "probe_output"
PROBE_STATE = "probe_state"
PROBE_ATTENTION = "probe_attention"
PROBE_KEYS = "probe_keys"
PROBE_RESULTS = (PROBE_OUTPUT, PROBE_STATE, PROBE_ATTENTION, PROBE_KEYS)
"""Outputs of the forward half; the keys only where the backward half reads them."""
GRADIENT_HIDDEN = "gradient_hidden_states"
GRADIENT_POSITIONS = "gradient_position_ids"
GRADIENT_VISUAL_ROWS = "gradient_visual_rows"
GRADIENT_NUM_VISUAL = "gradient_num_visual"
GRADIENT = "gradient"
GRADIENT_STATE = "gradient_state"
GRADIENT_ATTENTION = "gradient_attention"
GRADIENT_KEYS = "gradient_keys"
SALIENCY_SCORES = "saliency_scores"
OUTPUT_GRADIENT = "output_gradient"
"""The head's gradient with respect to ``PROBE_OUTPUT``."""

# A quantized head: the gradient of the loss over the likeliest tokens, whose logits and rows of the lm_head are given.
CANDIDATES = "candidates"
"""The head's profile on all probe rows."""
CANDIDATE_LOGITS = "candidate_logits"
CANDIDATE_ROWS = "candidate_rows"

# Select graphs.
SALIENCY = "saliency"
"""Scores of a probe, if the stage has one."""
VISUAL_ROWS = "visual_rows"
NUM_VISUAL = "num_visual"
LENGTH = "length"
PROMPT_EMBEDS = "prompt_embeds"
PROMPT_IS_VISUAL = "prompt_is_visual"
PROMPT_LENGTH = "prompt_length"
KEPT_HIDDEN = "kept_hidden_states"
KEPT_POSITIONS = "kept_position_ids"
KEPT_VISUAL_ROWS = "kept_visual_rows"
"""Row of each kept token in the reduced sequence: ``VISUAL_ROWS`` of the next stage."""
VISUAL_IMAGES = "visual_images"
"""Image of each visual token, where each image has a share of the kept tokens."""
KEPT_VISUAL_IMAGES = "kept_visual_images"
"""Image of each kept token: ``VISUAL_IMAGES`` of the next stage."""
KEPT_DEEPSTACK = "kept_deepstack_embeds."
"""DeepStack planes of layers after the stage, without the dropped tokens."""
KEPT_INDICES = "kept_indices"
SCORES = "scores"
UNSETTLED = "unsettled"
SELECT_RESULTS = (KEPT_INDICES, SCORES, UNSETTLED)
"""Outputs that the host reads; the other outputs stay on the device."""

# Head.
LAST_ROW = "last_row"
LOGITS = "logits"
TOP_LOGITS = "top_logits"
TOP_IDS = "top_ids"

MAX_CANDIDATES = 64
"""Largest T, the number of likeliest tokens: room for top-k sampling and for ties in float16."""
WORD, END = 1, 2
"""Marks of the tokens in CLIP's texts: a word, and the end, which stands for the whole text; 0 is the start or padding."""


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
    hidden = EMBEDS if layers.start == 0 else HIDDEN
    inputs = (
        TensorSpec(name=hidden, dtype=dtype, shape=hidden_shape),
        TensorSpec(name=POSITIONS, dtype="int32", shape=(position_axes, "S")),
        _one(PAST_LENGTH),
        *(TensorSpec(name=f"{PAST_PREFIX}{part}", dtype=kv_dtype, shape=past_shape) for part in parts),
        *_planes(DEEPSTACK, layers[: max(num_deepstack - layers.start, 0)], hidden_shape, dtype),
    )
    outputs = (
        TensorSpec(name=HIDDEN_OUT, dtype=dtype, shape=hidden_shape),
        *(TensorSpec(name=f"{PRESENT_PREFIX}{part}", dtype=kv_dtype, shape=new_shape) for part in parts),
    )
    if with_previous:
        outputs = (*outputs, TensorSpec(name=PREVIOUS, dtype=dtype, shape=hidden_shape))
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
    planes: range = range(0),
) -> GraphTensors:
    """Return the tensors of a select graph that keeps ``num_keep`` visual tokens.

    ``planes`` are the layers after the stage to whose outputs DeepStack adds a plane.
    """
    width = dimensions.hidden_size
    inputs = [
        TensorSpec(name=HIDDEN, dtype=dtype, shape=(1, "S", width)),
        TensorSpec(name=POSITIONS, dtype="int32", shape=(position_axes, "S")),
        TensorSpec(name=VISUAL_ROWS, dtype="int32", shape=("N",)),
        _one(NUM_VISUAL),
        _one(LENGTH),
    ]
    if with_previous:
        inputs.append(TensorSpec(name=PREVIOUS, dtype=dtype, shape=(1, "S", width)))
    if with_prompt:
        inputs.append(TensorSpec(name=PROMPT_EMBEDS, dtype=dtype, shape=(1, "F", width)))
        inputs += [TensorSpec(name=PROMPT_IS_VISUAL, dtype="int32", shape=("F",)), _one(PROMPT_LENGTH)]
    if with_saliency:
        inputs.append(TensorSpec(name=SALIENCY, dtype="float32", shape=("N",)))
    kept_images = []
    if with_images:
        inputs.append(TensorSpec(name=VISUAL_IMAGES, dtype="int32", shape=("N",)))
        kept_images.append(TensorSpec(name=KEPT_VISUAL_IMAGES, dtype="int32", shape=(num_keep,)))
    inputs += _planes(DEEPSTACK, planes, (1, "S", width), dtype)
    outputs = (
        TensorSpec(name=KEPT_HIDDEN, dtype=dtype, shape=(1, "R", width)),
        TensorSpec(name=KEPT_POSITIONS, dtype="int32", shape=(position_axes, "R")),
        TensorSpec(name=KEPT_VISUAL_ROWS, dtype="int32", shape=(num_keep,)),
        TensorSpec(name=KEPT_INDICES, dtype="int32", shape=(num_keep,)),
        TensorSpec(name=SCORES, dtype="float32", shape=("N",)),
        _one(UNSETTLED),
        *kept_images,
        *_planes(KEPT_DEEPSTACK, planes, (1, "R", width), dtype),
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
        TensorSpec(name=PROBE_HIDDEN, dtype=dtype, shape=(1, "PS", dimensions.hidden_size)),
        TensorSpec(name=PROBE_POSITIONS, dtype="int32", shape=(position_axes, "PS")),
        TensorSpec(name=PROBE_VISUAL_ROWS, dtype="int32", shape=("PN",)),
        TensorSpec(name=PROBE_ROWS, dtype="int32", shape=("PR",)),
        _one(PROBE_LENGTH),
    )
    output = TensorSpec(name=PROBE_OUTPUT, dtype="float32", shape=("PR", dimensions.hidden_size))
    state = _probe_state("PR", "PN", dimensions, PROBE_RESULTS[1:], with_keys=with_keys, with_mlp=with_mlp)
    return GraphTensors(inputs, (output, *state))


def saliency_tensors(
    *, dimensions: Dimensions, dtype: DType, position_axes: int, with_keys: bool, with_mlp: bool
) -> GraphTensors:
    """Return the tensors of a probe's backward half."""
    state = (GRADIENT_STATE, GRADIENT_ATTENTION, GRADIENT_KEYS)
    inputs = (
        TensorSpec(name=GRADIENT_HIDDEN, dtype=dtype, shape=(1, "GS", dimensions.hidden_size)),
        TensorSpec(name=GRADIENT_POSITIONS, dtype="int32", shape=(position_axes, "GS")),
        TensorSpec(name=GRADIENT_VISUAL_ROWS, dtype="int32", shape=("GN",)),
        _one(GRADIENT_NUM_VISUAL),
        TensorSpec(name=GRADIENT, dtype="float32", shape=("GR", dimensions.hidden_size)),
        *_probe_state("GR", "GN", dimensions, state, with_keys=with_keys, with_mlp=with_mlp),
    )
    return GraphTensors(inputs, (TensorSpec(name=SALIENCY_SCORES, dtype="float32", shape=("GN",)),))


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
    count = num_candidates(dimensions)
    rows, top = ("L", ("L", count)) if is_shared else (1, (count,))
    inputs = (
        TensorSpec(name=HIDDEN, dtype=dtype, shape=(1, "S", dimensions.hidden_size)),
        TensorSpec(name=LAST_ROW, dtype="int32", shape=(rows,)),
    )
    outputs = (
        TensorSpec(name=LOGITS, dtype="float32", shape=(rows, dimensions.vocab_size)),
        TensorSpec(name=TOP_LOGITS, dtype="float32", shape=top),
        TensorSpec(name=TOP_IDS, dtype="int32", shape=top),
    )
    return GraphTensors(inputs, outputs)


def gradient_tensors(*, dimensions: Dimensions, candidates_dtype: DType | None = None) -> GraphTensors:
    """Return the tensors of the head's gradient; ``candidates_dtype`` is that of the candidates' rows, if they are given."""
    width = dimensions.hidden_size
    inputs = [TensorSpec(name=PROBE_OUTPUT, dtype="float32", shape=("GR", width))]
    if candidates_dtype is not None:
        count = num_candidates(dimensions)
        inputs += [
            TensorSpec(name=CANDIDATE_LOGITS, dtype="float32", shape=("GR", count)),
            TensorSpec(name=CANDIDATE_ROWS, dtype=candidates_dtype, shape=("GR", count, width)),
        ]
    output = TensorSpec(name=OUTPUT_GRADIENT, dtype="float32", shape=("GR", width))
    return GraphTensors(tuple(inputs), (output,))


def num_candidates(dimensions: Dimensions) -> int:
    """Return T, the number of most likely tokens that the head returns for a row."""
    return min(MAX_CANDIDATES, dimensions.vocab_size)


def reads_candidates(manifest: Manifest) -> bool:
    """Return whether the head's gradient reads rows of candidates, as that of a quantized head."""
    gradient = gradient_graph(manifest)
    return gradient is not None and CANDIDATE_ROWS in gradient.input_names


def check_tensors(manifest: Manifest, *, where: str) -> None:
    """Raise ManifestError unless every graph has the inputs and outputs that the runtime will bind.

    Graphs before the decoder differ by model family, so only their profiles and the decoder's tokens are checked.
    """
    dimensions, dtype, axes = manifest.dimensions, manifest.dtype, manifest.position_axes
    _check_tokens(manifest, where=where)
    for index, spec in enumerate(manifest.ranges):
        start = spec.first_layer or 0
        layers = range(start, start + spec.num_layers)
        needed = index < len(manifest.selects) and PREVIOUS in manifest.selects[index].input_names
        expected = range_tensors(
            layers,
            dimensions=dimensions,
            dtype=dtype,
            kv_dtype=manifest.kv_dtype,
            position_axes=axes,
            num_deepstack=manifest.num_deepstack,
            with_previous=needed,
        )
        _compare(spec, _with_probe(expected, spec, manifest), where=where)
    for index, (spec, stage) in enumerate(zip(manifest.selects, manifest.schedule.stages)):
        expected = select_tensors(
            stage.keep,
            dimensions=dimensions,
            dtype=dtype,
            position_axes=axes,
            with_previous=PREVIOUS in spec.input_names,
            with_prompt=PROMPT_EMBEDS in spec.input_names,
            with_saliency=probe_graphs(manifest, index) is not None,
            with_images=manifest.schedule.budget == "image",
            planes=range(stage.layer, manifest.num_deepstack),
        )
        _compare(spec, expected, where=where)
    head = manifest.graph("head")
    expected = head_tensors(dimensions=dimensions, dtype=dtype, is_shared=is_shared(head))
    if head.pieces:
        expected = joined(expected, gradient_tensors(dimensions=dimensions))
    _compare(head, expected, where=where)
    for spec in manifest.graphs:
        if spec.role == "probe":
            _compare(spec, _probe_tensors(spec, manifest), where=where)
    if gradient_graph(manifest) is None and any(SALIENCY in spec.input_names for spec in manifest.selects):
        raise ManifestError(
            f"{where}: expected a graph with the gradient of the head for the probes, got none; export the bundle again"
        )
    if reads_candidates(manifest) and not (is_shared(head) and manifest.head_rows is not None):
        raise ManifestError(
            f"{where}: expected head_rows and a head of several rows for the gradient graph, got none; export the bundle again"
        )
    for spec in manifest.graphs:
        if not spec.profiles or not spec.outputs:
            raise ManifestError(
                f"{where}: graph {spec.name!r}: expected profiles and outputs, got {len(spec.profiles)} and"
                f" {len(spec.outputs)}; export the bundle again"
            )
        _check_pieces(spec, where=where)
        for piece in spec.split():
            _check_profiles(piece, where=where)


def _check_tokens(manifest: Manifest, *, where: str) -> None:
    """Raise ManifestError unless the graphs before the decoder output its tokens and DeepStack planes."""
    width, dtype, count = manifest.dimensions.hidden_size, manifest.dtype, manifest.num_deepstack
    for role, tokens, planes, rows in (
        ("vision", VISUAL_TOKENS, DEEPSTACK_TOKENS, "N"),
        ("reduce", REDUCED_TOKENS, REDUCED_DEEPSTACK, manifest.token_keep or 0),
    ):
        for spec in manifest.graphs:
            if spec.role != role:
                continue
            wanted = [TensorSpec(name=tokens, dtype=dtype, shape=(rows, width))]
            wanted += token_planes(planes, count, rows=rows, width=width, dtype=dtype)
            if missing := [tensor for tensor in wanted if tensor not in spec.outputs]:
                raise ManifestError(
                    f"{where}: graph {spec.name!r}, outputs: expected {_text(missing[0])}, got none; export the bundle again"
                )


def joined(*parts: GraphTensors) -> GraphTensors:
    """Return the tensors of a graph that holds several pieces."""
    return GraphTensors(
        tuple(tensor for part in parts for tensor in part.inputs),
        tuple(tensor for part in parts for tensor in part.outputs),
    )


def is_shared(head: GraphSpec) -> bool:
    """Return whether probes share the head, which then has L rows."""
    return any("L" in tensor.shape for tensor in head.inputs)


def is_probe(spec: GraphSpec) -> bool:
    """Return whether a graph, or a piece of one, belongs to a probe alone."""
    return {tensor.name for tensor in spec.outputs} <= {*PROBE_RESULTS, OUTPUT_GRADIENT, SALIENCY_SCORES}


def probe_graphs(manifest: Manifest, stage: int) -> tuple[GraphSpec, GraphSpec] | None:
    """Return the graphs of the two halves of the probe of ``stage``, often the same; None if the stage needs no probe."""
    layer = manifest.schedule.stages[stage].layer
    graphs = [spec for spec in manifest.graphs if spec.first_layer == layer]
    forward, backward = _graph_with(PROBE_OUTPUT, graphs), _graph_with(SALIENCY_SCORES, graphs)
    return None if forward is None or backward is None else (forward, backward)


def gradient_graph(manifest: Manifest) -> GraphSpec | None:
    """Return the graph that holds the head's gradient, if there is a probe."""
    return _graph_with(OUTPUT_GRADIENT, manifest.graphs)


def has_follow_ups(manifest: Manifest) -> bool:
    """Return whether the first layer range has profiles for a question that follows kept rows (--follow-ups)."""
    profiles = manifest.ranges[0].profiles
    return any(profile.sizes.get("S", 0) > 1 and profile.sizes.get("C", 0) for profile in profiles)


def _graph_with(output: str, specs: Sequence[GraphSpec]) -> GraphSpec | None:
    return next((spec for spec in specs if any(tensor.name == output for tensor in spec.outputs)), None)


def _probe_tensors(spec: GraphSpec, manifest: Manifest) -> GraphTensors:
    """Return the tensors of a graph that belongs to a probe alone."""
    if spec.name == "gradient":
        dtype = manifest.dtype if CANDIDATE_ROWS in spec.input_names else None
        return gradient_tensors(dimensions=manifest.dimensions, candidates_dtype=dtype)
    return _with_probe(GraphTensors((), ()), spec, manifest)


def goes_around_mlp(spec: GraphSpec) -> bool:
    """Return whether the gradient of the probe in ``spec`` goes around the layer's MLP: its halves are in two graphs."""
    return not {PROBE_HIDDEN, GRADIENT_HIDDEN} <= set(spec.input_names)


def _with_probe(tensors: GraphTensors, spec: GraphSpec, manifest: Manifest) -> GraphTensors:
    """Return ``tensors`` and those of the halves of a probe in ``spec``; quantized layers have the halves in two graphs."""
    names = {tensor.name for tensor in spec.tensors}
    halves = (
        (probe_tensors, {PROBE_HIDDEN, PROBE_OUTPUT}),
        (saliency_tensors, {GRADIENT_HIDDEN, SALIENCY_SCORES}),
    )
    options: Any = {
        "dimensions": manifest.dimensions,
        "dtype": manifest.dtype,
        "position_axes": manifest.position_axes,
        "with_keys": any(tensor.name in (PROBE_KEYS, GRADIENT_KEYS) for tensor in spec.tensors),
        "with_mlp": not goes_around_mlp(spec),
    }
    return joined(tensors, *(make(**options) for make, marks in halves if names & marks))


def _check_pieces(spec: GraphSpec, *, where: str) -> None:
    """Raise ManifestError unless every input, output and profile of a graph with pieces belongs to one piece."""
    if not spec.pieces:
        return
    for whole, parts in (
        (spec.input_names, [piece.inputs for piece in spec.pieces]),
        (tuple(tensor.name for tensor in spec.outputs), [piece.outputs for piece in spec.pieces]),
        (tuple(profile.name for profile in spec.profiles), [piece.profiles for piece in spec.pieces]),
    ):
        if sorted(name for part in parts for name in part) != sorted(whole):
            raise ManifestError(
                f"{where}: graph {spec.name!r}: expected each input, output and profile in one of its pieces, got others;"
                " export the bundle again"
            )


def _compare(spec: GraphSpec, expected: GraphTensors, *, where: str) -> None:
    for side, wanted, found in (
        ("inputs", expected.inputs, spec.inputs),
        ("outputs", expected.outputs, spec.outputs),
    ):
        if wanted == found:
            continue
        differing = next((pair for pair in zip(wanted, found) if pair[0] != pair[1]), None)
        texts = map(_text, differing) if differing else (f"{len(side_)} tensors" for side_ in (wanted, found))
        raise ManifestError(
            "{}: graph {!r}, {}: expected {}, got {}; export the bundle again".format(
                where, spec.name, side, *texts
            )
        )


def _check_profiles(spec: GraphSpec, *, where: str) -> None:
    symbols = {axis for tensor in spec.tensors for axis in tensor.shape if isinstance(axis, str)}
    for profile in spec.profiles:
        if missing := sorted(symbols - profile.sizes.keys()):
            raise ManifestError(
                f"{where}: graph {spec.name!r}, profile {profile.name!r}: expected a size of {missing[0]}, got none;"
                " export the bundle again"
            )
        for tensor in spec.tensors:
            sizes = [profile.sizes[axis] if isinstance(axis, str) else axis for axis in tensor.shape]
            if math.prod(sizes) * DTYPE_BYTES[tensor.dtype] > MOST_TENSOR_BYTES:
                raise ManifestError(
                    f"{where}: graph {spec.name!r}, profile {profile.name!r}: expected tensors of at most"
                    f" {MOST_TENSOR_BYTES >> 40} TiB, got {_text(tensor)}; export the bundle again"
                )


def _one(name: str) -> TensorSpec:
    return TensorSpec(name=name, dtype="int32", shape=(1,))


def _text(tensor: TensorSpec) -> str:
    return f"{tensor.name} {tensor.dtype} [{', '.join(map(str, tensor.shape))}]"


MAX_TEXT = 256
"""Default limit of a prompt in text tokens."""
# Every bucket adds a profile to every engine. Doubling sizes waste less than half of a prompt's rows.
_SMALLEST_BUCKET = 32


def text_buckets(max_text: int) -> tuple[int, ...]:
    """Return the text sizes that prompts are padded to: 32, 64, 128, … and ``max_text``."""
    sizes, size = [], _SMALLEST_BUCKET
    while size < max_text:
        sizes.append(size)
        size *= 2
    return (*sizes, max_text)


def bucket_of(num_text: int, buckets: Sequence[int]) -> int:
    """Return the first of the ascending ``buckets`` with room for ``num_text`` tokens, or ``num_text`` if there is none."""
    return next((bucket for bucket in buckets if bucket >= num_text), num_text)


def num_clip_texts(num_tokens: int, *, length: int) -> int:
    """Return M, the number of texts of ``length`` tokens, including start and end, for a question of ``num_tokens``."""
    return max(1, -(-num_tokens // (length - 2)))
