"""TRIO's selection on a sequence without padding: one order of the tokens gives the kept sets of every budget.

Scores are the graphs' own ``ProxySaliency``. The NMS runs until it has settled, which is exact and tells how many rounds a
graph must have: a chain of t suppressions takes t rounds, and one more to see that nothing changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from trio_edge.trio.nms import similar_tokens
from trio_edge.trio.saliency import ProxySaliency
from trio_edge.trio.selectors.interface import comes_before

if TYPE_CHECKING:
    from torch import Tensor

    from trio_edge.calibration.model.sequence import Sequence
    from trio_edge.calibration.model.torch_model import TorchModel
    from trio_edge.runtime.bundle.schedule import ProbeRows, Schedule


class Order(NamedTuple):
    """Visual tokens in the order in which a stage takes them."""

    tokens_N: Tensor
    """int64, best first: survivors of the NMS, then suppressed ones."""
    rounds: int
    """Rounds of the parallel NMS, until the last one changed nothing."""

    def kept(self, num_keep: int) -> Tensor:
        """Return the best ``num_keep`` tokens (all, if there are fewer), ascending."""
        return self.tokens_N[:num_keep].sort().values


class Probes:
    """The probes in front of layers, as the select graphs of a bundle have them; each is made once."""

    def __init__(self, model: TorchModel, *, max_visual: int) -> None:
        """Take the model, and the largest N that enters: the cheapest form is chosen for it."""
        self._model = model
        self._max_visual = max_visual
        self._probes: dict[tuple[int, ProbeRows, int], ProxySaliency] = {}

    def of(self, layer: int, schedule: Schedule) -> ProxySaliency:
        """Return the probe in front of ``layer`` with the schedule's probe rows."""
        key = layer, schedule.probe_rows, schedule.num_probe_rows
        if key not in self._probes:
            parts = self._model.parts
            self._probes[key] = ProxySaliency(
                parts.layers[layer],
                parts.final_norm,
                parts.lm_head,
                max_visual=self._max_visual,
                num_probe_rows=schedule.num_probe_rows,
                last_probe_offset=schedule.last_probe_offset,
            )
        return self._probes[key]


def saliency(model: TorchModel, probe: ProxySaliency, sequence: Sequence) -> Tensor:
    """Return the score [N] of each visual token that is left, float32."""
    length = sequence.prompt_length
    cos, sin = model.rotary(sequence.positions_AS[:, :length])
    scores: Tensor = probe(
        sequence.hidden_SD[:length],
        cos[0],
        sin[0],
        sequence.visual_rows_N,
        torch.tensor([sequence.num_visual], device=model.device),
        torch.tensor([length], device=model.device),
    )
    return scores


def order_of(sequence: Sequence, scores_N: Tensor, *, threshold: float) -> Order:
    """Return the order of the visual tokens by saliency and NMS."""
    N = sequence.num_visual
    features_ND = sequence.hidden_SD[sequence.visual_rows_N]
    index_N = torch.arange(N, device=scores_N.device)
    before_NN = comes_before(scores_N, index_N)
    similar_NN = similar_tokens(features_ND, torch.ones_like(index_N, dtype=torch.bool), threshold=threshold)
    kept_N, rounds = _settled((before_NN & similar_NN).to(torch.float32))
    rank_N = before_NN.to(torch.int64).sum(0)
    return Order(torch.argsort(rank_N + N * (~kept_N).to(torch.int64)), rounds)


def _settled(adjacency_NN: Tensor) -> tuple[Tensor, int]:
    kept_N = torch.ones_like(adjacency_NN[0], dtype=torch.bool)
    rounds = 0
    while True:
        earlier_N, rounds = kept_N, rounds + 1
        kept_N = (earlier_N.to(adjacency_NN.dtype) @ adjacency_NN) == 0
        if torch.equal(kept_N, earlier_N):
            return kept_N, rounds
