"""``reduce``: a selection among an image's visual tokens before the decoder.

| I/O tensor          | shape  | dtype   | filled or read by                                                     |
|---------------------|--------|---------|-----------------------------------------------------------------------|
| in  visual_tokens   | [N, D] | model   | the vision graph                                                      |
| in  num_visual      | [1]    | int32   | runtime: real visual tokens, at most N                                |
| in  is_newline      | [N]    | int32   | runtime: 1 at tokens that show no part of the image                   |
| in  features        | [N, F] | model   | the vision graph: before the projector (some methods)                 |
| in  keys            | [N, E] | model   | the vision graph: attention keys, mean over heads (some methods)      |
| in  class_attention | [N]    | float32 | the vision graph: attention of the class row (some methods)           |
| in  text_embeds     | [T, D] | model   | runtime: embeddings of the text after the image (some methods)        |
| in  num_text        | [1]    | int32   | runtime: how many of them are real (some methods)                     |
| in  clip_patches    | [N, Z] | model   | the vision graph: patches in CLIP's space (CLIP's form of a method)   |
| in  clip_texts      |[M, L, Z]| model  | the text tower's graph (CLIP's form of a method)                      |
| in  text_marks      | [M, L] | int32   | runtime: 1 at words, 2 at the ends of texts (CLIP's form of a method) |
| in  previous_tokens | [N, D] | model   | runtime: visual tokens of the frames before (some methods)            |
| in  has_previous    | [1]    | int32   | runtime: 0 for an image and the first frames (some methods)           |
| in  deepstack_tokens.{i} | [N, D] | model | the vision graph (with DeepStack)                                   |
| out reduced_tokens  | [K, D] | model   | runtime: placed into the prefix graph's ``inputs_embeds``             |
| out kept_tokens     | [K]    | int32   | runtime: which tokens these are, for positions and drawing            |
| out reduced_deepstack_tokens.{i} | [K, D] | model | runtime: placed into ``deepstack_embeds.{i}``                 |
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trio_edge.runtime.bundle import graph_io as io
from trio_edge.trio.selectors.interface import ClipInputs, Selection, TokenInputs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio_edge.trio.selectors.interface import TokenSelector

FEATURE_NAMES = ("features", "keys", "class_attention")


class Reduce(nn.Module):
    """A selector, and the gather or weighted sums of the kept tokens."""

    def __init__(self, selector: TokenSelector, *, others: Sequence[str]) -> None:
        """Hold the selector; ``others`` are the names of the inputs after the first three."""
        super().__init__()
        self.selector: Any = selector
        self.others = tuple(others)

    def forward(
        self, visual_tokens: Tensor, num_visual: Tensor, is_newline: Tensor, *others: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the reduced tokens [K, D], their indices [K], and the reduced planes."""
        given = dict(zip(self.others, others))
        clip = None
        if io.CLIP_TEXTS in given:
            clip = ClipInputs(given[io.CLIP_PATCHES], given[io.CLIP_TEXTS], given[io.TEXT_MARKS])
        planes = [given[name] for name in self.others if name.startswith(io.DEEPSTACK_TOKENS)]
        features, keys, attention = map(given.get, FEATURE_NAMES)
        text, num_text = given.get(io.TEXT_EMBEDS), given.get(io.NUM_TEXT)
        previous = given.get(io.PREVIOUS_TOKENS), given.get(io.HAS_PREVIOUS)
        whole = visual_tokens, num_visual, is_newline > 0
        inputs = TokenInputs(*whole, features, keys, attention, text, num_text, clip, *previous)
        selection: Selection = self.selector(inputs)
        reduced_KD, *reduced_planes = (
            _reduced(rows_ND, selection, num_visual) for rows_ND in (visual_tokens, *planes)
        )
        return reduced_KD, selection.kept_K.to(torch.int32), *reduced_planes


def _reduced(rows_ND: Tensor, selection: Selection, num_visual: Tensor) -> Tensor:
    """Return the kept rows, or the selection's weighted sums: [K, D]."""
    if selection.weights_KN is None:
        return rows_ND.index_select(0, selection.kept_K)
    real_N = torch.arange(rows_ND.shape[0]) < num_visual
    values_ND = torch.where(real_N[:, None], rows_ND.to(torch.float32), 0.0)
    return torch.matmul(selection.weights_KN, values_ND).to(rows_ND.dtype)
