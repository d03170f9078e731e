"""Feature-space non-maximum suppression with a fixed shape: which K of N visual tokens stay.

Greedy suppression in descending score is the fixed point of

    keep_i <- not any_j (keep_j and A[j, i]),   A[j, i] = 1 if j comes before i and cos(x_j, x_i) >= τ

(Cluster-NMS, arXiv 2005.03572). A token is final once every token it depends on is; a chain of t dependencies
needs t rounds, and one more to see that nothing changes. The number of rounds is fixed here, so the graph has
no loop, no data-dependent shape and no host round trip; ``unsettled`` says whether the rounds were enough.

Cost: N² D for the similarities (about half of the matrix is computed, the rest is its mirror image), and 2 N²
for every round.
Letters: N visual tokens (padded), K kept, D hidden size.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from trio_edge.runtime.bundle.errors import ScheduleError
from trio_edge.trio.selectors.interface import comes_before, first_in_order

_MIRROR_BLOCKS = 4
_MIRROR_MIN_TOKENS = 1024


class FeatureNms(nn.Module):
    """Greedy suppression of similar tokens, in parallel; no parameters."""

    def __init__(
        self, *, num_keep: int, threshold: float, rounds: int, image_share: int | None = None
    ) -> None:
        """Fix the shape of the selection.

        Args:
            num_keep: K, tokens to keep; at most N of the later call, and at most 3839 for TensorRT's TopK.
            threshold: τ; a cosine similarity at or above it suppresses.
            rounds: Iterations of the fixed point.
            image_share: Tokens that each image keeps at least; None where all images share one budget.

        Raises:
            ScheduleError: If a value is out of range.
        """
        super().__init__()
        if num_keep < 1:
            raise ScheduleError(f"num_keep: expected >= 1, got {num_keep}; keep at least one token")
        if not 0.0 < threshold <= 1.0:
            raise ScheduleError(f"nms_threshold: expected 0 < τ <= 1, got {threshold}; the paper uses 0.8")
        if rounds < 1:
            raise ScheduleError(f"nms_rounds: expected >= 1, got {rounds}; 16 settles common pictures")
        self.num_keep = num_keep
        self.threshold = threshold
        self.rounds = rounds
        self.image_share = image_share

    def forward(
        self,
        features_ND: Float[Tensor, "N D"],
        scores_N: Float[Tensor, "N"],
        num_visual: Int[Tensor, "*one"],
        image_N: Int[Tensor, "N"] | None = None,
    ) -> tuple[Int[Tensor, "K"], Int[Tensor, "1"]]:
        """Return the kept tokens in raster order, and how many tokens the last round still changed.

        Survivors come first, in descending score; if fewer than K survive, the best suppressed ones follow.
        Of equal scores the lower index comes first. Padding neither suppresses nor is suppressed and ranks
        after every real token: with fewer than K real ones the result is 0..num_visual-1 and then padding.

        Args:
            features_ND: Rows to compare, any float type; compared in float32. A zero row is similar to
                nothing.
            scores_N: Saliency, higher is better. Its values at padding are not read.
            num_visual: Real tokens, 0-d or [1]; the rows from there on are padding.
            image_N: Image of each token, where each image has a share of the kept ones: its first tokens in this order, at
                most as many as the share, come before all others.

        Returns:
            Kept indices into the N axis, int64, strictly increasing; and the number of tokens that changed in
            the last round, int32: 0 means that the result equals the greedy one.

        Raises:
            ScheduleError: If N < K.
        """
        N = features_ND.shape[0]
        if self.num_keep > N:
            raise ScheduleError(
                f"num_keep: expected <= {N} (all tokens of the span), got {self.num_keep}; keep fewer"
            )
        index_N = torch.arange(N, device=features_ND.device)
        real_N = index_N < num_visual.reshape(1)
        scores_N = torch.where(real_N, scores_N, torch.finfo(scores_N.dtype).min)
        before_NN = comes_before(scores_N, index_N)
        rank_N = before_NN.to(torch.float32).sum(0)
        # Only "is it zero" is asked of the counts, so half precision is exact and halves the traffic of every round.
        dtype = features_ND.dtype if features_ND.dtype.itemsize == 2 else torch.float32
        adjacency_NN = (before_NN & similar_tokens(features_ND, real_N, threshold=self.threshold)).to(dtype)
        kept_N, unsettled = self._fixed_point(adjacency_NN)
        order_N = rank_N + N * (1.0 - kept_N.to(torch.float32))
        kept_K = first_in_order(
            order_N, real_N, num_keep=self.num_keep, image_N=image_N, image_share=self.image_share
        )
        return kept_K, unsettled

    def _fixed_point(self, adjacency_NN: Float[Tensor, "N N"]) -> tuple[Float[Tensor, "N"], Int[Tensor, "1"]]:
        """Return 1 for what is kept, 0 for what is suppressed, and how many of them the last round changed."""
        kept_1N = torch.ones_like(adjacency_NN[:1])
        earlier_1N = kept_1N
        for _ in range(
            self.rounds
        ):  # one row of a matrix throughout: a product and a comparison are all of a round
            earlier_1N = kept_1N
            kept_1N = (torch.matmul(earlier_1N, adjacency_NN) == 0).to(adjacency_NN.dtype)
        changed_N = (kept_1N != earlier_1N)[0]
        return kept_1N[0], changed_N.to(torch.int32).sum(0, keepdim=True, dtype=torch.int32)


def similar_tokens(
    features_ND: Float[Tensor, "N D"], real_N: Bool[Tensor, "N"], *, threshold: float
) -> Bool[Tensor, "N N"]:
    """Return which pairs have a cosine similarity of at least ``threshold``; zero and unreal rows are similar to nothing.

    Args:
        features_ND: Any float type; compared in float32.
        real_N: Rows that are no padding.
        threshold: τ.
    """
    # Scaled by the largest entry first: squares neither overflow nor vanish.
    features_ND = features_ND.to(torch.float32)
    largest_N1 = features_ND.abs().amax(-1, keepdim=True)
    usable_N1 = real_N[:, None] & (largest_N1 > 0)
    scaled_ND = torch.where(usable_N1, features_ND / torch.where(usable_N1, largest_N1, 1.0), 0.0)
    square_N1 = (scaled_ND * scaled_ND).sum(-1, keepdim=True)
    unit_ND = scaled_ND / torch.where(usable_N1, square_N1, 1.0).sqrt()
    return _symmetric_product(unit_ND) >= threshold


def num_mirror_blocks(num_tokens: int) -> int:
    """Return into how many row blocks the similarity matrix is cut; b blocks compute (b + 1) / 2b of it."""
    return _MIRROR_BLOCKS if num_tokens >= _MIRROR_MIN_TOKENS else 1


def _symmetric_product(unit_ND: Float[Tensor, "N D"]) -> Float[Tensor, "N N"]:
    """Return X Xᵀ from its upper block triangle; the mirrored half is exactly equal."""
    num_tokens = unit_ND.shape[0]
    # Under export N may be symbolic: one graph for several picture sizes. Then the plain product is traced.
    blocks = num_mirror_blocks(num_tokens) if isinstance(num_tokens, int) else 1
    if blocks == 1:
        return unit_ND @ unit_ND.T
    bounds = [unit_ND.shape[0] * block // blocks for block in range(blocks + 1)]
    upper = [unit_ND[low:high] @ unit_ND[low:].T for low, high in zip(bounds, bounds[1:])]
    rows = []
    for block, (low, high) in enumerate(zip(bounds, bounds[1:])):
        left = [upper[k][:, low - bounds[k] : high - bounds[k]].T for k in range(block)]
        rows.append(torch.cat([*left, upper[block]], dim=1))
    return torch.cat(rows, dim=0)
