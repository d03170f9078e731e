"""Bytes of a bundle's largest scratch buffer: what its graphs, which run one after the other, need beside inputs and results.

    layer range   hidden states, new KV rows, and attention or the MLP, whichever is larger
    select        rows for the probe's gradients, N N similarities, logits of the probe rows
    vision        for each tile hidden states, and attention or the MLP
    head          rows and logits

Attention scores are taken to be in memory, in float32 and once more in half precision, in vision both in half precision: the
formulas of ``trio-export --target``, to which a test holds them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trio_edge.runtime.prediction.shapes import tiles_and_patches

if TYPE_CHECKING:
    from trio_edge.runtime.prediction.answer import Setting

_VISION_HEAD_SIZE = 64


def largest_activations(setting: Setting) -> int:
    """Return the bytes of the graph that needs most, at the largest prefill."""
    decoder, visual, text = setting.model.decoder, setting.visual_rows, setting.text_rows
    ranges = (
        _range_bytes(setting, layers=layers, rows=rows + text) for layers, rows in zip(setting.layers, visual)
    )
    selects = (_select_bytes(setting, num_visual=rows) for rows in visual[:-1])
    head = 2 * (visual[-1] + text) * decoder.hidden_size + 4 * decoder.vocab_size
    return max(*ranges, *selects, head, _vision_bytes(setting))


def _range_bytes(setting: Setting, *, layers: int, rows: int) -> int:
    decoder = setting.model.decoder
    heads = decoder.num_heads + 2 * decoder.num_kv_heads
    attention = 2 * rows * heads * decoder.head_size + 6 * decoder.num_heads * rows**2
    hidden = 6 * rows * decoder.hidden_size + 4 * rows**2
    new_rows = layers * rows * setting.cache_row_bytes
    return hidden + new_rows + max(attention, 6 * rows * decoder.intermediate_size)


def _select_bytes(setting: Setting, *, num_visual: int) -> int:
    decoder, rows = setting.model.decoder, num_visual + setting.text_rows
    probe = 6 * setting.schedule.num_probe_rows * decoder.vocab_size
    return 14 * rows * decoder.hidden_size + 8 * num_visual**2 + probe


def _vision_bytes(setting: Setting) -> int:
    tower = setting.model.vision
    if tower is None:
        return 0
    tiles, patches = tiles_and_patches(tower, setting.sizes)
    scores = 4 * (tower.hidden_size // _VISION_HEAD_SIZE) * patches**2
    mlp = 4 * patches * tower.intermediate_size
    return tiles * (12 * patches * tower.hidden_size + max(scores, mlp))
