"""Inputs and outputs of the decoder's graphs: what the exporter makes, and what the runtime finds before it uses them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from trio_edge.runtime.bundle.errors import ManifestError
from trio_edge.runtime.bundle.manifest import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio_edge.runtime.bundle.manifest import Dimensions, DType, GraphSpec, Manifest

# Names of the tensors. The exporter writes them into the graphs, the runtime binds by them.

# Graphs before the decoder.
VISUAL_TOKENS = "visual_tokens"
KEPT_PATCHES = "kept_patches"
KEPT_TOKENS = "kept_tokens"
"""Output of a graph that drops tokens: patches of each tile, or visual tokens of the image, that it kept."""
REDUCED_TOKENS = "reduced_tokens"
CLIP_TEXT: Literal["clip_text"] = "clip_text"
"""Name and role of the text tower's graph."""

# Decoder layer ranges.
EMBEDS = "inputs_embeds"
"""Input of the range that starts at layer 0; the others read ``HIDDEN``."""
HIDDEN = "hidden_states"
POSITIONS = "position_ids"
PAST_LENGTH = "past_length"
PAST_PREFIX = "past_key_values."
HIDDEN_OUT = "hidden_states_out"
PRESENT_PREFIX = "present."
PREVIOUS = "previous_hidden_states"
"""Hidden states that entered the layer before a stage's: output of a layer range, input of the select graph after it."""

# Select graphs.
VISUAL_ROWS = "visual_rows"
NUM_VISUAL = "num_visual"
LENGTH = "length"
PROMPT_EMBEDS = "prompt_embeds"
PROMPT_NUM_VISUAL = "prompt_num_visual"
PROMPT_LENGTH = "prompt_length"
KEPT_HIDDEN = "kept_hidden_states"
KEPT_POSITIONS = "kept_position_ids"
KEPT_INDICES = "kept_indices"
SCORES = "scores"
UNSETTLED = "unsettled"
SELECT_RESULTS = (KEPT_INDICES, SCORES, UNSETTLED)
"""Outputs that the host reads; the others stay on the device."""

# Head.
LAST_ROW = "last_row"
LOGITS = "logits"
TOP_LOGITS = "top_logits"
TOP_IDS = "top_ids"

MAX_CANDIDATES = 64
"""T where the vocabulary is larger: room for top-k sampling, and for the ties that float16 makes."""
WORD, END = 1, 2
"""Marks of the tokens of CLIP's texts: a word, and the end, which stands for the whole text; 0 is the start, or padding."""


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
    with_previous: bool = False,
) -> GraphTensors:
    """Return the tensors of decoder layers; the range that starts at layer 0 reads embeddings."""
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
) -> GraphTensors:
    """Return the tensors of a select graph that keeps ``num_keep`` visual tokens."""
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
        inputs += [_one(PROMPT_NUM_VISUAL), _one(PROMPT_LENGTH)]
    outputs = (
        TensorSpec(name=KEPT_HIDDEN, dtype=dtype, shape=(1, "R", width)),
        TensorSpec(name=KEPT_POSITIONS, dtype="int32", shape=(position_axes, "R")),
        TensorSpec(name=KEPT_INDICES, dtype="int32", shape=(num_keep,)),
        TensorSpec(name=SCORES, dtype="float32", shape=("N",)),
        _one(UNSETTLED),
    )
    return GraphTensors(tuple(inputs), outputs)


def head_tensors(*, dimensions: Dimensions, dtype: DType) -> GraphTensors:
    """Return the tensors of the head."""
    num_candidates = min(MAX_CANDIDATES, dimensions.vocab_size)
    inputs = (
        TensorSpec(name=HIDDEN, dtype=dtype, shape=(1, "S", dimensions.hidden_size)),
        _one(LAST_ROW),
    )
    outputs = (
        TensorSpec(name=LOGITS, dtype="float32", shape=(1, dimensions.vocab_size)),
        TensorSpec(name=TOP_LOGITS, dtype="float32", shape=(num_candidates,)),
        TensorSpec(name=TOP_IDS, dtype="int32", shape=(num_candidates,)),
    )
    return GraphTensors(inputs, outputs)


def check_tensors(manifest: Manifest, *, where: str) -> None:
    """Raise ManifestError unless every graph reads and writes what the runtime will bind.

    Graphs before the decoder differ by model family; of those only the profiles are looked at.
    """
    dimensions, dtype, axes = manifest.dimensions, manifest.dtype, manifest.position_axes
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
            with_previous=needed,
        )
        _compare(spec, expected, where=where)
    for spec, stage in zip(manifest.selects, manifest.schedule.stages):
        expected = select_tensors(
            stage.keep,
            dimensions=dimensions,
            dtype=dtype,
            position_axes=axes,
            with_previous=PREVIOUS in spec.input_names,
            with_prompt=PROMPT_EMBEDS in spec.input_names,
        )
        _compare(spec, expected, where=where)
    _compare(manifest.graph("head"), head_tensors(dimensions=dimensions, dtype=dtype), where=where)
    for spec in manifest.graphs:
        _check_profiles(spec, where=where)


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
    if not spec.profiles or not spec.outputs:
        raise ManifestError(
            f"{where}: graph {spec.name!r}: expected profiles and outputs, got {len(spec.profiles)} and"
            f" {len(spec.outputs)}; export the bundle again"
        )
    for profile in spec.profiles:
        if missing := sorted(symbols - profile.sizes.keys()):
            raise ManifestError(
                f"{where}: graph {spec.name!r}, profile {profile.name!r}: expected a size of {missing[0]}, got none;"
                " export the bundle again"
            )
        if negative := sorted(name for name, size in profile.sizes.items() if size < 0):
            raise ManifestError(
                f"{where}: graph {spec.name!r}, profile {profile.name!r}: expected sizes of 0 or more, got"
                f" {profile.sizes[negative[0]]} for {negative[0]}; export the bundle again"
            )


def _one(name: str) -> TensorSpec:
    return TensorSpec(name=name, dtype="int32", shape=(1,))


def _text(tensor: TensorSpec) -> str:
    return f"{tensor.name} {tensor.dtype} [{', '.join(map(str, tensor.shape))}]"


# Text sizes that prompts are padded to


MAX_TEXT = 256
"""Largest prompt in text tokens, unless the user chooses another."""
# Far above any model's positions: a mistyped number fails here, not when memory is full.
MOST_TOKENS = 1 << 20
"""Largest prompt, and longest answer, that can be chosen."""
# Every bucket is one more profile of every engine; doublings waste less than half of a prompt's rows.
_SMALLEST_BUCKET = 32


def text_buckets(max_text: int) -> tuple[int, ...]:
    """Return the text sizes that prompts are padded to: doublings from 32, and ``max_text`` itself."""
    sizes, size = [], _SMALLEST_BUCKET
    while size < max_text:
        sizes.append(size)
        size *= 2
    return (*sizes, max_text)


def bucket_of(num_text: int, buckets: Sequence[int]) -> int:
    """Return the first of the ascending ``buckets`` with room for ``num_text`` tokens; a longer prompt is one of its own."""
    return next((bucket for bucket in buckets if bucket >= num_text), num_text)


def num_clip_texts(num_tokens: int, *, length: int) -> int:
    """Return M, the texts of ``length`` tokens, start and end among them, that a question of ``num_tokens`` needs."""
    return max(1, -(-num_tokens // (length - 2)))
