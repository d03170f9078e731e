"""``vision`` of the Qwen3-VL family: patches of one image to visual tokens and DeepStack's planes, in raster order.

| I/O tensor                 | shape  | dtype   | filled or read by                                                    |
|----------------------------|--------|---------|----------------------------------------------------------------------|
| in  pixel_values           | [P, F] | float32 | runtime's image processing; F numbers per patch                      |
| in  patch_positions        | [2, P] | int32   | runtime: row and column of each patch                                |
| in  table_index            | [4, P] | int32   | runtime: entries of the position table around each patch             |
| in  table_weights          | [4, P] | float32 | runtime: their weights                                               |
| in  num_patches            | [1]    | int32   | runtime: number of real patches; later ones are padding              |
| in  token_index            | [N]    | int32   | runtime: merged token of each visual token                           |
| out visual_tokens          | [N, D] | model   | runtime: placed into the prefix graph's ``inputs_embeds``            |
| out deepstack_tokens.{i}   | [N, D] | model   | runtime: placed into ``deepstack_embeds.{i}``, added after layer i   |

All layers attend to the whole image. The planes are outputs of inner layers, each through its own merger. Padding patches
must be finite: their values are multiplied by weights of zero and reach no real patch.

Letters: P patches, M merged tokens (padded).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trio_edge.export.graphs import linear_groups as groups
from trio_edge.export.graphs.assembly.copies import Copy, LayeredModule, Part
from trio_edge.export.graphs.vision.patches import Rows, attention, embedded, rows_at, with_headroom
from trio_edge.runtime.bundle import graph_io as io
from trio_edge.runtime.bundle.manifest import TensorSpec
from trio_edge.trio.cost.memory import num_head_blocks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trio_edge.runtime.bundle.manifest import FloatType

INV_FREQ_NAME = "tables.inv_freq"
"""The graph's one constant, [E/4]."""
_PATCHES = (io.PIXEL_VALUES, io.TABLE_INDEX, io.TABLE_WEIGHTS)
_PLACES = (io.PATCH_POSITIONS, io.NUM_PATCHES)
_TABLES = ("cos", "sin", "mask")


class DeepstackVision(nn.Module):
    """Encoder, mergers of neighbouring patches, and the gather that pads the visual tokens."""

    def __init__(self, visual: nn.Module, *, inv_freq: Tensor, max_patches: int, num_planes: int) -> None:
        """Take the parts of ``visual``.

        Args:
            visual: transformers' Qwen3VLVisionModel.
            inv_freq: [E/4]; without values under FakeTensorMode.
            max_patches: Largest P of any image.
            num_planes: Most planes; the decoder has no layers for more.
        """
        super().__init__()
        core: Any = visual
        mergers = plane_mergers(core, num_planes)
        self.plane_layers = list(mergers)
        self.embedding = PatchEmbedding(core)
        self.tables = PatchTables(inv_freq)
        self.layers = nn.ModuleList(PatchLayer(block, max_patches=max_patches) for block in core.blocks)
        self.merger = TokenMerger(core.merger)
        self.plane_mergers = nn.ModuleList(TokenMerger(merger) for merger in mergers.values())

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the visual tokens [N, D], then the planes [N, D]."""
        names = [tensor.name for tensor in vision_inputs(self.embedding.patch_values)]
        values = dict(zip(names, inputs))
        for copy in self._copies():
            found = self.get_submodule(copy.weights[:-1])(*(values[name] for name in copy.inputs))
            values |= zip(copy.outputs, found if isinstance(found, tuple) else [found])
        planes = range(len(self.plane_layers))
        return values[io.VISUAL_TOKENS], *(values[f"{io.DEEPSTACK_TOKENS}{plane}"] for plane in planes)

    def layered(self, *, width: int, dtype: FloatType) -> LayeredModule:
        """Return the module as parts that are traced once each; ``width`` is D, ``dtype`` that of the outputs."""
        inputs = {tensor.name: tensor for tensor in vision_inputs(self.embedding.patch_values)}
        hidden = TensorSpec(name="hidden", dtype="float32", shape=("P", self.embedding.width))
        head_size = 4 * len(self.tables.inv_freq)
        tables = (
            *(TensorSpec(name=name, dtype="float32", shape=(1, "P", 1, head_size)) for name in _TABLES[:2]),
            TensorSpec(name=_TABLES[2], dtype="float32", shape=(1, 1, 1, "P")),
        )
        patches, places = (tuple(inputs[name] for name in names) for names in (_PATCHES, _PLACES))
        parts = {
            "embedding": Part(self.embedding, patches, (hidden,)),
            "tables": Part(self.tables, places, tables),
            "layer": Part(self.layers[0], (hidden, *tables), (hidden,)),
        }
        mergers = {"merger": self.merger, "plane_merger": next(iter(self.plane_mergers), None)}
        for name, merger in mergers.items():
            if merger is not None:
                tokens = TensorSpec(name=f"{name}_tokens", dtype=dtype, shape=("N", width))
                parts[name] = Part(merger, (hidden, inputs[io.TOKEN_INDEX]), (tokens,))
        return LayeredModule(parts=parts, copies=tuple(self._copies()))

    def _copies(self) -> Iterator[Copy]:
        """Yield the parts in their order, with the names of the values between them."""
        yield Copy("embedding", "embedding.", _PATCHES, ["hidden.0"])
        yield Copy("tables", "tables.", _PLACES, _TABLES)
        for index in range(len(self.layers)):
            after = f"hidden.{index + 1}"
            yield Copy("layer", f"layers.{index}.", [f"hidden.{index}", *_TABLES], [after])
            if index in self.plane_layers:
                plane = self.plane_layers.index(index)
                tokens = f"{io.DEEPSTACK_TOKENS}{plane}"
                yield Copy("plane_merger", f"plane_mergers.{plane}.", [after, io.TOKEN_INDEX], [tokens])
        yield Copy("merger", "merger.", [f"hidden.{len(self.layers)}", io.TOKEN_INDEX], [io.VISUAL_TOKENS])


def vision_inputs(patch_values: int) -> tuple[TensorSpec, ...]:
    """Return the graph's inputs, for patches of ``patch_values`` numbers."""
    return (
        TensorSpec(name=io.PIXEL_VALUES, dtype="float32", shape=("P", patch_values)),
        TensorSpec(name=io.PATCH_POSITIONS, dtype="int32", shape=(2, "P")),
        TensorSpec(name=io.TABLE_INDEX, dtype="int32", shape=(4, "P")),
        TensorSpec(name=io.TABLE_WEIGHTS, dtype="float32", shape=(4, "P")),
        TensorSpec(name=io.NUM_PATCHES, dtype="int32", shape=(1,)),
        TensorSpec(name=io.TOKEN_INDEX, dtype="int32", shape=("N",)),
    )


class PatchEmbedding(nn.Module):
    """Embeddings of the patches and their positions."""

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.patch_embed: nn.Module = visual.patch_embed
        self.pos_embed: nn.Embedding = visual.pos_embed

    @property
    def width(self) -> int:
        """Numbers per hidden state."""
        return self.pos_embed.embedding_dim

    @property
    def patch_values(self) -> int:
        """Numbers per patch."""
        weight: Tensor = self.patch_embed.get_submodule("proj").get_parameter("weight")
        return weight[0].numel()

    def forward(self, pixel_values: Tensor, table_index: Tensor, table_weights: Tensor) -> Tensor:
        """Return the hidden states [P, D] before the first layer, float32."""
        hidden_PD = embedded(self.patch_embed, pixel_values).float()
        table = self.pos_embed.weight
        for corner in range(4):  # one corner after the other, to save memory
            entry_PD = table.index_select(0, table_index[corner]).float()
            hidden_PD = hidden_PD + entry_PD * table_weights[corner][:, None]
        return hidden_PD


class PatchTables(nn.Module):
    """The tables that the attention of all layers reads."""

    inv_freq: Tensor

    def __init__(self, inv_freq: Tensor) -> None:
        super().__init__()
        self.register_buffer("inv_freq", inv_freq)

    def forward(self, patch_positions: Tensor, num_patches: Tensor) -> Rows:
        """Return the tables of P patches; the first ``num_patches`` are real."""
        is_real_P = torch.arange(patch_positions.shape[1]) < num_patches
        return rows_at(self.inv_freq, patch_positions, is_real_P)


class PatchLayer(nn.Module):
    """One layer of the encoder."""

    def __init__(self, block: nn.Module, *, max_patches: int) -> None:
        super().__init__()
        self.block = block
        self.max_patches = max_patches

    def forward(self, hidden_PD: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """Return the hidden states after the layer, float32."""
        block: Any = self.block
        # a dynamic axis has no number while it is traced
        num_rows = hidden_PD.shape[0] if isinstance(hidden_PD.shape[0], int) else self.max_patches
        head_blocks = num_head_blocks(block.attn.num_heads, num_rows)
        qkv_PX = block.attn.qkv(_normed(block.norm1, hidden_PD).to(block.attn.qkv.weight.dtype))
        mixed_PD = attention(block.attn, qkv_PX[None], Rows(cos, sin, mask), head_blocks=head_blocks)[0]
        hidden_PD = hidden_PD + block.attn.proj(mixed_PD).float()
        states = block.mlp.linear_fc1(_normed(block.norm2, hidden_PD).to(block.mlp.linear_fc1.weight.dtype))
        return hidden_PD + with_headroom(block.mlp.linear_fc2, block.mlp.act_fn(states))


class TokenMerger(nn.Module):
    """Merges neighbouring patches into tokens, and gathers the tokens into their rows."""

    def __init__(self, merger: nn.Module) -> None:
        super().__init__()
        self.merger = merger

    def forward(self, hidden_PD: Tensor, token_index: Tensor) -> Tensor:
        """Return the tokens [N, D] in the weights' dtype."""
        merger: Any = self.merger
        if merger.use_postshuffle_norm:
            normed = _normed(merger.norm, hidden_PD.view(-1, merger.hidden_size))
        else:
            normed = _normed(merger.norm, hidden_PD).view(-1, merger.hidden_size)
        states = merger.act_fn(merger.linear_fc1(normed.to(merger.linear_fc1.weight.dtype)))
        tokens: Tensor = merger.linear_fc2(states)
        return tokens.index_select(0, token_index)


def plane_mergers(visual: nn.Module, num_planes: int) -> dict[int, nn.Module]:
    """Return the mergers of at most ``num_planes`` planes, by the layer whose output they read, ascending.

    As transformers, it ignores indices that are no layer, and the second of two equal ones.
    """
    core: Any = visual
    indexes = list(getattr(core, "deepstack_visual_indexes", ()))  # Qwen3.5 has none
    layers = sorted(set(indexes) & set(range(len(core.blocks))))
    return {layer: core.deepstack_merger_list[indexes.index(layer)] for layer in layers[:num_planes]}


def deepstack_groups(visual: nn.Module, *, num_planes: int) -> tuple[groups.LinearGroup, ...]:
    """Return the linear layers of transformers' Qwen3VLVisionModel that run.

    The last merger normalizes patches before it joins four of them, so its norm does not have one element per input. The
    planes' mergers normalize after that.
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


def _block_groups(block: Any, index: int) -> Iterator[groups.LinearGroup]:
    yield from groups.fused_attention_groups(block.attn, norm=block.norm1, index=index)
    yield from groups.mlp_groups(block.mlp.linear_fc1, block.mlp.linear_fc2, norm=block.norm2, index=index)


def _merger_groups(merger: Any, name: str) -> tuple[groups.LinearGroup, groups.LinearGroup]:
    norm = merger.norm if merger.use_postshuffle_norm else None
    return groups.projector_groups(merger.linear_fc1, merger.linear_fc2, norm=norm, name=name)


def _normed(norm: Any, hidden: Tensor) -> Tensor:
    """Return the layer norm, computed in float32."""
    return nn.functional.layer_norm(
        hidden, norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps
    )
