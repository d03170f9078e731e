"""``vision`` of the Qwen2.5-VL family: patches of one image in window order to visual tokens in raster order.

| I/O tensor          | shape    | dtype   | filled or read by                                                        |
|---------------------|----------|---------|--------------------------------------------------------------------------|
| in  pixel_values    | [P, F]   | float32 | runtime's image processing; F numbers per patch                          |
| in  patch_positions | [2, P]   | int32   | runtime: row and column of each patch                                    |
| in  window_slots    | [W, Q]   | int32   | runtime: patch in each slot of each attention window, -1 in empty slots  |
| in  patch_slot      | [P]      | int32   | runtime: slot of each patch in the flattened windows                     |
| in  num_patches     | [1]      | int32   | runtime: number of real patches; later ones are padding                  |
| in  token_index     | [N]      | int32   | runtime: merged token of each visual token, or its row of the K kept ones |
| out visual_tokens   | [N, D]   | model   | runtime: placed into the prefix graph's ``inputs_embeds``                |
| out kept_tokens     | [K]      | int32   | runtime: raster indices, ascending, for positions and boxes; with        |
|                     |          |         | encoder reduction only. An image of n <= K tokens keeps all: its first n |

Most blocks attend inside windows: queries, keys and values are gathered into [W, Q] and the result is gathered back, so
their cost grows with P * Q. The others attend over all P patches, in blocks of heads (see ``patches``). Only the index
inputs depend on the image. P is a multiple of the patches per visual token; with encoder reduction it has room for K
tokens. Padding patches must be finite: their values are multiplied by weights of zero and reach no real patch.

Letters: P patches, M merged tokens (padded), K kept, W windows of Q slots.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trio_edge.export.graphs import linear_groups as groups
from trio_edge.export.graphs.vision.patches import (
    attention,
    embedded,
    observed_attention,
    rows_at,
    with_headroom,
)
from trio_edge.runtime.bundle.errors import ScheduleError
from trio_edge.trio.budgets import MAX_TOPK
from trio_edge.trio.cost.memory import num_head_blocks

if TYPE_CHECKING:
    from collections.abc import Iterator

INV_FREQ_NAME = "encoder.inv_freq"
"""The graph's one constant, with the values of ``inverse_frequencies``."""
MIN_KEEP = 2
"""One token for each half of the budget."""
_TOKENS_PER_WINDOW_SIDE = 4


class WindowedVision(nn.Module):
    """Encoder, merger of neighbouring patches, and the gather that orders the visual tokens.

    With encoder reduction K visual tokens are selected, and the others are merged into them. Half of the budget goes to the
    tokens that receive most attention in the first block that sees the whole image, but at most an equal share to each
    window. The other half goes to those that receive most in the last block. Each dropped token is added to the most similar
    kept one after the merger, and each kept one is divided by one plus the number of tokens added to it.

    Source: the TRIO reference code's encoder stage for Qwen2.5-VL. Its budget is a fraction of the image's tokens; here
    it is a number, so that all later shapes are fixed.
    """

    def __init__(
        self, visual: nn.Module, *, inv_freq: Tensor, max_patches: int, num_keep: int | None = None
    ) -> None:
        """Take the parts of ``visual``.

        Args:
            visual: transformers' Qwen2_5_VisionTransformerPretrainedModel.
            inv_freq: [E/4] ``inverse_frequencies``; without values under FakeTensorMode.
            max_patches: Largest P of any image.
            num_keep: K, checked by ``check_windowed_keep``; None keeps all tokens.
        """
        super().__init__()
        core: Any = visual
        observed = () if num_keep is None else (min(core.fullatt_block_indexes), len(core.blocks) - 1)
        self.encoder = WindowedEncoder(
            visual, inv_freq=inv_freq, max_patches=max_patches, observed_blocks=observed
        )
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
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the visual tokens [N, D]; with encoder reduction also the raster indices [K] of the kept ones."""
        hidden_PD, received = self.encoder(
            pixel_values, patch_positions, window_slots, patch_slot, num_patches
        )
        tokens_MD = merged_tokens(self.merger, hidden_PD)
        if self.num_keep is None:
            return tokens_MD.index_select(0, token_index)
        merged = self.merge_size**2
        local_M, global_M = (
            scores_P.reshape(-1, merged).mean(dim=-1) for scores_P in (received[0], received[-1])
        )
        is_real_M = torch.arange(tokens_MD.shape[0]) * merged < num_patches
        first_2M = patch_positions.reshape(2, -1, merged)[:, :, 0].to(torch.float32)
        row_M, column_M = torch.floor(first_2M / self.merge_size)
        kept_K = select_tokens(local_M, global_M, row_M, column_M, is_real_M, num_keep=self.num_keep)
        rows_KD = merge_into_kept(tokens_MD, kept_K, is_real_M)
        raster_K = raster_index(row_M, column_M, is_real_M).index_select(0, kept_K)
        return rows_KD.index_select(0, token_index), raster_K.to(torch.int32)


def check_windowed_keep(num_keep: int, *, max_visual: int, vision_config: Any) -> None:
    """Raise ScheduleError unless the encoder can keep ``num_keep`` of at most ``max_visual`` tokens."""
    if not MIN_KEEP <= num_keep < max_visual or num_keep > MAX_TOPK:
        raise ScheduleError(
            f"--encoder-keep: expected {MIN_KEEP} to {min(MAX_TOPK, max_visual - 1)} (fewer than the image's {max_visual} visual"
            f" tokens, and TensorRT's TopK limit), got {num_keep}; choose a number in this range"
        )
    if vision_config.depth - 1 not in vision_config.fullatt_block_indexes:
        raise ScheduleError(
            "--encoder-keep: expected a vision encoder whose last block sees the whole image, got"
            f" fullatt_block_indexes {list(vision_config.fullatt_block_indexes)} of {vision_config.depth}; leave it out"
        )


def windowed_groups(visual: nn.Module) -> tuple[groups.LinearGroup, ...]:
    """Return the linear layers of transformers' Qwen2_5_VisionTransformerPretrainedModel.

    The merger normalizes patches before it joins four of them, so its norm does not have one element per input.
    """
    core: Any = visual
    return (
        *(group for index, block in enumerate(core.blocks) for group in _block_groups(block, index)),
        *groups.projector_groups(core.merger.mlp[0], core.merger.mlp[2], norm=None),
    )


def _block_groups(block: Any, index: int) -> Iterator[groups.LinearGroup]:
    yield from groups.fused_attention_groups(block.attn, norm=block.norm1, index=index)
    yield from groups.gated_mlp_groups(block.mlp, norm=block.norm2, index=index)


class WindowedEncoder(nn.Module):
    """Patch embedding and blocks with attention inside windows or over the image."""

    inv_freq: Tensor

    def __init__(
        self, visual: nn.Module, *, inv_freq: Tensor, max_patches: int, observed_blocks: tuple[int, ...] = ()
    ) -> None:
        """Take the parts of ``visual``; see ``WindowedVision``.

        The attention received in ``observed_blocks``, which see the whole image, is returned.
        """
        super().__init__()
        core: Any = visual
        self.patch_embed: nn.Module = core.patch_embed
        self.blocks: nn.ModuleList = core.blocks
        self.full_blocks = frozenset(core.fullatt_block_indexes)
        self.max_patches = max_patches
        self.observed_blocks = observed_blocks
        self.register_buffer("inv_freq", inv_freq)

    def forward(
        self,
        pixel_values: Tensor,
        patch_positions: Tensor,
        window_slots: Tensor,
        patch_slot: Tensor,
        num_patches: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the patches' hidden states [P, D], and for each observed block the attention received [P]; float32."""
        hidden_PD = embedded(self.patch_embed, pixel_values).float()
        is_real_P = torch.arange(pixel_values.shape[0]) < num_patches
        whole = rows_at(self.inv_freq, patch_positions, is_real_P)
        is_used_WQ = window_slots >= 0
        patch_of_slot = torch.where(is_used_WQ, window_slots, 0).flatten()
        shape_WQ = window_slots.shape
        in_windows = patch_positions.index_select(1, patch_of_slot).reshape(2, *shape_WQ)
        windows = rows_at(self.inv_freq, in_windows, is_used_WQ)
        # a dynamic axis has no number while it is traced
        num_rows = pixel_values.shape[0] if isinstance(pixel_values.shape[0], int) else self.max_patches
        received = []
        block: Any
        for index, block in enumerate(self.blocks):
            qkv_P = block.attn.qkv(block.norm1(hidden_PD).to(block.attn.qkv.weight.dtype))
            if index in self.full_blocks:
                head_blocks = num_head_blocks(block.attn.num_heads, num_rows)
                if index in self.observed_blocks:
                    mixed_PD, received_P = observed_attention(
                        block.attn, qkv_P, whole, is_real_P, head_blocks=head_blocks
                    )
                    received.append(received_P)
                else:
                    mixed_PD = attention(block.attn, qkv_P[None], whole, head_blocks=head_blocks)[0]
            else:
                qkv_WQ = qkv_P.index_select(0, patch_of_slot).reshape(*shape_WQ, qkv_P.shape[-1])
                mixed_PD = attention(block.attn, qkv_WQ, windows).flatten(0, 1).index_select(0, patch_slot)
            hidden_PD = hidden_PD + block.attn.proj(mixed_PD).float()
            hidden_PD = hidden_PD + _mlp(block.mlp, block.norm2(hidden_PD))
        return hidden_PD, received


def merged_tokens(merger: nn.Module, hidden_PD: Tensor) -> Tensor:
    """Return the visual tokens in the patches' order, [M, D] in the weights' dtype."""
    parts: Any = merger
    normed_PD = parts.ln_q(hidden_PD).to(parts.mlp[0].weight.dtype)
    tokens: Tensor = parts.mlp(normed_PD.view(-1, parts.hidden_size))
    return tokens


def _mlp(mlp: Any, normed_PD: Tensor) -> Tensor:
    """Return the gated MLP's output, [P, D] float32."""
    states = normed_PD.to(mlp.down_proj.weight.dtype)
    return with_headroom(mlp.down_proj, mlp.act_fn(mlp.gate_proj(states)) * mlp.up_proj(states))


def select_tokens(
    local_M: Tensor, global_M: Tensor, row_M: Tensor, column_M: Tensor, is_real_M: Tensor, *, num_keep: int
) -> Tensor:
    """Return the kept tokens in the image's raster order: [K] int64 indices into the M axis.

    Args:
        local_M: Scores for the half of the budget that windows share, float32 >= 0.
        global_M: Scores for the other half, float32 >= 0.
        row_M: Row of each token, integers as float32.
        column_M: Column of each token, likewise.
        is_real_M: False at padding, which ranks after every real token.
        num_keep: K <= M.
    """
    num_local = num_keep // 2
    index_M = torch.arange(local_M.shape[0])
    row_window_M, num_row_windows = _windows(row_M, is_real_M)
    column_window_M, num_column_windows = _windows(column_M, is_real_M)
    window_M = row_window_M * num_column_windows + column_window_M
    num_windows = num_row_windows * num_column_windows
    # not a number divided by a tensor: torch multiplies by the reciprocal, which may exceed an integer
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


def _windows(coordinate_M: Tensor, is_real_M: Tensor) -> tuple[Tensor, Tensor]:
    """Return each token's window along one axis, and the number of windows; the last window takes the rest."""
    masked_M, extent = _masked(coordinate_M, is_real_M)
    num_windows = torch.floor(extent / _TOKENS_PER_WINDOW_SIDE).clamp_min(1.0)
    return torch.minimum(torch.floor(masked_M / _TOKENS_PER_WINDOW_SIDE), num_windows - 1.0), num_windows


def _rank_in_window(scores_M: Tensor, window_M: Tensor, is_real_M: Tensor) -> Tensor:
    """Return each token's rank by descending score among the real tokens of its window, [M] float32."""
    index_M = torch.arange(scores_M.shape[0])
    is_before_MM = (scores_M[:, None] > scores_M) | (
        (scores_M[:, None] == scores_M) & (index_M[:, None] < index_M)
    )
    is_rival_MM = is_real_M[:, None] & (window_M[:, None] == window_M) & is_before_MM
    return is_rival_MM.to(torch.float32).sum(dim=0)


def merge_into_kept(tokens_MD: Tensor, kept_K: Tensor, is_real_M: Tensor) -> Tensor:
    """Return the kept tokens [K, D], each averaged with the dropped real ones that are most similar to it (cosine)."""
    values_MD = tokens_MD.float()
    unit_MD = values_MD / values_MD.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    nearest_M = torch.matmul(unit_MD, unit_MD.index_select(0, kept_K).transpose(0, 1)).argmax(dim=-1)
    is_kept_M = (kept_K[:, None] == torch.arange(tokens_MD.shape[0])).any(dim=0)
    is_nearest_KM = nearest_M == torch.arange(kept_K.shape[0])[:, None]
    takes_KM = (is_nearest_KM & is_real_M & ~is_kept_M).to(torch.float32)
    sums_KD = values_MD.index_select(0, kept_K) + torch.matmul(takes_KM, values_MD)
    return (sums_KD / (1.0 + takes_KM.sum(dim=-1, keepdim=True))).to(tokens_MD.dtype)


def raster_index(row_M: Tensor, column_M: Tensor, is_real_M: Tensor) -> Tensor:
    """Return each token's place in raster order, [M] float32; padding comes after all real tokens."""
    _, width = _masked(column_M, is_real_M)
    return torch.where(is_real_M, row_M * width + column_M, torch.arange(row_M.shape[0]).to(torch.float32))


def _masked(coordinate_M: Tensor, is_real_M: Tensor) -> tuple[Tensor, Tensor]:
    """Return the coordinates with 0 at padding, and the number of values among real tokens, 0-d."""
    masked_M = coordinate_M * is_real_M.to(torch.float32)
    return masked_M, masked_M.amax(dim=0) + 1.0
