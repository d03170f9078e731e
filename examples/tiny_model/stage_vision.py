"""Stage 1: the vision tower and the projector learn to name the content of each patch.

A patch's labels are dot products of the projected patch with the decoder's word embeddings, so that the decoder starts with
visual tokens in its own space.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from data import NAMES, Group
from model import TOKEN_ID, tile_features
from shapes.scene import COLOR_NAMES, PLACES, SIZES
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaNextForConditionalGeneration


def _ids(words: tuple[str, ...]) -> list[int]:
    """Returns token ids of words."""
    return [TOKEN_ID[word] for word in words]


class PatchReader(nn.Module):
    """Reads labels from hidden states: words by word embeddings, the rest by small linear heads."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(4.0))
        self.nothing = nn.Parameter(torch.randn(width) * 0.1)
        self.center = nn.Linear(width, 1)
        self.row = nn.Linear(width, 6)
        self.col = nn.Linear(width, 6)

    def word_logits(self, hidden: Tensor, embeddings: Tensor, words: tuple[str, ...]) -> Tensor:
        """Returns logits over words."""
        return self.scale * (hidden @ embeddings[_ids(words)].T)

    def losses(
        self, hidden: Tensor, labels: Tensor, embeddings: Tensor, *, is_base: Tensor | None
    ) -> dict[str, Tensor]:
        """Returns one loss per label of patches `[M, D]`; that of places is for base-tile patches, or for all without `is_base`."""
        names = torch.cat(
            [self.scale * (hidden @ self.nothing)[:, None], self.word_logits(hidden, embeddings, NAMES)], 1
        )
        kind = labels[:, 0]
        weight = torch.ones(1 + len(NAMES), device=hidden.device)
        weight[0] = 0.2
        losses = {"name": F.cross_entropy(names, kind, weight)}
        there = (kind > 0).nonzero()[:, 0]
        seen, what = hidden[there], labels[there]
        losses["color"] = F.cross_entropy(self.word_logits(seen, embeddings, COLOR_NAMES), what[:, 1])
        losses["size"] = F.cross_entropy(self.word_logits(seen, embeddings, SIZES), what[:, 2])
        center = F.binary_cross_entropy_with_logits(self.center(seen)[:, 0], what[:, 4].float())
        losses["center"] = center
        at = there if is_base is None else there[is_base[there]]
        losses["place"] = F.cross_entropy(self.word_logits(hidden[at], embeddings, PLACES), labels[at, 3])
        return losses


def train_vision(
    model: LlavaNextForConditionalGeneration,
    groups: list[Group],
    *,
    seconds: float,
    batch: int = 16,
    rate: float = 2e-3,
) -> PatchReader:
    """Trains the vision tower, the projector and the word embeddings in place for a wall-clock time."""
    device = model.device
    reader = PatchReader().to(device)
    embed = model.model.language_model.embed_tokens
    weights = [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]
    weights += [embed.weight, *reader.parameters()]
    decay = [w for w in weights if w.ndim >= 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.03}, {"params": [w for w in weights if w.ndim < 2], "weight_decay": 0.0}],
        lr=rate, betas=(0.9, 0.98),
    )  # fmt: skip
    rng = np.random.default_rng(1)
    shares = np.array([len(g.tiles) for g in groups]) / sum(len(g.tiles) for g in groups)
    start, step, mean = time.time(), 0, {}
    while (used := (time.time() - start) / seconds) < 1:
        lr = rate * min(1, (step + 1) / 100) * min(1.0, max(0.02, (1 - used) / 0.6))
        for part in optimizer.param_groups:
            part["lr"] = lr
        group = groups[rng.choice(len(groups), p=shares)]
        rows = rng.integers(0, len(group.tiles), batch)
        losses = vision_losses(model, reader, group, rows, embed.weight)
        total = (
            2 * losses["name"] + losses["color"] + 0.5 * (losses["size"] + losses["center"] + losses["place"])
        )
        total = total + 0.2 * losses["where"]
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        for name, value in losses.items():
            mean[name] = 0.99 * mean.get(name, float(value)) + 0.01 * float(value)
        step += 1
        if step % 200 == 0:
            speed = step * batch / (time.time() - start)
            print(f"vision {step} {time.time() - start:.0f}s {speed:.0f} img/s", {k: round(v, 3) for k, v in mean.items()},
                  flush=True)  # fmt: skip
    return reader


def vision_losses(
    model: LlavaNextForConditionalGeneration,
    reader: PatchReader,
    group: Group,
    rows: np.ndarray,
    embeddings: Tensor,
) -> dict[str, Tensor]:
    """Returns the losses of some pictures of a group."""
    device = embeddings.device
    hidden = tile_features(model, torch.from_numpy(group.tiles[rows]).to(device))
    labels = torch.from_numpy(group.labels[rows]).long().to(device)
    count = hidden.shape[1]
    is_base = (torch.arange(count, device=device) < 36).repeat(len(rows))
    flat = hidden.flatten(0, 1)
    losses = reader.losses(flat, labels.flatten(0, 1), embeddings, is_base=is_base)
    spot = torch.arange(36, device=device).repeat(len(flat) // 36)
    losses["where"] = F.cross_entropy(reader.row(flat), spot // 6) + F.cross_entropy(
        reader.col(flat), spot % 6
    )
    return losses


@torch.no_grad()
def vision_accuracy(
    model: LlavaNextForConditionalGeneration, reader: PatchReader, group: Group, *, limit: int = 200
) -> dict[str, float]:
    """Returns accuracies on the fine centre patches of a group: names of shapes and digits by size, and colours."""
    embeddings = model.model.language_model.embed_tokens.weight
    tiles = torch.from_numpy(group.tiles[:limit]).to(embeddings.device)
    hidden = tile_features(model, tiles)[:, 36:].flatten(0, 1)
    labels = torch.from_numpy(group.labels[:limit, 36:]).long().to(hidden.device).flatten(0, 1)
    pick = labels[:, 4] == 1
    hidden, labels = hidden[pick], labels[pick]
    right = reader.word_logits(hidden, embeddings, NAMES).argmax(1) + 1 == labels[:, 0]
    color = reader.word_logits(hidden, embeddings, COLOR_NAMES).argmax(1) == labels[:, 1]
    result = {"color": color.float().mean().item()}
    for kind, of_kind in (("shape", labels[:, 0] <= 6), ("digit", labels[:, 0] > 6)):
        for size in (0, 1):
            result[f"{SIZES[size]} {kind}"] = right[of_kind & (labels[:, 2] == size)].float().mean().item()
    return {name: round(100 * value, 1) for name, value in result.items()}
