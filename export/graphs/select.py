"""``select_i``: keeps K visual tokens for layer l, and returns the sequence without the others.

| I/O tensor            | shape     | dtype   | filled or read by                                                    |
|-----------------------|-----------|---------|----------------------------------------------------------------------|
| in  hidden_states     | [1, S, D] | model   | the layer range before; text and visual rows, then padding           |
| in  position_ids      | [A, S]    | int32   | what that range used; A = 1, or 3 for M-RoPE                         |
| in  visual_rows       | [N]       | int32   | runtime, or the stage before: row of each visual token, ascending    |
| in  num_visual        | [1]       | int32   | runtime: real visual tokens, at most N                               |
| in  length            | [1]       | int32   | runtime: real rows; the rest is padding                              |
| in  previous_hidden_states | [1, S, D] | model | the layer range before: what entered its last layer (some methods)  |
| in  prompt_embeds     | [1, F, D] | model   | runtime: ``inputs_embeds`` of the prefill (some methods)             |
| in  prompt_is_visual  | [F]       | int32   | runtime: 1 at visual tokens of the prompt (some methods)             |
| in  prompt_length     | [1]       | int32   | runtime: real rows of the prompt (some methods)                      |
| in  saliency          | [N]       | float32 | ``export/graphs/probe.py``: scores (TRIO)                            |
| in  visual_images     | [N]       | int32   | runtime, or the stage before: image of each visual token (--budget image) |
| in  (a selector's own names) | any  | any     | the place that its ``other_inputs`` name                             |
| in  deepstack_embeds.{i} | [1, S, D] | model | the planes that entered the range before (with DeepStack: i >= l)   |
| out kept_hidden_states| [1, R, D] | model   | next layer range; R = S - N + K                                      |
| out kept_position_ids | [A, R]    | int32   | next layer range: 0..R-1 ("compact") or gathered ("preserved")       |
| out kept_visual_rows  | [K]       | int32   | next stage: row of each kept token in the reduced sequence           |
| out kept_indices      | [K]       | int32   | runtime: ascending, into the N that entered; min(K, num_visual) are real   |
| out scores            | [N]       | float32 | runtime: the method's scores, -1 where there is no token             |
| out unsettled         | [1]       | int32   | runtime: not 0 if the NMS needs more rounds than exported             |
| out kept_visual_images| [K]       | int32   | next stage: image of each kept token (--budget image)                |
| out kept_deepstack_embeds.{i} | [1, R, D] | model | later layer ranges: the kept rows of the remaining planes       |

The engines of most methods hold the weights of two of the layer's products a second time; on disk they are stored once.
TRIO's select graph holds no weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trio_edge.runtime.bundle import graph_io as io
from trio_edge.trio.compaction import compact_rows
from trio_edge.trio.selectors.interface import PromptInputs, StageInputs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio_edge.trio.selectors.interface import Selection, StageSelector


class Select(nn.Module):
    """A selector, and the gather of the kept rows."""

    def __init__(
        self,
        selector: StageSelector,
        rotary: nn.Module,
        *,
        preserve_positions: bool,
        others: Sequence[str] = (),
    ) -> None:
        """Hold the modules; ``others`` are the names of the inputs after the first five."""
        super().__init__()
        self.selector: Any = selector
        self.rotary = rotary
        self.preserve_positions, self.others = preserve_positions, tuple(others)

    def forward(
        self,
        hidden_states: Tensor,
        position_ids: Tensor,
        visual_rows: Tensor,
        num_visual: Tensor,
        length: Tensor,
        *others: Tensor,
    ) -> tuple[Tensor, ...]:
        """Return the outputs in the order of the table above."""
        hidden_SD = hidden_states[0]
        cos, sin = self.rotary(position_ids)
        given = dict(zip(self.others, others))
        image_N = given.get(io.VISUAL_IMAGES)
        previous_SD = given[io.PREVIOUS][0] if io.PREVIOUS in given else None
        prompt = None
        if io.PROMPT_EMBEDS in given:
            embeds_FD = given[io.PROMPT_EMBEDS][0]
            prompt = PromptInputs(embeds_FD, given[io.PROMPT_IS_VISUAL], given[io.PROMPT_LENGTH])
        sequence = visual_rows, num_visual, length
        own = {name: given[name] for name in getattr(self.selector, "other_inputs", {})}
        more = given.get(io.SALIENCY), image_N
        inputs = StageInputs(
            hidden_SD, cos[0], sin[0], *sequence, previous_SD, prompt, *more, own, position_ids[0]
        )
        selection: Selection = self.selector(inputs)
        S, is_ascending = hidden_SD.shape[0], selection.weights_KN is None
        compacted = compact_rows(selection.kept_K, *sequence, padded_length=S, is_ascending=is_ascending)
        rows_R = compacted.rows_R
        if self.preserve_positions:
            positions_AR = position_ids.index_select(1, rows_R)
        else:
            positions_AR = torch.arange(rows_R.shape[0]).to(torch.int32).expand(position_ids.shape[0], -1)
        planes = [given[name][0] for name in self.others if name.startswith(io.DEEPSTACK)]
        kept_RD, *kept_planes = (
            compacted.gathered(rows_SD, selection.weights_KN, visual_rows, num_visual)[None]
            for rows_SD in (hidden_SD, *planes)
        )
        return (
            kept_RD,
            positions_AR,
            compacted.visual_rows_K.to(torch.int32),
            selection.kept_K.to(torch.int32),
            selection.scores_N,
            selection.unsettled,
            *([] if image_N is None else [image_N.index_select(0, selection.kept_K)]),
            *kept_planes,
        )
