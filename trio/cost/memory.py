"""Memory of a bundle before it exists: the same parts as ``runtime/devices/memory.py`` counts from the programs of one.

weights      with those that stages repeat
KV caches    at full capacity
buffers      input and result of each layer range, 2 S D b, visual tokens, pixels, new KV rows, for which all ranges share
             one place, and the rows and logits of a decode step; not what is smaller: DeepStack's planes, positions, results
             of selections, padding of KV heads
workspace    the largest activations of a layer range, ``Dimensions.workspace_bytes``: the runtime's, with fused attention

``trio-export --target`` asks what surely fits, before TensorRT has chosen its kernels, so its workspace is ``unfused_bytes``:
it counts attention scores, in float32 and again in the model's type, and graphs outside of the layer ranges, which may need more.
Graphs run one after the other and share one workspace. Each needs the following bytes besides its inputs and results. Letters as
in ``trio_edge.trio.saliency``; I intermediate size, S rows of the largest prefill, b bytes per element:

    layer range   3 S D b + 4 S² + max(S (H + 2 G) E b + H S² (4 + b), 3 S I b)
    select        3 S D b + 8 S D + 8 N² + R V (4 + b)
    vision        6 P F b + max((F / 64) P² 2 b / A, 2 P J b) per tile of P patches, width F, MLP width J; attention over
                  a whole image is computed in A = ``num_head_blocks`` parts, over a tile in one
    clip_text     as vision, for M texts of L tokens, width Z, MLP width 4 Z
    reduce        8 N W + 12 N² if rows of width W are compared, else 5 K N
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from trio_edge.runtime.bundle.graph_io import STEP_ROWS
from trio_edge.trio.cost.flops import kv_row_bytes
from trio_edge.trio.cost.work import VISION_HEAD_SIZE, layer_matrices, layer_weights, tiles_and_patches
from trio_edge.trio.methods import stage_method, token_method

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from trio_edge.runtime.bundle.manifest import Dimensions, VisionDimensions
    from trio_edge.runtime.bundle.schedule import Schedule

_BLOCK_BYTES = 64 << 20
"""Most bytes of one block's scores. Smaller blocks save little, as other activations are as large."""
_CLIP_MLP = 4
"""MLP width of CLIP's text towers in tower widths; a tower is as wide as the space shared with images."""


class Tiles(NamedTuple):
    """The tiles that a vision tower runs on."""

    num_tiles: int
    patches: int
    hidden_size: int
    intermediate_size: int
    head_blocks: int = 1
    """A: blocks of attention heads that are computed one after the other."""


class TokenSelection(NamedTuple):
    """A selection before the decoder."""

    method: str
    num_keep: int
    """K."""
    width: int
    """W, width of the compared rows."""


class Texts(NamedTuple):
    """The texts of the longest question, as CLIP's text tower runs on them."""

    num_texts: int
    length: int
    width: int
    """Z, width of the space shared with images."""


class WeightBytes(NamedTuple):
    """Bytes of one weight, by part of a bundle."""

    layers: Sequence[float]
    """One value per decoder layer."""
    head: float
    vision: float
    select: float
    """Bytes of a weight in select graphs without a probe."""


class BundleBytes(NamedTuple):
    """Bytes that must be in memory at once, by purpose; those of weights are not rounded."""

    layers: float
    head_and_vision: float
    repeated: float
    kv_caches: int
    buffers: int
    workspace: int
    """With fused attention."""


class BundleSizes(NamedTuple):
    """The sizes that a bundle's memory follows from."""

    decoder: Dimensions
    schedule: Schedule
    """Its stages; they repeat weights."""
    ranges: Sequence[tuple[range, int]]
    """Layers and visual rows of each layer range."""
    text_rows: int
    """Rows of the longest prompt besides the visual ones."""
    new_rows: int
    """Rows for new tokens."""
    num_visual: int
    """Visual tokens outside of the decoder: of an image, and again of all images if there are several."""
    pixel_bytes: int
    """Those of an image."""
    bytes_per_cached: int
    """Bytes of an element of the KV caches."""
    element_bytes: int
    """b."""


def bundle_bytes(sizes: BundleSizes, weights: WeightBytes, *, vision_params: int) -> BundleBytes:
    """Return the memory of a bundle with KV caches at full capacity.

    ``weights`` has fewer bytes than ``element_bytes`` where a part is quantized; ``vision_params`` counts the parameters of
    the vision tower and the projector.
    """
    decoder, size = sizes.decoder, sizes.element_bytes
    row_bytes = kv_row_bytes(decoder, bytes_per_cached=sizes.bytes_per_cached)
    row = stage_method(sizes.schedule.method)
    # A probe shares the weights of the head and of its layer, but reads keys, values and output projection of a quantized
    # layer again (``export/graphs/probe.py``).
    queries, keys, values, output, *_ = (inputs * outputs for inputs, outputs in layer_matrices(decoder))
    repeated = {"queries and keys": queries + keys, "keys": keys, "nothing": 0}[row.repeats]
    if row.has_probe and weights.layers[-1] < size:
        repeated += keys + values + output
    probed = weights.layers[-1] if row.has_probe else weights.select
    rows_of = [(layers, rows + sizes.text_rows) for layers, rows in sizes.ranges]
    step_rows = min(STEP_ROWS[-1], sizes.new_rows)
    hidden_rows = sizes.num_visual + 2 * sum(rows for _, rows in rows_of) + step_rows * (1 + len(rows_of))
    cached_rows = step_rows * decoder.num_layers + max(
        decoder.num_cached(layers) * rows for layers, rows in rows_of
    )
    logits = 4 * (1 + step_rows) * decoder.vocab_size
    return BundleBytes(
        layers=sum(
            layer_weights(decoder, layer=layer) * per_weight
            for layer, per_weight in enumerate(weights.layers)
        ),
        head_and_vision=decoder.vocab_size * decoder.hidden_size * weights.head
        + vision_params * weights.vision,
        repeated=len(sizes.schedule.stages) * repeated * probed,
        kv_caches=row_bytes
        * sum(decoder.num_cached(layers) * (rows + sizes.new_rows) for layers, rows in rows_of)
        + _state_bytes(decoder, element_bytes=size),
        buffers=sizes.pixel_bytes
        + hidden_rows * decoder.hidden_size * size
        + cached_rows * row_bytes
        + logits,
        workspace=max(decoder.workspace_bytes(rows, element_bytes=size) for _, rows in rows_of),
    )


def _state_bytes(decoder: Dimensions, *, element_bytes: int) -> int:
    """Return the bytes of the states of layers with linear attention, the old ones and the new ones."""
    if (linear := decoder.linear) is None:
        return 0
    return 2 * len(linear.layers) * linear.state_bytes(element_bytes=element_bytes)


def unfused_bytes(sizes: BundleSizes, tiles: Tiles, *, before: int) -> int:
    """Return the workspace of the largest graph without fused attention.

    ``tiles`` are those of the largest image, ``before`` is ``scratch_before``, or 0 if nothing is between vision and decoder.
    """
    decoder, size = sizes.decoder, sizes.element_bytes
    probe = sizes.schedule.num_probe_rows * decoder.vocab_size * (4 + size)
    found = [before, _vision_bytes(tiles, size)]
    for index, (_, visual) in enumerate(sizes.ranges):
        rows = visual + sizes.text_rows
        scores = decoder.num_heads * rows**2 * (4 + size)
        layers = decoder.workspace_bytes(rows, element_bytes=size, score_bytes=scores)
        found.append(4 * rows**2 + layers)
        if index < len(sizes.ranges) - 1:  # the stage before the next range
            found.append(rows * decoder.hidden_size * (3 * size + 8) + 8 * visual**2 + probe)
    return max(found)


def layers_and_rows(schedule: Schedule, *, num_layers: int, entering: int) -> tuple[tuple[range, int], ...]:
    """Return the layers and the visual rows of every layer range; ``entering`` are those of the first one."""
    starts = [0, *(stage.layer for stage in schedule.stages), num_layers]
    # If there are fewer tokens than a stage keeps, it keeps all of them.
    rows = [entering, *(min(stage.keep, entering) for stage in schedule.stages)]
    return tuple((range(start, stop), count) for start, stop, count in zip(starts, starts[1:], rows))


def pixel_bytes_of(processing: Mapping[str, Any], sizes: Mapping[str, int]) -> int:
    """Return the bytes of an image's pixels, float32, by its processing's constants and ``sizes`` of a vision profile."""
    if "P" in sizes:
        return (
            4 * sizes["P"] * 6 * int(processing["patch_size"]) ** 2
        )  # of two frames, equal ones in an image
    return 4 * sizes["B"] * 3 * int(processing["tile_size"]) ** 2


def tiles_of(tower: VisionDimensions, sizes: Mapping[str, int]) -> Tiles:
    """Return the tiles for ``sizes`` of a vision profile."""
    num_tiles, patches = tiles_and_patches(tower, sizes)
    is_whole = tower.patches_per_tile is None
    blocks = num_head_blocks(tower.hidden_size // VISION_HEAD_SIZE, patches) if is_whole else 1
    return Tiles(num_tiles, patches, tower.hidden_size, tower.intermediate_size, blocks)


def num_head_blocks(num_heads: int, num_patches: int) -> int:
    """Return the number of equal blocks of heads for attention over a whole image.

    It is the smallest one whose blocks have at most 64 MiB of float32 scores, or one block per head. Heads are divided
    and not rows, because their number does not depend on the image.
    """
    for blocks in range(1, num_heads):
        block_heads, others = divmod(num_heads, blocks)
        if others == 0 and block_heads * 4 * num_patches**2 <= _BLOCK_BYTES:
            return blocks
    return max(1, num_heads)


def scratch_before(
    selection: TokenSelection, texts: Texts | None, *, num_visual: int, element_bytes: int
) -> int:
    """Return the bytes of the larger one of the graphs ``reduce`` and ``clip_text``; ``texts`` are None without the latter."""
    reduced = 8 * num_visual * selection.width + 12 * num_visual**2
    if token_method(selection.method).compares is None:
        reduced = 5 * selection.num_keep * num_visual
    if texts is None:
        return reduced
    tower = Tiles(texts.num_texts, texts.length, texts.width, _CLIP_MLP * texts.width)
    return max(reduced, _vision_bytes(tower, element_bytes))


def _vision_bytes(tiles: Tiles, size: int) -> int:
    patches, width = tiles.patches, tiles.hidden_size
    scores = width // VISION_HEAD_SIZE // tiles.head_blocks * patches**2 * 2 * size
    mlp = 2 * patches * tiles.intermediate_size * size
    return tiles.num_tiles * (6 * patches * width * size + max(scores, mlp))
