"""``prefix``, ``segment_i`` and ``suffix``: decoder layers [first, last), for prefill and decode alike.

| I/O tensor                     | shape        | dtype | filled or read by                                          |
|--------------------------------|--------------|-------|------------------------------------------------------------|
| in  hidden_states              | [1, S, D]    | model | ``inputs_embeds`` for the prefix; output of select or range |
| in  position_ids               | [1, S]       | int32 | runtime, or the select graph's ``kept_position_ids``        |
| in  past_length                | [1]          | int32 | runtime: valid rows of the past buffers (0 in prefill)      |
| in  past_key_values.{i}.key    | [1, G, C, E] | model | runtime's KV buffers; i is the model's layer number         |
| in  past_key_values.{i}.value  | [1, G, C, E] | model |                                                            |
| in  deepstack_embeds.{i}       | [1, S, D]    | model | runtime, or a select graph; with DeepStack only             |
| out hidden_states_out          | [1, S, D]    | model | next graph                                                  |
| out present.{i}.key            | [1, G, S, E] | model | runtime: new rows only, written into the buffers            |
| out present.{i}.value          | [1, G, S, E] | model |                                                            |

Prefill runs with C = 0 and padding on the right; decode with S = 1. ``export/quantize/cache.py`` makes keys and values int8.

With DeepStack (Qwen3-VL) features of inner vision layers are added to the outputs of the first decoder layers, one plane of
rows per layer, 0 at text and in decode. ``assembly/copies.py`` adds them between the layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from trio_edge.export.graphs.attention import RotaryTables, causal_mask

if TYPE_CHECKING:
    from collections.abc import Sequence


class DecoderRange(nn.Module):
    """Consecutive Hugging Face decoder layers with a flat KV interface."""

    def __init__(self, layers: Sequence[nn.Module], rotary: RotaryTables) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.rotary = rotary

    def forward(
        self, hidden_states: Tensor, position_ids: Tensor, past_length: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the hidden states after the layers, then key and value of the new rows for each layer.

        ``past`` are key and value buffers of each layer.
        """
        cos, sin = self.rotary(position_ids)
        tables = cos.to(hidden_states.dtype), sin.to(hidden_states.dtype)
        mask = causal_mask(hidden_states.shape[1], past[0].shape[2], past_length)
        present: list[Tensor] = []
        for layer, layer_past in zip(self.layers, zip(past[::2], past[1::2])):
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                position_embeddings=tables,
                past=layer_past,
                present=present,
            )
        return hidden_states, *present
