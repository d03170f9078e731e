"""``vision`` of Ministral 3: patches of one image to visual tokens in raster order, by a Pixtral tower.

| I/O tensor          | shape  | dtype   | filled or read by                                                    |
|---------------------|--------|---------|----------------------------------------------------------------------|
| in  pixel_values    | [P, F] | float32 | runtime's image processing; F numbers per patch                      |
| in  patch_positions | [2, P] | int32   | runtime: row and column of each patch                                |
| in  num_patches     | [1]    | int32   | runtime: number of real patches; later ones are padding              |
| in  token_index     | [N]    | int32   | runtime: merged token of each visual token                           |
| out visual_tokens   | [N, D] | model   | runtime: placed into the prefix graph's ``inputs_embeds``            |

All layers attend to the whole image. Rows and columns have rotary frequencies of their own. The patches of a visual token
follow each other, so that merging them is a reshape. Padding patches must be finite: their values are multiplied by weights
of zero and reach no real patch.

Letters: P patches, M merged tokens (padded).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from trio_edge.export.graphs import linear_groups as groups
from trio_edge.export.graphs.assembly.copies import Copy, LayeredModule, Part
from trio_edge.export.graphs.vision.deepstack import PatchTables
from trio_edge.export.graphs.vision.patches import Rows, attention, with_headroom
from trio_edge.runtime.bundle import graph_io as io
from trio_edge.runtime.bundle.manifest import TensorSpec
from trio_edge.trio.cost.memory import num_head_blocks

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from trio_edge.runtime.bundle.manifest import FloatType

_TABLES = ("cos", "sin", "mask")


class PixtralVision(nn.Module):
    """Pixtral tower, and the projector that merges neighbouring patches."""

    def __init__(self, tower: nn.Module, projector: nn.Module, *, inv_freq: Tensor, max_patches: int) -> None:
        """Take the parts of transformers' PixtralVisionModel and Mistral3MultiModalProjector.

        Args:
            tower: The former.
            projector: The latter.
            inv_freq: [2, 1, E/4] ``inverse_frequencies``; without values under FakeTensorMode.
            max_patches: Largest P of any image.
        """
        super().__init__()
        core: Any = tower
        self.embedding = PixtralEmbedding(core)
        self.tables = PatchTables(inv_freq)
        self.layers = nn.ModuleList(
            PixtralLayer(layer, max_patches=max_patches) for layer in core.transformer.layers
        )
        self.merger = PixtralMerger(projector)

    def forward(
        self, pixel_values: Tensor, patch_positions: Tensor, num_patches: Tensor, token_index: Tensor
    ) -> Tensor:
        """Return the visual tokens [N, D]."""
        hidden_PD = self.embedding(pixel_values)
        rows = self.tables(patch_positions, num_patches)
        for layer in self.layers:
            hidden_PD = layer(hidden_PD, *rows)
        tokens: Tensor = self.merger(hidden_PD, token_index)
        return tokens

    def inputs(self) -> tuple[TensorSpec, ...]:
        """Return the graph's inputs."""
        return (
            TensorSpec(name=io.PIXEL_VALUES, dtype="float32", shape=("P", self.embedding.patch_values)),
            TensorSpec(name=io.PATCH_POSITIONS, dtype="int32", shape=(2, "P")),
            TensorSpec(name=io.NUM_PATCHES, dtype="int32", shape=(1,)),
            TensorSpec(name=io.TOKEN_INDEX, dtype="int32", shape=("N",)),
        )

    def layered(self, *, width: int, dtype: FloatType) -> LayeredModule:
        """Return the module as parts that are traced once each; ``width`` is D, ``dtype`` that of the output."""
        pixels, positions, count, index = self.inputs()
        hidden = TensorSpec(name="hidden", dtype="float32", shape=("P", self.embedding.width))
        tables = (
            *(
                TensorSpec(name=name, dtype="float32", shape=(1, "P", 1, 2 * self.tables.inv_freq.numel()))
                for name in _TABLES[:2]
            ),
            TensorSpec(name=_TABLES[2], dtype="float32", shape=(1, 1, 1, "P")),
        )
        tokens = TensorSpec(name=io.VISUAL_TOKENS, dtype=dtype, shape=("N", width))
        parts = {
            "embedding": Part(self.embedding, (pixels,), (hidden,)),
            "tables": Part(self.tables, (positions, count), tables),
            "layer": Part(self.layers[0], (hidden, *tables), (hidden,)),
            "merger": Part(self.merger, (hidden, index), (tokens,)),
        }
        last = len(self.layers)
        copies = (
            Copy("embedding", "embedding.", [io.PIXEL_VALUES], ["hidden.0"]),
            Copy("tables", "tables.", [io.PATCH_POSITIONS, io.NUM_PATCHES], _TABLES),
            *(
                Copy("layer", f"layers.{at}.", [f"hidden.{at}", *_TABLES], [f"hidden.{at + 1}"])
                for at in range(last)
            ),
            Copy("merger", "merger.", [f"hidden.{last}", io.TOKEN_INDEX], [io.VISUAL_TOKENS]),
        )
        return LayeredModule(parts=parts, copies=copies)

    def linear_groups(self) -> tuple[groups.LinearGroup, ...]:
        """Return the linear layers of tower and projector.

        The projector normalizes patches before it joins them, so its norm does not have one element per input.
        """
        parts: Any = self.merger.projector
        joining = parts.patch_merger.merging_layer
        found = [groups.LinearGroup(name="merge", layer=None, linears=(joining,), before=None)]
        found += groups.projector_groups(parts.linear_1, parts.linear_2, norm=joining)
        for index, wrapped in enumerate(self.layers):
            layer: Any = wrapped.layer
            found += groups.attention_groups(
                layer.attention, layer.attention.o_proj, norm=layer.attention_norm, index=index
            )
            found += groups.gated_mlp_groups(layer.feed_forward, norm=layer.ffn_norm, index=index)
        return tuple(found)


class PixtralEmbedding(nn.Module):
    """Embeddings of the patches, normalized."""

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.patch_conv: nn.Conv2d = tower.patch_conv
        self.norm: nn.Module = tower.ln_pre

    @property
    def width(self) -> int:
        """Numbers per hidden state."""
        return self.patch_conv.out_channels

    @property
    def patch_values(self) -> int:
        """Numbers per patch."""
        return self.patch_conv.weight[0].numel()

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return the hidden states [P, D] before the first layer, float32."""
        # the convolution's stride is its kernel size, so it is one product
        weight = self.patch_conv.weight
        embedded_PD = nn.functional.linear(pixel_values.to(weight.dtype), weight.flatten(1))
        hidden_PD: Tensor = self.norm(embedded_PD.float())
        return hidden_PD


class PixtralLayer(nn.Module):
    """One layer of the tower."""

    def __init__(self, layer: nn.Module, *, max_patches: int) -> None:
        super().__init__()
        self.layer = layer
        self.max_patches = max_patches

    def forward(self, hidden_PD: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """Return the hidden states after the layer, float32."""
        layer: Any = self.layer
        module, mlp = layer.attention, layer.feed_forward
        # a dynamic axis has no number while it is traced
        num_rows = hidden_PD.shape[0] if isinstance(hidden_PD.shape[0], int) else self.max_patches
        head_blocks = num_head_blocks(module.num_heads, num_rows)
        dtype = mlp.down_proj.weight.dtype
        states_PD = layer.attention_norm(hidden_PD).to(dtype)
        qkv_PX = torch.cat(
            [product(states_PD) for product in (module.q_proj, module.k_proj, module.v_proj)], -1
        )
        mixed_PD = attention(module, qkv_PX[None], Rows(cos, sin, mask), head_blocks=head_blocks)[0]
        hidden_PD = hidden_PD + module.o_proj(mixed_PD).float()
        states_PD = layer.ffn_norm(hidden_PD).to(dtype)
        gated = mlp.act_fn(mlp.gate_proj(states_PD)) * mlp.up_proj(states_PD)
        return hidden_PD + with_headroom(mlp.down_proj, gated)


class PixtralMerger(nn.Module):
    """Merges neighbouring patches into tokens, and gathers the tokens into their rows."""

    def __init__(self, projector: nn.Module) -> None:
        super().__init__()
        self.projector = projector

    def forward(self, hidden_PD: Tensor, token_index: Tensor) -> Tensor:
        """Return the tokens [N, D] in the weights' dtype."""
        parts: Any = self.projector
        joining = parts.patch_merger.merging_layer
        normed_PD = parts.norm(hidden_PD).to(joining.weight.dtype)
        merged = parts.patch_merger.spatial_merge_size**2
        # as unfold orders them: the patches of each feature follow each other
        joined = normed_PD.reshape(-1, merged, normed_PD.shape[1]).transpose(1, 2).flatten(1)
        tokens: Tensor = parts.linear_2(parts.act(parts.linear_1(joining(joined))))
        return tokens.index_select(0, token_index)


def inverse_frequencies(tower: nn.Module) -> NDArray[np.float32]:
    """Return the inverse frequencies of rows and of columns, [2, 1, E/4], also under FakeTensorMode."""
    core: Any = tower
    with unset_fake_temporarily():
        inv_freq, _ = type(core.patch_positional_embedding).compute_axial_rope_parameters(core.config)
        values: NDArray[np.float32] = inv_freq.to(torch.float32).reshape(2, 1, -1).numpy()
        return values
