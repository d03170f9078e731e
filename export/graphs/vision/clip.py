"""``vision`` with each visual token's patch in CLIP's space, for selections that compare patches with a text there.

| I/O tensor        | shape  | dtype | filled or read by                                                            |
|-------------------|--------|-------|------------------------------------------------------------------------------|
| in  pixel_values, token_index, out visual_tokens: as in ``vision.py``                                               |
| out clip_patches  | [N, Z] | model | reduce graph: last norm and projection of the tower's features, 0 at newlines |
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trio_edge.export.graphs.linear_groups import LinearGroup, mlp_groups, projector_groups
from trio_edge.runtime.bundle.errors import CheckpointError, ScheduleError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class VisionWithPatches(nn.Module):
    """A vision graph, and CLIP's own way on from the same features."""

    def __init__(self, vision: Vision, *, norm: nn.Module, projection: nn.Module) -> None:
        """Take the parts of ``vision``; ``norm`` and ``projection`` are CLIP's behind its tower."""
        super().__init__()
        self.features = vision.features
        self.projector = vision.projector
        self.newline = vision.newline
        self.norm = norm
        self.projection = projection

    def forward(self, pixel_values: Tensor, token_index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the visual tokens [N, D] and their patches [N, Z]."""
        features_BPF = self.features(pixel_values)
        tokens_RD = self.projector(features_BPF).flatten(0, 1)
        newline_D = tokens_RD[0] if self.newline is None else self.newline
        tokens_RD = torch.cat([tokens_RD, newline_D[None]], dim=0)
        patches_RZ = with_empty_row(self.projection(self.norm(features_BPF)).flatten(0, 1))
        return tokens_RD.index_select(0, token_index), patches_RZ.index_select(0, token_index)


# ``vision`` with what selectors in front of the decoder look at, of CLIP towers.
#
# | I/O tensor          | shape  | dtype   | filled or read by                                                          |
# |---------------------|--------|---------|----------------------------------------------------------------------------|
# | in  pixel_values, token_index, out visual_tokens: as in ``vision.py``                                               |
# | out features        | [N, F] | model   | reduce graph: the tower's features before the projector, 0 at newlines     |
# | out keys            | [N, E] | model   | reduce graph: keys of the layer before the last, mean over heads           |
# | out class_attention | [N]    | float32 | reduce graph: attention of the class row in that layer, mean over heads    |


class VisionWithFeatures(nn.Module):
    """Features, projector, newline row, and the gather of all of them in the decoder's order."""

    def __init__(
        self, features: ClipFeatures, projector: nn.Module, newline: nn.Parameter | None, *, observed: int
    ) -> None:
        """Take the parts of the tower.

        Args:
            features: Of the tower.
            projector: To the decoder's width.
            newline: Of LLaVA-NeXT.
            observed: Layer whose keys and attention are given: the one before the tower's last.

        Raises:
            CheckpointError: If that layer does not run.
        """
        super().__init__()
        if not 0 <= observed < len(features.layers):
            raise CheckpointError(
                f"vision_feature_layer: expected layer {observed} of the tower to run, got {len(features.layers)}"
                " layers that do; this selection needs it, choose another --token-method"
            )
        self.features = features
        self.projector = projector
        self.newline = newline
        self.observed = observed

    def tower_layers(self) -> nn.ModuleList:
        """The vision layers that run."""
        return self.features.layers

    def forward(self, pixel_values: Tensor, token_index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return visual tokens [N, D], features [N, F], keys [N, E] and class attention [N]."""
        hidden = self.features.pre_layrnorm(self.features.embeddings(pixel_values))
        states = [hidden]
        for index, layer in enumerate(self.features.layers):
            if index == self.observed:
                attention_BP = cls_attention(layer, hidden)
                keys_BPE = _mean_keys(layer, hidden)
            hidden = layer(hidden, attention_mask=None)
            states.append(hidden)
        features_BPF = torch.cat([states[index] for index in self.features.states], dim=-1)[:, 1:]
        tokens_RD = self.projector(features_BPF).flatten(0, 1)
        newline_D = tokens_RD[0] if self.newline is None else self.newline
        tokens_RD = torch.cat([tokens_RD, newline_D[None]], dim=0)
        features_N, keys_N, attention_N = (
            with_empty_row(rows.flatten(0, 1)).index_select(0, token_index)
            for rows in (features_BPF, keys_BPE, attention_BP)
        )
        return tokens_RD.index_select(0, token_index), features_N, keys_N, attention_N


def _mean_keys(layer: Any, hidden_BPD: Tensor) -> Tensor:
    """Return the attention keys of the patches, mean over heads: [B, P, E]."""
    attention = layer.self_attn
    keys = attention.k_proj(layer.layer_norm1(hidden_BPD))[:, 1:]  # the product that the layer itself has
    mean: Tensor = keys.unflatten(-1, (attention.num_heads, attention.head_dim)).mean(dim=2)
    return mean


def with_empty_row(rows: Tensor) -> Tensor:
    """Return the rows with one of zeros behind them, where the newline's index points."""
    return torch.cat([rows, torch.zeros_like(rows[:1])], dim=0)


# ``vision`` with encoder reduction: each tile keeps T patches, and the dropped ones are merged into them.
#
# | I/O tensor        | shape        | dtype   | filled or read by                                               |
# |-------------------|--------------|---------|-----------------------------------------------------------------|
# | in  pixel_values  | [B, 3, T, T] | float32 | as in ``vision.py``                                             |
# | in  token_index   | [N]          | int32   | runtime: row of the B * T kept rows for each visual token        |
# | out visual_tokens | [N, D]       | model   | as in ``vision.py``                                             |
# | out kept_patches  | [B, T]       | int32   | runtime: kept patches of each tile in raster order, for drawing |
#
# Half of the budget goes to windows (the best patches of each of 16 windows by the CLS row of an early layer's
# attention), half to the picture as a whole (the CLS row of the second-to-last layer). Every dropped patch is added to
# the kept one that is most like it after the projector, and each kept one is divided by one plus what it received.
#
# Source: the TRIO reference code's encoder stage for CLIP. We differ for LLaVA-NeXT: every tile keeps T patches and no
# newline token remains, so the count is fixed; the reference unpads afterwards and its count depends on the picture.


WINDOWS_PER_SIDE = 4
KEEP_MULTIPLE = 2 * WINDOWS_PER_SIDE**2
_LOCAL_LAYER_SHARE = 5 / 24  # layer 5 of CLIP-L's 24


def check_encoder_keep(num_keep: int, *, patches_per_side: int) -> None:
    """Raise ScheduleError unless a tile of this many patches can keep ``num_keep`` of them."""
    num_patches = patches_per_side**2
    if patches_per_side % WINDOWS_PER_SIDE:
        raise ScheduleError(
            f"--encoder-keep: expected tiles of {WINDOWS_PER_SIDE} x {WINDOWS_PER_SIDE} equal windows,"
            f" got {patches_per_side} patches a side; export without it"
        )
    if num_keep % KEEP_MULTIPLE or not KEEP_MULTIPLE <= num_keep < num_patches:
        raise ScheduleError(
            f"--encoder-keep: expected a multiple of {KEEP_MULTIPLE} below {num_patches} (patches of a tile),"
            f" got {num_keep}"
        )


class ReducedVision(nn.Module):
    """CLIP tower, projector, selection of T patches per tile, and merging of the others."""

    def __init__(
        self, tower: nn.Module, projector: nn.Module, *, feature_layers: tuple[int, ...], num_keep: int
    ) -> None:
        super().__init__()
        core: Any = getattr(tower, "vision_model", tower)
        num_layers = len(core.encoder.layers)
        self.states = tuple(range(num_layers + 1)[layer] for layer in feature_layers)
        self.global_layer = num_layers - 2
        self.local_layer = min(round(_LOCAL_LAYER_SHARE * num_layers), self.global_layer)
        self.embeddings: nn.Module = core.embeddings
        self.pre_layrnorm: nn.Module = core.pre_layrnorm
        self.layers = nn.ModuleList(core.encoder.layers[: max(*self.states, self.global_layer + 1)])
        self.projector = projector
        self.num_keep = num_keep

    def tower_layers(self) -> nn.ModuleList:
        """The vision layers that run."""
        return self.layers

    def forward(self, pixel_values: Tensor, token_index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the visual tokens [N, D] and the kept patches [B, T]."""
        hidden: Tensor = self.pre_layrnorm(self.embeddings(pixel_values))
        states, attention = [hidden], {}
        for index, layer in enumerate(self.layers):
            if index in (self.local_layer, self.global_layer):
                attention[index] = cls_attention(layer, hidden)
            hidden = layer(hidden, attention_mask=None)
            states.append(hidden)
        features = torch.cat([states[index] for index in self.states], dim=-1)[:, 1:]
        tokens_BPD = self.projector(features)
        kept_BT = select_patches(
            attention[self.local_layer], attention[self.global_layer], num_keep=self.num_keep
        )
        rows = merge_dropped(tokens_BPD, kept_BT).flatten(0, 1)
        return rows.index_select(0, token_index), kept_BT.to(torch.int32)


def cls_attention(layer: Any, hidden_BPD: Tensor) -> Tensor:
    """Return the attention of the CLS row to the patches in ``layer``, mean over heads: [B, P] float32."""
    attention = layer.self_attn
    normed = layer.layer_norm1(hidden_BPD)
    heads, size = attention.num_heads, attention.head_dim
    query = attention.q_proj(normed[:, :1]).unflatten(-1, (heads, size)).transpose(1, 2)
    key = attention.k_proj(normed).unflatten(-1, (heads, size)).transpose(1, 2)
    scores = torch.matmul(query * attention.scale, key.transpose(-1, -2)).float()
    return torch.softmax(scores, dim=-1).mean(dim=1)[:, 0, 1:]


def select_patches(local_BP: Tensor, global_BP: Tensor, *, num_keep: int) -> Tensor:
    """Return the kept patches of each tile in raster order: [B, T] int64.

    Args:
        local_BP: Scores for the best patches of each window.
        global_BP: Scores for the rest of the budget, among all other patches.
        num_keep: T, a multiple of 32.
    """
    B, P = local_BP.shape
    side = round(P**0.5)
    window = side // WINDOWS_PER_SIDE
    per_window = num_keep // KEEP_MULTIPLE
    grid = torch.arange(P).reshape(WINDOWS_PER_SIDE, window, WINDOWS_PER_SIDE, window)
    patch_of_window = grid.permute(0, 2, 1, 3).reshape(WINDOWS_PER_SIDE**2, window * window)
    windowed = local_BP[:, patch_of_window.flatten()].reshape(B, WINDOWS_PER_SIDE**2, window * window)
    best = windowed.topk(per_window, dim=-1).indices
    offset = torch.arange(WINDOWS_PER_SIDE**2)[None, :, None] * (window * window)
    local = patch_of_window.flatten()[(best + offset).flatten()].reshape(B, num_keep // 2)
    patch_P = torch.arange(P)
    is_local_BP = (local[:, :, None] == patch_P).any(dim=1)
    rest = global_BP.masked_fill(is_local_BP, -1.0).topk(num_keep - num_keep // 2, dim=-1).indices
    is_kept_BP = is_local_BP | (rest[:, :, None] == patch_P).any(dim=1)
    raster = torch.where(is_kept_BP, (P - patch_P).to(torch.float32), 0.0)
    return raster.topk(num_keep, dim=-1).indices


def merge_dropped(tokens_BPD: Tensor, kept_BT: Tensor) -> Tensor:
    """Return the kept tokens [B, T, D] with every dropped token averaged into the kept one most like it (cosine)."""
    index = kept_BT[:, :, None].expand(-1, -1, tokens_BPD.shape[-1])
    kept_BTD = tokens_BPD.gather(1, index)
    values = tokens_BPD.float()
    unit = values / values.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    unit_kept = unit.gather(1, index)
    nearest_BP = torch.matmul(unit, unit_kept.transpose(-1, -2)).argmax(dim=-1)
    is_kept_BP = (kept_BT[:, :, None] == torch.arange(tokens_BPD.shape[1])).any(dim=1)
    slots = torch.arange(kept_BT.shape[1])
    takes_BTP = ((nearest_BP[:, None, :] == slots[None, :, None]) & ~is_kept_BP[:, None, :]).float()
    merged = (kept_BTD.float() + torch.matmul(takes_BTP, values)) / (
        1.0 + takes_BTP.sum(dim=-1, keepdim=True)
    )
    return merged.to(tokens_BPD.dtype)


# ``vision``: picture tiles to visual tokens.
#
# | I/O tensor        | shape        | dtype   | filled or read by                                                       |
# |-------------------|--------------|---------|-------------------------------------------------------------------------|
# | in  pixel_values  | [B, 3, T, T] | float32 | runtime's image processing; B tiles, the base tile first                |
# | in  token_index   | [N]          | int32   | runtime: which feature row each visual token is                         |
# | out visual_tokens | [N, D]       | model   | runtime: placed into the prefix graph's ``inputs_embeds``               |
#
# Feature rows are tile-major, patches in raster order, and one newline row last. All of anyres tiling, unpadding and
# newline placement is in ``token_index``, so the graph has no picture-dependent shape.


class ClipFeatures(nn.Module):
    """Hidden states of chosen CLIP layers without the CLS row. Layers that nothing reads are not run."""

    def __init__(self, tower: nn.Module, *, feature_layers: tuple[int, ...]) -> None:
        """Take the parts of ``tower`` that are needed.

        Args:
            tower: transformers' CLIPVisionModel.
            feature_layers: Indices into its hidden states (0 is the embedding, -1 the last layer's output).
        """
        super().__init__()
        core: Any = getattr(tower, "vision_model", tower)
        num_states = len(core.encoder.layers) + 1
        self.states = tuple(range(num_states)[layer] for layer in feature_layers)
        self.embeddings: nn.Module = core.embeddings
        self.pre_layrnorm: nn.Module = core.pre_layrnorm
        self.layers = nn.ModuleList(core.encoder.layers[: max(self.states)])

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return features [B, P, F] of all tiles."""
        hidden = self.pre_layrnorm(self.embeddings(pixel_values))
        states = [hidden]
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=None)
            states.append(hidden)
        features = torch.cat([states[index] for index in self.states], dim=-1)
        return features[:, 1:]


class Vision(nn.Module):
    """Features, projector, newline row, and the gather that puts the visual tokens in order."""

    def __init__(self, features: ClipFeatures, projector: nn.Module, newline: nn.Parameter | None) -> None:
        super().__init__()
        self.features = features
        self.projector = projector
        self.newline = newline

    def tower_layers(self) -> nn.ModuleList:
        """The vision layers that run."""
        return self.features.layers

    def forward(self, pixel_values: Tensor, token_index: Tensor) -> Tensor:
        """Return the visual tokens [N, D]."""
        rows_FD = self.projector(self.features(pixel_values)).flatten(0, 1)
        newline_D = rows_FD[0] if self.newline is None else self.newline
        rows_FD = torch.cat([rows_FD, newline_D[None]], dim=0)
        return rows_FD.index_select(0, token_index)


def clip_groups(layers: Iterable[nn.Module], projector: nn.Module) -> tuple[LinearGroup, ...]:
    """Return the linear layers of CLIP's ``layers`` and of a LLaVA's projector, which reads hidden states without a norm."""
    parts: Any = projector
    return (
        *(group for index, layer in enumerate(layers) for group in _layer_groups(layer, index)),
        *projector_groups(parts.linear_1, parts.linear_2, norm=None),
    )


def _layer_groups(layer: Any, index: int) -> Iterator[LinearGroup]:
    attention = layer.self_attn
    products = attention.q_proj, attention.k_proj, attention.v_proj
    yield LinearGroup(name="qkv", layer=index, linears=products, before=layer.layer_norm1)
    yield LinearGroup(name="o", layer=index, linears=(attention.out_proj,), before=attention.v_proj)
    yield from mlp_groups(layer.mlp, norm=layer.layer_norm2, index=index)
