"""``vision`` of the Qwen2.5-VL family with encoder reduction: K visual tokens stay, the others are merged into them.

| I/O tensor          | shape    | dtype   | filled or read by                                                        |
|---------------------|----------|---------|--------------------------------------------------------------------------|
| in  pixel_values, patch_positions, window_slots, patch_slot, num_patches: as in ``vision_windowed.py``           |
| in  token_index     | [N]      | int32   | runtime: row of the K kept tokens for each visual token                  |
| out visual_tokens   | [N, D]   | model   | as in ``vision_windowed.py``                                             |
| out kept_tokens     | [K]      | int32   | runtime: kept tokens, raster indices, ascending, for positions and boxes |

A picture of n <= K tokens keeps all; then the first n of ``kept_tokens`` are meant. P has room for K tokens.

Half of the budget goes to windows: tokens are taken in descending attention received in the first block that sees the
whole picture, but not more than an equal share from one window. The rest goes to the tokens that receive most in the
last block. Every dropped token is added to the kept one that is most like it after the merger, and each kept one is
divided by one plus what it received.

Source: the TRIO reference code's encoder stage for Qwen2.5-VL. Its budget is a fraction of the picture's tokens; here
it is a number, so that all later shapes are fixed.
Letters: P patches, M merged tokens (padded), K kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trio_edge.export.graphs.vision_windowed import WindowedEncoder, merged_tokens
from trio_edge.runtime.errors import ScheduleError
from trio_edge.trio.budgets import MAX_TOPK

if TYPE_CHECKING:
    from torch import Tensor

MIN_KEEP = 2
"""One token for each half of the budget."""
_TOKENS_PER_WINDOW_SIDE = 4


def check_windowed_keep(num_keep: int, *, max_visual: int, vision_config: Any) -> None:
    """Raise ScheduleError unless this encoder can keep ``num_keep`` of at most ``max_visual`` tokens."""
    if not MIN_KEEP <= num_keep < max_visual or num_keep > MAX_TOPK:
        raise ScheduleError(
            f"--encoder-keep: expected {MIN_KEEP} to {min(MAX_TOPK, max_visual - 1)} (below the picture's"
            f" {max_visual} visual tokens, and TensorRT's TopK), got {num_keep}; choose a number in this range"
        )
    if vision_config.depth - 1 not in vision_config.fullatt_block_indexes:
        raise ScheduleError(
            "--encoder-keep: expected a vision encoder whose last block sees the whole picture, got"
            f" fullatt_block_indexes {list(vision_config.fullatt_block_indexes)} of {vision_config.depth};"
            " export without it"
        )


class ReducedWindowedVision(nn.Module):
    """Encoder, merger, selection of K visual tokens, and merging of the others."""

    def __init__(self, visual: nn.Module, *, inv_freq: Tensor, num_keep: int) -> None:
        """Take the parts of ``visual``.

        Args:
            visual: transformers' Qwen2_5_VisionTransformerPretrainedModel; its last block must be one that sees the
                whole picture.
            inv_freq: [E/4] ``vision_windowed.inverse_frequencies``; without values under FakeTensorMode.
            num_keep: K, see ``check_windowed_keep``.
        """
        super().__init__()
        core: Any = visual
        observed = (min(core.fullatt_block_indexes), len(core.blocks) - 1)
        self.encoder = WindowedEncoder(visual, inv_freq=inv_freq, observed_blocks=observed)
        self.merger: nn.Module = core.merger
        self.merge_size = int(core.spatial_merge_size)
        self.num_keep = num_keep

    def forward(
        self,
        pixel_values: Tensor,
        patch_positions: Tensor,
        window_slots: Tensor,
        patch_slot: Tensor,
        num_patches: Tensor,
        token_index: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return the visual tokens [N, D] and the kept ones' raster indices [K]."""
        hidden_PD, received = self.encoder(
            pixel_values, patch_positions, window_slots, patch_slot, num_patches
        )
        tokens_MD = merged_tokens(self.merger, hidden_PD)
        merged = self.merge_size**2
        local_M, global_M = (
            torch.unflatten(scores_P, 0, (-1, merged)).mean(dim=-1)
            for scores_P in (received[0], received[-1])
        )
        is_real_M = torch.arange(tokens_MD.shape[0]) * merged < num_patches
        first_2M = torch.unflatten(patch_positions, 1, (-1, merged))[:, :, 0].to(torch.float32)
        row_M, column_M = torch.floor(first_2M / self.merge_size)
        kept_K = select_tokens(local_M, global_M, row_M, column_M, is_real_M, num_keep=self.num_keep)
        rows_KD = merge_into_kept(tokens_MD, kept_K, is_real_M)
        raster_K = raster_index(row_M, column_M, is_real_M).index_select(0, kept_K)
        return rows_KD.index_select(0, token_index), raster_K.to(torch.int32)


def select_tokens(
    local_M: Tensor, global_M: Tensor, row_M: Tensor, column_M: Tensor, is_real_M: Tensor, *, num_keep: int
) -> Tensor:
    """Return the kept tokens in the picture's raster order: [K] int64 indices into the M axis.

    Args:
        local_M: Scores for the half of the budget that is shared among windows, float32 >= 0.
        global_M: Scores for the other half, float32 >= 0.
        row_M: Of each token, float32 whole numbers.
        column_M: Likewise.
        is_real_M: False for padding, which ranks after every real token.
        num_keep: K <= M.
    """
    num_local = num_keep // 2
    index_M = torch.arange(local_M.shape[0])
    row_window_M, num_row_windows = _windows(row_M, is_real_M)
    column_window_M, num_column_windows = _windows(column_M, is_real_M)
    window_M = row_window_M * num_column_windows + column_window_M
    num_windows = num_row_windows * num_column_windows
    # not a number over a tensor: torch makes that a product with the reciprocal, which can pass a whole number
    share = torch.ceil(torch.full_like(num_windows, num_local) / num_windows)
    in_reach_M = is_real_M & (_rank_in_window(local_M, window_M, is_real_M) < share)
    local_M = torch.where(in_reach_M, local_M, is_real_M.to(torch.float32) - 2.0)
    best = local_M.topk(num_local).indices
    is_local_M = (best[:, None] == index_M).any(dim=0)
    global_M = torch.where(is_real_M, global_M, torch.full_like(global_M, -1.0))
    global_M = torch.where(is_local_M, torch.full_like(global_M, -2.0), global_M)
    rest = global_M.topk(num_keep - num_local).indices
    is_kept_M = is_local_M | (rest[:, None] == index_M).any(dim=0)
    raster_M = raster_index(row_M, column_M, is_real_M)
    dropped_M = (~is_kept_M).to(torch.float32) * raster_M.shape[0] * 2
    return (raster_M + dropped_M).topk(num_keep, largest=False).indices


def raster_index(row_M: Tensor, column_M: Tensor, is_real_M: Tensor) -> Tensor:
    """Return each token's place in the picture's raster order, [M] float32; padding comes after all real tokens."""
    _, width = _masked(column_M, is_real_M)
    return torch.where(is_real_M, row_M * width + column_M, torch.arange(row_M.shape[0]).to(torch.float32))


def merge_into_kept(tokens_MD: Tensor, kept_K: Tensor, is_real_M: Tensor) -> Tensor:
    """Return the kept tokens [K, D], each averaged with the dropped ones that are most like it (cosine).

    Args:
        tokens_MD: All tokens.
        kept_K: Indices into them.
        is_real_M: False for padding, which is merged into nothing.
    """
    values_MD = tokens_MD.float()
    unit_MD = values_MD / values_MD.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    nearest_M = torch.matmul(unit_MD, unit_MD.index_select(0, kept_K).transpose(0, 1)).argmax(dim=-1)
    is_kept_M = (kept_K[:, None] == torch.arange(tokens_MD.shape[0])).any(dim=0)
    is_nearest_KM = nearest_M == torch.arange(kept_K.shape[0])[:, None]
    takes_KM = (is_nearest_KM & is_real_M & ~is_kept_M).to(torch.float32)
    sums_KD = values_MD.index_select(0, kept_K) + torch.matmul(takes_KM, values_MD)
    return (sums_KD / (1.0 + takes_KM.sum(dim=-1, keepdim=True))).to(tokens_MD.dtype)


def _masked(coordinate_M: Tensor, is_real_M: Tensor) -> tuple[Tensor, Tensor]:
    """Return the coordinates with 0 for padding, and how many values real tokens have, 0-d."""
    masked_M = coordinate_M * is_real_M.to(torch.float32)
    return masked_M, masked_M.amax(dim=0) + 1.0


def _windows(coordinate_M: Tensor, is_real_M: Tensor) -> tuple[Tensor, Tensor]:
    """Return each token's window along one axis and the number of windows; the last one takes the rest."""
    masked_M, extent = _masked(coordinate_M, is_real_M)
    num_windows = torch.floor(extent / _TOKENS_PER_WINDOW_SIDE).clamp_min(1.0)
    return torch.minimum(torch.floor(masked_M / _TOKENS_PER_WINDOW_SIDE), num_windows - 1.0), num_windows


def _rank_in_window(scores_M: Tensor, window_M: Tensor, is_real_M: Tensor) -> Tensor:
    """Return how many real tokens of its own window come before each token, by descending score, [M] float32."""
    index_M = torch.arange(scores_M.shape[0])
    is_before_MM = (scores_M[:, None] > scores_M) | (
        (scores_M[:, None] == scores_M) & (index_M[:, None] < index_M)
    )
    is_rival_MM = is_real_M[:, None] & (window_M[:, None] == window_M) & is_before_MM
    return is_rival_MM.to(torch.float32).sum(dim=0)
