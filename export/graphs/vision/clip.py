"""``vision`` of LLaVA-1.5 and LLaVA-NeXT: image tiles to visual tokens, by a CLIP tower.

| I/O tensor          | shape        | dtype   | filled or read by                                                           |
|---------------------|--------------|---------|-----------------------------------------------------------------------------|
| in  pixel_values    | [B, 3, T, T] | float32 | runtime's image processing; B tiles, the base tile first                    |
| in  token_index     | [N]          | int32   | runtime: the feature row of each visual token                               |
| out visual_tokens   | [N, D]       | model   | runtime: placed into the prefix graph's ``inputs_embeds``                   |
| out features        | [N, F]       | model   | reduce graph: the tower's features before the projector, 0 at newlines (1)  |
| out keys            | [N, E]       | model   | reduce graph: keys of the layer before the last, mean over heads (1)        |
| out class_attention | [N]          | float32 | reduce graph: attention of the class row in that layer, mean over heads (1) |
| out clip_patches    | [N, Z]       | model   | reduce graph: last norm and projection of the features, 0 at newlines (2)   |
| out kept_patches    | [B, T]       | int32   | runtime: kept patches of each tile in raster order, for drawing (3)         |

(1) For selectors that read the class row. (2) For those that compare patches with a text in CLIP's space. (3) Encoder
reduction, ``ReducedVision``.

Feature rows are tile-major with patches in raster order, and one newline row last. ``token_index`` expresses anyres tiling,
unpadding and newlines, so no shape of the graph depends on the image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trio_edge.export.graphs.linear_groups import LinearGroup, attention_groups, mlp_groups, projector_groups
from trio_edge.runtime.bundle.errors import CheckpointError, ScheduleError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

WINDOWS_PER_SIDE = 4
KEEP_MULTIPLE = 2 * WINDOWS_PER_SIDE**2
"""Half of a tile's kept patches are divided among its windows, so their number is a multiple of this."""
_LOCAL_LAYER_SHARE = 5 / 24  # layer 5 of CLIP-L's 24


class ClipFeatures(nn.Module):
    """Hidden states of chosen CLIP layers, without the class row. Unused layers do not run."""

    def __init__(self, tower: nn.Module, *, feature_layers: tuple[int, ...], reaches: int = 0) -> None:
        """Take the used parts of ``tower``, transformers' CLIPVisionModel.

        ``feature_layers`` are indices into its hidden states (0 is the embedding, -1 the last layer's output), and so is
        ``reaches``, a state that is computed although it is no feature.
        """
        super().__init__()
        core: Any = getattr(tower, "vision_model", tower)
        self.num_layers = len(core.encoder.layers)
        last, *states = (range(self.num_layers + 1)[layer] for layer in (reaches, *feature_layers))
        self.states = tuple(states)
        self.embeddings: nn.Module = core.embeddings
        self.pre_layrnorm: nn.Module = core.pre_layrnorm
        self.layers = nn.ModuleList(core.encoder.layers[: max(last, *states)])

    def run(self, pixel_values: Tensor, observe: Callable[[int, Any, Tensor], None]) -> Tensor:
        """Return the features [B, P, F]; ``observe`` is called with each layer and its input [B, P + 1, D]."""
        hidden: Tensor = self.pre_layrnorm(self.embeddings(pixel_values))
        states = [hidden]
        for index, layer in enumerate(self.layers):
            observe(index, layer, hidden)
            hidden = layer(hidden, attention_mask=None)
            states.append(hidden)
        return torch.cat([states[index] for index in self.states], dim=-1)[:, 1:]


class ClipVision(nn.Module):
    """Features, projector, newline row, and the gather that orders the visual tokens."""

    def __init__(
        self,
        features: ClipFeatures,
        projector: nn.Module,
        newline: nn.Parameter | None,
        *,
        observed: int | None = None,
        clip: tuple[nn.Module, nn.Module] | None = None,
    ) -> None:
        """Take the parts of the tower, and what selectors need.

        Args:
            features: The tower.
            projector: LLaVA's projector.
            newline: The newline row, if there is one.
            observed: The layer whose keys and class attention are returned, with the features; None returns none of them.
            clip: CLIP's own norm and projection of its features, if patches in CLIP's space are returned.

        Raises:
            CheckpointError: If the observed layer does not run.
        """
        super().__init__()
        if observed is not None and not 0 <= observed < len(features.layers):
            raise CheckpointError(
                f"--token-method: expected one without keys of the vision tower's layer {observed}, as only"
                f" {len(features.layers)} layers run (vision_feature_layer), got one that needs it; choose another"
            )
        self.features, self.projector = features, projector
        self.newline, self.observed = newline, observed
        self.norm: nn.Module | None
        self.projection: nn.Module | None
        self.norm, self.projection = clip or (None, None)

    def forward(self, pixel_values: Tensor, token_index: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return the visual tokens [N, D]; then features [N, F], keys [N, E] and class attention [N], or patches [N, Z]."""
        seen: list[Tensor] = []

        def observe(index: int, layer: Any, hidden: Tensor) -> None:
            if index == self.observed:
                seen.extend([class_attention(layer, hidden), _mean_keys(layer, hidden)])

        features_BPF = self.features.run(pixel_values, observe)
        tokens_RD = with_newline(self.projector(features_BPF).flatten(0, 1), self.newline)
        if self.norm is not None and self.projection is not None:
            patches_RZ = _with_empty_row(self.projection(self.norm(features_BPF)).flatten(0, 1))
            return tokens_RD.index_select(0, token_index), patches_RZ.index_select(0, token_index)
        if self.observed is None:
            return tokens_RD.index_select(0, token_index)
        attention_BP, keys_BPE = seen
        features_N, keys_N, attention_N = (
            _with_empty_row(rows.flatten(0, 1)).index_select(0, token_index)
            for rows in (features_BPF, keys_BPE, attention_BP)
        )
        return tokens_RD.index_select(0, token_index), features_N, keys_N, attention_N


class ReducedVision(ClipFeatures):
    """CLIP tower, projector, selection of T patches per tile, and merging of the others.

    Half of the budget goes to windows: each of 16 windows keeps the patches with the most class-row attention in an early
    layer. The other half goes to the patches of the whole tile with the most in the second-to-last layer. Each dropped
    patch is added to the most similar kept one after the projector, and each kept one is divided by one plus the number
    of patches added to it. ``token_index`` then indexes the B * T kept rows.

    Source: the TRIO reference code's encoder stage for CLIP. Difference for LLaVA-NeXT: every tile keeps T patches and no
    newline token remains, so the count is fixed; the reference unpads afterwards, and its count depends on the image.
    """

    def __init__(
        self, tower: nn.Module, projector: nn.Module, *, feature_layers: tuple[int, ...], num_keep: int
    ) -> None:
        super().__init__(tower, feature_layers=feature_layers, reaches=-2)
        self.global_layer = self.num_layers - 2
        self.local_layer = min(round(_LOCAL_LAYER_SHARE * self.num_layers), self.global_layer)
        self.projector = projector
        self.num_keep = num_keep

    def forward(self, pixel_values: Tensor, token_index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the visual tokens [N, D] and the kept patches [B, T]."""
        attention: dict[int, Tensor] = {}

        def observe(index: int, layer: Any, hidden: Tensor) -> None:
            if index in (self.local_layer, self.global_layer):
                attention[index] = class_attention(layer, hidden)

        tokens_BPD = self.projector(self.run(pixel_values, observe))
        kept_BT = select_patches(
            attention[self.local_layer], attention[self.global_layer], num_keep=self.num_keep
        )
        rows = merge_dropped(tokens_BPD, kept_BT).flatten(0, 1)
        return rows.index_select(0, token_index), kept_BT.to(torch.int32)


def check_encoder_keep(num_keep: int, *, patches_per_side: int) -> None:
    """Raise ScheduleError unless a tile can keep ``num_keep`` of its patches."""
    num_patches = patches_per_side**2
    if patches_per_side % WINDOWS_PER_SIDE:
        raise ScheduleError(
            f"--encoder-keep: expected tiles of {WINDOWS_PER_SIDE} x {WINDOWS_PER_SIDE} equal windows, got {patches_per_side}"
            " patches per side; leave it out"
        )
    if num_keep % KEEP_MULTIPLE or not KEEP_MULTIPLE <= num_keep < num_patches:
        raise ScheduleError(
            f"--encoder-keep: expected a multiple of {KEEP_MULTIPLE} below {num_patches} (patches of a tile), got {num_keep};"
            " choose such a number"
        )


def clip_groups(layers: Iterable[nn.Module], projector: nn.Module) -> tuple[LinearGroup, ...]:
    """Return the linear layers of CLIP's or SigLIP's ``layers`` and of LLaVA's projector, which no norm precedes."""
    parts: Any = projector
    return (*encoder_groups(layers), *projector_groups(parts.linear_1, parts.linear_2, norm=None))


def encoder_groups(layers: Iterable[nn.Module]) -> tuple[LinearGroup, ...]:
    """Return the linear layers of CLIP's or SigLIP's ``layers``."""
    return tuple(group for index, layer in enumerate(layers) for group in _layer_groups(layer, index))


def _layer_groups(layer: Any, index: int) -> Iterator[LinearGroup]:
    attention, mlp = layer.self_attn, layer.mlp
    yield from attention_groups(attention, attention.out_proj, norm=layer.layer_norm1, index=index)
    yield from mlp_groups(mlp.fc1, mlp.fc2, norm=layer.layer_norm2, index=index)


def with_newline(rows_RD: Tensor, newline: nn.Parameter | None) -> Tensor:
    """Return the rows with the newline appended; without one, a row that no index uses."""
    newline_D = rows_RD[0] if newline is None else newline
    return torch.cat([rows_RD, newline_D[None]], dim=0)


def _with_empty_row(rows: Tensor) -> Tensor:
    """Return the rows with a row of zeros appended, which the newline's index uses."""
    return torch.cat([rows, torch.zeros_like(rows[:1])], dim=0)


def class_attention(layer: Any, hidden_BPD: Tensor) -> Tensor:
    """Return the attention of the class row to the patches in ``layer``, mean over heads: [B, P] float32."""
    attention = layer.self_attn
    normed = layer.layer_norm1(hidden_BPD)
    heads, size = attention.num_heads, attention.head_dim
    query = attention.q_proj(normed[:, :1]).unflatten(-1, (heads, size)).transpose(1, 2)
    key = attention.k_proj(normed).unflatten(-1, (heads, size)).transpose(1, 2)
    scores = torch.matmul(query * attention.scale, key.transpose(-1, -2)).float()
    return torch.softmax(scores, dim=-1).mean(dim=1)[:, 0, 1:]


def _mean_keys(layer: Any, hidden_BPD: Tensor) -> Tensor:
    """Return the attention keys of the patches, mean over heads: [B, P, E]."""
    attention = layer.self_attn
    keys = attention.k_proj(layer.layer_norm1(hidden_BPD))[:, 1:]  # the same product as in the layer
    mean: Tensor = keys.unflatten(-1, (attention.num_heads, attention.head_dim)).mean(dim=2)
    return mean


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
    """Return the kept tokens [B, T, D], each averaged with the dropped ones that are most similar to it (cosine)."""
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
