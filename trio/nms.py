"""Feature-space NMS with a fixed number of parallel rounds: shapes never depend on the data.

Greedy NMS takes tokens by descending saliency and suppresses what is similar to a taken one. The same set is the fixed
point of ``keep_i <- no kept j before i is similar to i``; after t rounds every token whose chain of dependencies is
shorter than t is final (Cluster-NMS). The graph also says how many tokens the last round still changed.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Int32, Int64
from torch import Tensor, nn


class FeatureNms(nn.Module):
    """Selects K of N tokens: salient ones that are unlike each other first, then the most salient of the others."""

    def __init__(self, *, num_keep: int, threshold: float, rounds: int) -> None:
        """Fix the shapes.

        Args:
            num_keep: K, at most N.
            threshold: τ; a cosine similarity at or above it suppresses.
            rounds: Parallel rounds.
        """
        super().__init__()
        self.num_keep, self.threshold, self.rounds = num_keep, threshold, rounds

    def forward(
        self, features_ND: Float[Tensor, "N D"], scores_N: Float[Tensor, " N"], num_visual: Int[Tensor, "..."]
    ) -> tuple[Int64[Tensor, " K"], Int32[Tensor, " 1"]]:
        """Return the kept indices in ascending order and the number of unsettled tokens.

        Ties go to the lower index. Rows from ``num_visual`` on are padding: they suppress nothing and come last, so of
        the result exactly the first min(K, num_visual) entries are real.

        Args:
            features_ND: Hidden states of the tokens.
            scores_N: Saliency.
            num_visual: Real tokens.

        Source:
            arXiv 2602.04657; greedy order and top-up as in the reference code, ties left open there.
        """
        N = features_ND.shape[0]
        index_N = torch.arange(N)
        real_N = index_N < num_visual.reshape(1).long()
        scores_N = torch.where(real_N, scores_N, torch.finfo(scores_N.dtype).min)
        # before[j, i]: token j comes before token i in saliency order
        before_NN = scores_N[:, None] > scores_N[None, :]
        before_NN = before_NN | ((scores_N[:, None] == scores_N[None, :]) & (index_N[:, None] < index_N[None, :]))
        similar_NN = self._similar(features_ND) & real_N[:, None] & real_N[None, :]
        suppresses_NN = (before_NN & similar_NN).to(torch.float32)

        keep_N = torch.ones(N, dtype=torch.float32)
        changed = torch.zeros(1, dtype=torch.float32)
        for _ in range(self.rounds):
            hits_N = torch.matmul(keep_N[None], suppresses_NN)[0]
            next_N = (hits_N < 0.5).to(torch.float32)
            changed = (next_N - keep_N).abs().sum()
            keep_N = next_N

        # survivors in saliency order, then the suppressed ones in saliency order
        rank_N = before_NN.to(torch.float32).sum(dim=0) + N * (1.0 - keep_N)
        taken = (-rank_N).topk(self.num_keep).indices
        is_taken_N = (taken[:, None] == index_N[None, :]).any(dim=0)
        kept_K = torch.where(is_taken_N, (N - index_N).to(torch.float32), 0.0).topk(self.num_keep).indices
        return kept_K, changed.reshape(1).to(torch.int32)

    def _similar(self, features_ND: Tensor) -> Tensor:
        values = features_ND.to(torch.float32)
        # scaled by the largest entry first, so that squares neither overflow nor vanish
        values = values / values.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        unit = values / values.square().sum(dim=-1, keepdim=True).sqrt().clamp_min(1e-12)
        return torch.matmul(unit, unit.T) >= self.threshold
