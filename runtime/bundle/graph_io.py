"""Inputs and outputs of the decoder's graphs: what the exporter makes, and what the runtime finds before it uses them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from trio_edge.runtime.bundle.errors import ManifestError
from trio_edge.runtime.bundle.manifest import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio_edge.runtime.bundle.manifest import Dimensions, DType, GraphSpec, Manifest

PREVIOUS = "previous_hidden_states"
"""What entered the layer before a stage's; output of a layer range, input of the select graph behind it."""
MAX_CANDIDATES = 64
"""T where the vocabulary is larger: room for top-k sampling, and for the ties that float16 makes."""
WORD, END = 1, 2
"""Marks of the tokens of CLIP's texts: a word, and the end, which stands for the whole text; 0 is the start, or padding."""
CLIP_TEXT: Literal["clip_text"] = "clip_text"
"""Name and role of the text tower's graph."""

_INT32_PARTS = ("num_visual", "length")
_PROMPT_PARTS = ("prompt_num_visual", "prompt_length")


class GraphTensors(NamedTuple):
    """What a graph reads and writes, in order."""

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
    hidden = "inputs_embeds" if layers.start == 0 else "hidden_states"
    inputs = (
        TensorSpec(name=hidden, dtype=dtype, shape=hidden_shape),
        TensorSpec(name="position_ids", dtype="int32", shape=(position_axes, "S")),
        _one("past_length"),
        *(TensorSpec(name=f"past_key_values.{part}", dtype=kv_dtype, shape=past_shape) for part in parts),
    )
    outputs = (
        TensorSpec(name="hidden_states_out", dtype=dtype, shape=hidden_shape),
        *(TensorSpec(name=f"present.{part}", dtype=kv_dtype, shape=new_shape) for part in parts),
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
        TensorSpec(name="hidden_states", dtype=dtype, shape=(1, "S", width)),
        TensorSpec(name="position_ids", dtype="int32", shape=(position_axes, "S")),
        TensorSpec(name="visual_rows", dtype="int32", shape=("N",)),
        *map(_one, _INT32_PARTS),
    ]
    if with_previous:
        inputs.append(TensorSpec(name=PREVIOUS, dtype=dtype, shape=(1, "S", width)))
    if with_prompt:
        inputs.append(TensorSpec(name="prompt_embeds", dtype=dtype, shape=(1, "F", width)))
        inputs += map(_one, _PROMPT_PARTS)
    outputs = (
        TensorSpec(name="kept_hidden_states", dtype=dtype, shape=(1, "R", width)),
        TensorSpec(name="kept_position_ids", dtype="int32", shape=(position_axes, "R")),
        TensorSpec(name="kept_indices", dtype="int32", shape=(num_keep,)),
        TensorSpec(name="scores", dtype="float32", shape=("N",)),
        _one("unsettled"),
    )
    return GraphTensors(tuple(inputs), outputs)


def head_tensors(*, dimensions: Dimensions, dtype: DType) -> GraphTensors:
    """Return the tensors of the head."""
    num_candidates = min(MAX_CANDIDATES, dimensions.vocab_size)
    inputs = (
        TensorSpec(name="hidden_states", dtype=dtype, shape=(1, "S", dimensions.hidden_size)),
        _one("last_row"),
    )
    outputs = (
        TensorSpec(name="logits", dtype="float32", shape=(1, dimensions.vocab_size)),
        TensorSpec(name="top_logits", dtype="float32", shape=(num_candidates,)),
        TensorSpec(name="top_ids", dtype="int32", shape=(num_candidates,)),
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
            with_prompt="prompt_embeds" in spec.input_names,
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
    symbols = {
        axis for tensor in (*spec.inputs, *spec.outputs) for axis in tensor.shape if isinstance(axis, str)
    }
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


# The text sizes that prompts are padded to: an exporter's defaults, and which of them a prompt runs at.


MAX_TEXT = 256
"""Largest prompt in text tokens, where none is wished."""
MOST_TOKENS = 1 << 20
"""Largest prompt, and longest answer, that can be wished."""
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
