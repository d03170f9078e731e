"""Feature-space non-maximum suppression with a fixed shape: keeps K of N visual tokens.

Greedy suppression in descending order of score is the fixed point of

    keep_i <- not any_j (keep_j and A[j, i]),   A[j, i] = 1 if j comes before i and cos(x_j, x_i) >= τ

(Cluster-NMS, arXiv 2005.03572). A token is final once all tokens it depends on are final. A chain of t dependencies
needs t rounds, and one more to see that nothing changes. The number of rounds is fixed here, so the graph has
no loop, no data-dependent shape and no host round trip; ``unsettled`` says whether the rounds were enough.

Cost: N² D for the similarities (about half of the matrix is computed, the other half mirrored), and 2 N² per round.
Letters: N visual tokens (padded), K kept, D hidden size.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from trio_edge.runtime.bundle.errors import ScheduleError
from trio_edge.trio.cost.selections import NMS_BLOCKS, NMS_MIRRORED_FROM
from trio_edge.trio.selectors.interface import check_num_keep, comes_before, first_in_order


class FeatureNms(nn.Module):
    """Greedy suppression of similar tokens, computed in parallel; has no parameters."""

    def __init__(
        self, *, num_keep: int, threshold: float, rounds: int, image_share: int | None = None
    ) -> None:
        """Fix the shape of the selection.

        Args:
            num_keep: K, tokens to keep, at most N; TensorRT's TopK takes at most 3839.
            threshold: τ; a token suppresses those with a cosine similarity of at least τ.
            rounds: Iterations of the fixed point.
            image_share: Least number of tokens kept per image; None if all images share one budget.

        Raises:
            ScheduleError: If a value is out of range.
        """
        super().__init__()
        check_num_keep(num_keep)
        if not 0.0 < threshold <= 1.0:
            raise ScheduleError(f"nms_threshold: expected 0 < τ <= 1, got {threshold}; the paper uses 0.8")
        if rounds < 1:
            raise ScheduleError(f"nms_rounds: expected >= 1, got {rounds}; 16 suffices for most images")
        self.num_keep, self.image_share = num_keep, image_share
        self.threshold, self.rounds = threshold, rounds

    def forward(
        self,
        features_ND: Float[Tensor, "N D"],
        scores_N: Float[Tensor, "N"],
        num_visual: Int[Tensor, "*one"],
        image_N: Int[Tensor, "N"] | None = None,
    ) -> tuple[Int[Tensor, "K"], Int[Tensor, "1"]]:
        """Return the kept tokens in raster order, and the number of tokens that the last round changed.

        Survivors are kept first, by descending score; if fewer than K survive, the best suppressed tokens follow.
        Of equal scores the lower index comes first. Padding suppresses nothing and ranks after all real tokens: with
        fewer than K of them the result is 0..num_visual-1, then padding.

        Args:
            features_ND: Rows to compare, any float type; compared in float32. A zero row is similar to nothing.
            scores_N: Saliency, higher is better; not read at padding.
            num_visual: Number of real tokens, 0-d or [1]; the rows after them are padding.
            image_N: Image of each token, with ``image_share`` only: the best tokens of each image come before all others.

        Returns:
            Kept indices into the N axis, int64, strictly increasing; and the number of changes, int32: 0 means that the
            result equals the greedy one.

        Raises:
            ScheduleError: If N < K.
        """
        N = features_ND.shape[0]
        check_num_keep(self.num_keep, N)
        index_N = torch.arange(N, device=features_ND.device)
        real_N = index_N < num_visual.reshape(1)
        scores_N = torch.where(real_N, scores_N, torch.finfo(scores_N.dtype).min)
        before_NN = comes_before(scores_N, index_N)
        rank_N = before_NN.to(torch.float32).sum(0)
        # The counts are only compared with zero, so half precision is exact and halves the traffic of each round.
        dtype = features_ND.dtype if features_ND.dtype.itemsize == 2 else torch.float32
        adjacency_NN = (before_NN & similar_tokens(features_ND, real_N, threshold=self.threshold)).to(dtype)
        kept_N, unsettled = self._fixed_point(adjacency_NN)
        order_N = rank_N + N * (1.0 - kept_N.to(torch.float32))
        kept_K = first_in_order(
            order_N, real_N, num_keep=self.num_keep, image_N=image_N, image_share=self.image_share
        )
        return kept_K, unsettled

    def _fixed_point(self, adjacency_NN: Float[Tensor, "N N"]) -> tuple[Float[Tensor, "N"], Int[Tensor, "1"]]:
        """Return 1 at kept and 0 at suppressed tokens, and the number of tokens that the last round changed."""
        # A matrix of one row, so that a round is a MatMul.
        kept_1N = earlier_1N = torch.ones_like(adjacency_NN[:1])
        for _ in range(self.rounds):
            earlier_1N = kept_1N
            kept_1N = (torch.matmul(earlier_1N, adjacency_NN) == 0).to(adjacency_NN.dtype)
        changed_N = (kept_1N != earlier_1N)[0]
        return kept_1N[0], changed_N.to(torch.int32).sum(0, keepdim=True, dtype=torch.int32)


def similar_tokens(
    features_ND: Float[Tensor, "N D"], real_N: Bool[Tensor, "N"], *, threshold: float
) -> Bool[Tensor, "N N"]:
    """Return the pairs with a cosine similarity of at least ``threshold``; zero rows and padding are similar to nothing.

    ``features_ND`` has any float type and is compared in float32; ``real_N`` is False at padding.
    """
    # Scaled by the largest entry first, so that squares neither overflow nor vanish.
    features_ND = features_ND.to(torch.float32)
    largest_N1 = features_ND.abs().amax(-1, keepdim=True)
    usable_N1 = real_N[:, None] & (largest_N1 > 0)
    scaled_ND = torch.where(usable_N1, features_ND / torch.where(usable_N1, largest_N1, 1.0), 0.0)
    square_N1 = (scaled_ND * scaled_ND).sum(-1, keepdim=True)
    unit_ND = scaled_ND / torch.where(usable_N1, square_N1, 1.0).sqrt()
    return _symmetric_product(unit_ND) >= threshold


def _symmetric_product(unit_ND: Float[Tensor, "N D"]) -> Float[Tensor, "N N"]:
    """Return X Xᵀ; b row blocks compute (b + 1) / 2b of it, and mirroring that gives exactly equal numbers."""
    num_tokens = unit_ND.shape[0]
    # N is symbolic if one graph serves several image sizes: the plain product is traced then.
    if not isinstance(num_tokens, int) or num_tokens < NMS_MIRRORED_FROM:
        return unit_ND @ unit_ND.T
    bounds = [num_tokens * block // NMS_BLOCKS for block in range(NMS_BLOCKS + 1)]
    upper = [unit_ND[low:high] @ unit_ND[low:].T for low, high in zip(bounds, bounds[1:])]
    rows = []
    for block, (low, high) in enumerate(zip(bounds, bounds[1:])):
        left = [upper[k][:, low - bounds[k] : high - bounds[k]].T for k in range(block)]
        rows.append(torch.cat([*left, upper[block]], dim=1))
    return torch.cat(rows, dim=0)
