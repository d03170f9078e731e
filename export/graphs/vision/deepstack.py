"""``vision`` of the Qwen3-VL family: patches of one image to visual tokens and DeepStack's planes, in raster order.

| I/O tensor                 | shape  | dtype   | filled or read by                                                    |
|----------------------------|--------|---------|----------------------------------------------------------------------|
| in  pixel_values           | [P, F] | float32 | runtime's image processing; F numbers of each patch                  |
| in  patch_positions        | [2, P] | int32   | runtime: row and column of each patch                                |
| in  table_index            | [4, P] | int32   | runtime: the entries of the table of positions around each patch     |
| in  table_weights          | [4, P] | float32 | runtime: their shares                                                |
| in  num_patches            | [1]    | int32   | runtime: real patches; those from there on are padding               |
| in  token_index            | [N]    | int32   | runtime: merged token of each visual token                           |
| out visual_tokens          | [N, D] | model   | runtime: placed into the prefix graph's ``inputs_embeds``            |
| out deepstack_tokens.{i}   | [N, D] | model   | runtime: placed into ``deepstack_embeds.{i}``, added behind layer i  |

All layers attend to the whole image. The outputs of some inner ones go through mergers of their own: these are the planes.
Padding patches must be finite: their values reach no real patch, but they are multiplied by weights that are zero.

Letters: P patches, M merged tokens (padded).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trio_edge.export.graphs.linear_groups import LinearGroup
from trio_edge.export.graphs.vision.patches import attention, embedded, rows_at, with_headroom
from trio_edge.trio.cost.memory import num_head_blocks

if TYPE_CHECKING:
    from collections.abc import Iterator

INV_FREQ_NAME = "inv_freq"
"""The graph's one constant, [E/4]."""


class DeepstackVision(nn.Module):
    """Encoder, mergers of neighbouring patches, and the gather that pads the visual tokens."""

    inv_freq: Tensor

    def __init__(self, visual: nn.Module, *, inv_freq: Tensor, max_patches: int, num_planes: int) -> None:
        """Take the parts of ``visual``.

        Args:
            visual: transformers' Qwen3VLVisionModel.
            inv_freq: [E/4]; without values under FakeTensorMode.
            max_patches: Largest P of any image.
            num_planes: Planes that the decoder has layers for.
        """
        super().__init__()
        core: Any = visual
        self.patch_embed: nn.Module = core.patch_embed
        self.pos_embed: nn.Embedding = core.pos_embed
        self.blocks: nn.ModuleList = core.blocks
        self.merger: nn.Module = core.merger
        self.max_patches = max_patches
        mergers = plane_mergers(core, num_planes)
        self.plane_layers = list(mergers)
        self.plane_mergers = nn.ModuleList(mergers.values())
        self.register_buffer("inv_freq", inv_freq)

    def forward(
        self,
        pixel_values: Tensor,
        patch_positions: Tensor,
        table_index: Tensor,
        table_weights: Tensor,
        num_patches: Tensor,
        token_index: Tensor,
    ) -> tuple[Tensor, ...]:
        """Return the visual tokens [N, D], then the planes [N, D]."""
        hidden_PD = embedded(self.patch_embed, pixel_values).float()
        hidden_PD = hidden_PD + self._places(table_index, table_weights)
        is_real_P = torch.arange(pixel_values.shape[0]) < num_patches
        rows = rows_at(self.inv_freq, patch_positions, is_real_P)
        # an axis that is traced as dynamic has no number
        num_rows = pixel_values.shape[0] if isinstance(pixel_values.shape[0], int) else self.max_patches
        planes = []
        block: Any
        for index, block in enumerate(self.blocks):
            qkv_PX = block.attn.qkv(_normed(block.norm1, hidden_PD).to(block.attn.qkv.weight.dtype))
            head_blocks = num_head_blocks(block.attn.num_heads, num_rows)
            mixed_PD = attention(block.attn, qkv_PX[None], rows, head_blocks=head_blocks)[0]
            hidden_PD = hidden_PD + block.attn.proj(mixed_PD).float()
            hidden_PD = hidden_PD + _mlp(block.mlp, _normed(block.norm2, hidden_PD))
            if index in self.plane_layers:
                merger = self.plane_mergers[self.plane_layers.index(index)]
                planes.append(_merged(merger, hidden_PD))
        tokens_MD = _merged(self.merger, hidden_PD)
        return tuple(rows_MD.index_select(0, token_index) for rows_MD in (tokens_MD, *planes))

    def _places(self, table_index: Tensor, table_weights: Tensor) -> Tensor:
        """Return what stands for the patches' places, [P, D] float32; one entry of the table after the other saves memory."""
        table = self.pos_embed.weight
        first, *others = (
            table.index_select(0, table_index[corner]).float() * table_weights[corner][:, None]
            for corner in range(4)
        )
        for more in others:
            first = first + more
        return first


def plane_mergers(visual: nn.Module, num_planes: int) -> dict[int, nn.Module]:
    """Return the mergers of at most ``num_planes`` planes by the layer whose output they read, ascending.

    transformers takes no plane of an index that is no layer, and one of an index that is there twice.
    """
    core: Any = visual
    indexes = list(core.deepstack_visual_indexes)
    layers = sorted(set(indexes) & set(range(len(core.blocks))))
    return {layer: core.deepstack_merger_list[indexes.index(layer)] for layer in layers[:num_planes]}


def deepstack_groups(visual: nn.Module, *, num_planes: int) -> tuple[LinearGroup, ...]:
    """Return the linear layers of transformers' Qwen3VLVisionModel that run.

    Four patches with one norm each are one input of the last merger, so its norm has no element for each of its inputs; those
    of the planes come after four patches are one row.
    """
    core: Any = visual
    mergers = {
        f"plane_{index}": merger for index, merger in enumerate(plane_mergers(core, num_planes).values())
    }
    return (
        *(group for index, block in enumerate(core.blocks) for group in _block_groups(block, index)),
        *(group for name, merger in mergers.items() for group in _merger_groups(merger, name)),
        *_merger_groups(core.merger, "projector"),
    )


def _block_groups(block: Any, index: int) -> Iterator[LinearGroup]:
    qkv, values, mlp = block.attn.qkv, 2 * block.attn.dim, block.mlp
    yield LinearGroup(name="qkv", layer=index, linears=(qkv,), before=block.norm1)
    yield LinearGroup(name="o", layer=index, linears=(block.attn.proj,), before=qkv, start=values)
    yield LinearGroup(name="fc1", layer=index, linears=(mlp.linear_fc1,), before=block.norm2)
    yield LinearGroup(name="fc2", layer=index, linears=(mlp.linear_fc2,), before=None)


def _merger_groups(merger: Any, name: str) -> Iterator[LinearGroup]:
    norm = merger.norm if merger.use_postshuffle_norm else None
    yield LinearGroup(name=f"{name}_1", layer=None, linears=(merger.linear_fc1,), before=norm)
    yield LinearGroup(name=f"{name}_2", layer=None, linears=(merger.linear_fc2,), before=None)


def _normed(norm: Any, hidden: Tensor) -> Tensor:
    """Return the layer norm in float32."""
    return nn.functional.layer_norm(
        hidden, norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps
    )


def _merged(merger: Any, hidden_PD: Tensor) -> Tensor:
    """Return the tokens of all patches in their order, [M, D] in the weights' dtype."""
    if merger.use_postshuffle_norm:
        normed = _normed(merger.norm, hidden_PD.view(-1, merger.hidden_size))
    else:
        normed = _normed(merger.norm, hidden_PD).view(-1, merger.hidden_size)
    states = merger.act_fn(merger.linear_fc1(normed.to(merger.linear_fc1.weight.dtype)))
    return merger.linear_fc2(states)  # type: ignore[no-any-return]


def _mlp(mlp: Any, normed_PD: Tensor) -> Tensor:
    states = mlp.act_fn(mlp.linear_fc1(normed_PD.to(mlp.linear_fc1.weight.dtype)))
    return with_headroom(mlp.linear_fc2, states)
