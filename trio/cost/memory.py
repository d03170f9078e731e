"""Bytes of the largest scratch buffer: what graphs, which run one after the other, need beside inputs and results.

With the letters of ``trio_edge.trio.saliency``, I the intermediate size, S a graph's largest prefill and b bytes per element:

    layer range   3 S D b + new KV rows + 4 S² + max(S (H + 2 G) E b + H S² (4 + b), 3 S I b)
    select        3 S D b + 8 S D + 8 N² + R V (4 + b)
    vision        6 P F b + max((F / 64) P² 2 b, 2 P J b) per tile of P patches, width F, MLP width J
    head          S D b + 4 V
    clip_text     as vision, of M texts of L tokens, width Z, MLP width 4 Z
    reduce        8 N W + 12 N², width W of what is compared; "uniform" 5 K N

Attention scores are counted in float32 and once more in the model's type: TensorRT may fuse them away.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio_edge.runtime.bundle.manifest import Dimensions, TokenMethod

_VISION_HEAD_SIZE = 64
_CLIP_MLP = 4
"""Width of the MLP of CLIP's text towers, in widths of the tower; which are those of the space shared with pictures."""


class Tiles(NamedTuple):
    """What a vision tower runs on."""

    num_tiles: int
    patches: int
    """Of each."""
    hidden_size: int
    intermediate_size: int


class TokenSelection(NamedTuple):
    """What a selection before the decoder does."""

    method: TokenMethod
    num_keep: int
    """K."""
    width: int
    """W, of the rows that it compares: visual tokens, or features for "scope"."""


class Texts(NamedTuple):
    """What CLIP's text tower runs on, for the longest question."""

    num_texts: int
    length: int
    width: int
    """Z, of the space shared with pictures."""


def largest_activations(
    decoder: Dimensions,
    *,
    layers_and_rows: Sequence[tuple[int, int]],
    text_rows: int,
    probe_rows: int,
    cache_row_bytes: int,
    tiles: Tiles | None,
    before: int,
    element_bytes: int,
) -> int:
    """Return the bytes of the graph that needs most, at the largest prefill.

    Args:
        decoder: Its sizes.
        layers_and_rows: Layers and visual rows of each range; a selection is in front of each but the first.
        text_rows: Beside the visual ones.
        probe_rows: R of a selection.
        cache_row_bytes: Of one row of one layer's keys and values.
        tiles: Of the largest picture; None where vision is not known.
        before: Bytes of ``scratch_before``; 0 where nothing is between vision and decoder.
        element_bytes: b.
    """
    visual = [rows for _, rows in layers_and_rows]
    ranges = (
        _range_bytes(decoder, rows + text_rows, element_bytes) + layers * (rows + text_rows) * cache_row_bytes
        for layers, rows in layers_and_rows
    )
    selects = (
        _select_bytes(decoder, rows, rows + text_rows, probe_rows, element_bytes) for rows in visual[:-1]
    )
    head = (visual[-1] + text_rows) * decoder.hidden_size * element_bytes + 4 * decoder.vocab_size
    vision = 0 if tiles is None else _vision_bytes(tiles, element_bytes)
    return max(*ranges, *selects, head, vision, before)


def scratch_before(
    selection: TokenSelection, texts: Texts | None, *, num_visual: int, element_bytes: int
) -> int:
    """Return the bytes of the graph between vision and decoder that needs most.

    Args:
        selection: What ``reduce`` does.
        texts: What ``clip_text`` runs on, where there is one.
        num_visual: N, of the largest picture.
        element_bytes: b.
    """
    compared = 8 * num_visual * selection.width + 12 * num_visual**2
    reduced = 5 * selection.num_keep * num_visual if selection.method == "uniform" else compared
    if texts is None:
        return reduced
    tower = Tiles(texts.num_texts, texts.length, texts.width, _CLIP_MLP * texts.width)
    return max(reduced, _vision_bytes(tower, element_bytes))


def _range_bytes(decoder: Dimensions, rows: int, size: int) -> int:
    heads = decoder.num_heads + 2 * decoder.num_kv_heads
    attention = rows * heads * decoder.head_size * size + decoder.num_heads * rows**2 * (4 + size)
    mlp = 3 * rows * decoder.intermediate_size * size
    return 3 * rows * decoder.hidden_size * size + 4 * rows**2 + max(attention, mlp)


def _select_bytes(decoder: Dimensions, num_visual: int, rows: int, probe_rows: int, size: int) -> int:
    probe = probe_rows * decoder.vocab_size * (4 + size)
    return rows * decoder.hidden_size * (3 * size + 8) + 8 * num_visual**2 + probe


def _vision_bytes(tiles: Tiles, size: int) -> int:
    patches, width = tiles.patches, tiles.hidden_size
    scores = width // _VISION_HEAD_SIZE * patches**2 * 2 * size
    mlp = 2 * patches * tiles.intermediate_size * size
    return tiles.num_tiles * (6 * patches * width * size + max(scores, mlp))
