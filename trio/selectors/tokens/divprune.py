"""DivPrune: greedily keeps K tokens whose smallest distance to each other is large (max-min).

Source: arXiv 2503.02175.

    distance(i, j) = 1 − cos(x_i, x_j)
    first:  argmax_i  min over j ≠ i of distance(i, j)
    then:   argmax_i  min over taken t of distance(i, t)

x are the visual tokens as the decoder reads them. As in the original, LLaVA-NeXT's newlines take part like other tokens,
and the image is one pool. The original keeps round(r N); here K is given. Difference from the original: a zero row is at
distance 1 from every other row (there: a division by zero). The K steps read N numbers each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trio_edge.trio.selectors.interface import KeepingModule, Selection, TokenInputs
from trio_edge.trio.selectors.tokens.candidates import real_tokens, unit_rows
from trio_edge.trio.selectors.tokens.greedy import State, greedy_selection, row_at

_FAR = 4.0  # above every distance; these are at most 2


class DivPrune(KeepingModule):
    """DivPrune; no parameters."""

    def forward(self, inputs: TokenInputs) -> Selection:
        """Return the selection; scores give the order of choice, K for the first token."""
        real_N = real_tokens(inputs, num_keep=self.num_keep)
        unit_ND = unit_rows(inputs.tokens_ND, real_N)
        distance_NN = 1.0 - unit_ND @ unit_ND.T
        index_N = torch.arange(real_N.shape[0], device=real_N.device)
        other_NN = (index_N[:, None] != index_N[None, :]) & real_N[None, :]
        nearest_N = torch.where(other_NN, distance_NN, _FAR).amin(-1)

        return greedy_selection(
            real_N,
            real_N,
            num_keep=self.num_keep,
            state=(nearest_N,),
            constants=(distance_NN,),
            gain=lambda state, _: state[0],
            update=_nearest_taken,
        )


def _nearest_taken(state: State, constants: State, best: Tensor, number: Tensor) -> State:
    # The first step compared nearest neighbours, which are no distances to taken tokens.
    earlier_N = torch.where(number > 0, state[0], _FAR)
    return (torch.minimum(earlier_N, row_at(constants[0], best)),)
