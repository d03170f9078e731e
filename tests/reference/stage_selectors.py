"""Selectors of other papers before a decoder layer: slow, obvious, in float64, on real rows only (no padding)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.reference.saliency import rms_norm, rotate
from trio_edge.trio.selectors.interface import StageInputs


class Rows:
    """The real rows of the padded inputs."""

    def __init__(self, inputs: StageInputs) -> None:
        length, self.num_visual = int(inputs.length), int(inputs.num_visual)
        self.hidden = inputs.hidden_SD[:length].double()
        self.previous = None if inputs.previous_SD is None else inputs.previous_SD[:length].double()
        self.cos, self.sin = inputs.cos_SE[:length].double(), inputs.sin_SE[:length].double()
        self.visual = inputs.visual_rows_N[: self.num_visual].tolist()
        self.text = list(range(self.visual[-1] + 1, length)) if self.visual else []
        if inputs.prompt is not None:
            embeds = inputs.prompt.embeds_FD[: int(inputs.prompt.length)].double()
            in_prompt = (inputs.prompt.is_visual_F[: len(embeds)] > 0).nonzero()[:, 0].tolist()
            self.prompt_visual = embeds[in_prompt]
            if self.visual:  # the last of the prompt's, which a stage may have dropped
                self.text = list(range(length - (len(embeds) - 1 - in_prompt[-1]), length))
            self.prompt_text = embeds[len(embeds) - len(self.text) :]


def attention_of_row(layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor, row: int) -> Tensor:
    """Return the probabilities [H, S] of one row, one head at a time."""
    attention, size = layer.self_attn, layer.self_attn.head_dim
    normed = rms_norm(hidden, layer.input_layernorm)
    query = rotate(attention.q_proj(normed)[row].reshape(-1, size), cos[row], sin[row])
    keys = keys_of(layer, hidden, cos, sin)
    window = getattr(attention.config, "sliding_window", None) or len(hidden)
    result = torch.zeros(len(query), len(hidden), dtype=hidden.dtype)
    for head in range(len(query)):
        key = keys[:, head * keys.shape[1] // len(query)]
        seen = [column for column in range(len(hidden)) if row - window < column <= row]
        result[head, seen] = torch.softmax(key[seen] @ query[head] / math.sqrt(size), 0)
    return result


def keys_of(layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the rotated keys [S, G, E]."""
    key = layer.self_attn.k_proj(rms_norm(hidden, layer.input_layernorm))
    return rotate(key.reshape(len(hidden), -1, layer.self_attn.head_dim), cos[:, None], sin[:, None])


def best(scores: list[float], count: int) -> list[int]:
    """Return the indices of the largest scores in order; of equal ones the first."""
    order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
    return sorted(order[:count])


def last_row_top_k(layer: Any, hidden: Tensor, rows: Rows, num_keep: int) -> tuple[list[int], Tensor]:
    """FastV with the rows of the layer before, PyramidDrop with those of the next."""
    attention = attention_of_row(layer, hidden, rows.cos, rows.sin, len(hidden) - 1)
    scores = attention.mean(0)[rows.visual]
    return best(scores.tolist(), num_keep), scores


def dart(layer: Any, final_norm: Any, rows: Rows, num_keep: int) -> tuple[list[int], Tensor]:
    """Return kept tokens and 1 for pivots, (1 - cosine)/2 for tokens that were taken, 0 for others."""
    assert rows.previous is not None
    norms = keys_of(layer, rows.previous, rows.cos, rows.sin).abs().sum((1, 2)).tolist()
    features = rms_norm(rows.hidden, final_norm)
    visual_pivots = best([norms[row] for row in rows.visual], min(4, num_keep))
    text_pivots = [rows.text[index] for index in best([norms[row] for row in rows.text], 4)]
    pivots = [rows.visual[index] for index in visual_pivots] + text_pivots
    scores = torch.zeros(rows.num_visual, dtype=torch.float64)
    scores[visual_pivots] = 1.0
    missing = num_keep - min(4, num_keep)
    share = math.ceil(missing / (min(4, num_keep) + len(text_pivots)))
    kept, pool = list(visual_pivots), [i for i in range(rows.num_visual) if i not in visual_pivots]
    for pivot in pivots:
        count = min(share, missing)
        cosine = {token: _cosine(features[pivot], features[rows.visual[token]]) for token in pool}
        taken = sorted(pool, key=lambda token: (cosine[token], token))[:count]
        for token in taken:
            scores[token] = (1 - cosine[token]) / 2
        kept += taken
        pool = [token for token in pool if token not in taken]
        missing -= count
    return sorted(kept), scores


def _cosine(one: Tensor, other: Tensor) -> float:
    lengths = float(one.norm() * other.norm())
    return float(one @ other) / lengths if lengths > 0 else 0.0


def raters(rows: Rows) -> list[int]:
    """Return which text tokens after the picture judge."""
    count = len(rows.prompt_text)
    if not count or not len(rows.prompt_visual):
        return list(range(count))
    relevance = torch.softmax(rows.prompt_visual @ rows.prompt_text.T, 1).mean(0)
    above = [index for index in range(count) if relevance[index] > relevance.mean() * (1 + 1e-4)]
    return above or list(range(count))


def sparse_vlm_scores(layer: Any, rows: Rows) -> Tensor:
    assert rows.previous is not None
    chosen = [rows.text[index] for index in raters(rows)]
    if not chosen:
        return torch.zeros(rows.num_visual, dtype=torch.float64)
    attention = [attention_of_row(layer, rows.previous, rows.cos, rows.sin, row).mean(0) for row in chosen]
    return torch.stack(attention).mean(0)[rows.visual]


def sparse_vlm(layer: Any, rows: Rows, num_keep: int) -> tuple[list[int], Tensor, Tensor]:
    """Return the rows' tokens (centres last), scores and the rows' weights over real tokens."""
    scores = sparse_vlm_scores(layer, rows)
    kept, clusters = split_by_search(rows.num_visual, num_keep), []
    chosen = best(scores.tolist(), kept)
    if rows.num_visual > num_keep and kept < num_keep:
        others = [token for token in range(rows.num_visual) if token not in chosen]
        pool = [
            others[i] for i in best([float(scores[token]) for token in others], int(0.3 * len(others)) + 1)
        ]
        clusters = density_peaks(rows.hidden[[rows.visual[token] for token in pool]], num_keep - kept)
        clusters = [[pool[point] for point in cluster] for cluster in clusters]
    weights = torch.zeros(len(chosen) + len(clusters), rows.num_visual, dtype=torch.float64)
    for row, token in enumerate(chosen):
        weights[row, token] = 1.0
    for row, cluster in enumerate(clusters):
        weights[len(chosen) + row, cluster] = 1 / len(cluster)
    return chosen + [cluster[0] for cluster in clusters], scores, weights


def split_by_search(num_visual: int, num_keep: int) -> int:
    """Return how many tokens stay themselves: the most that give K rows with their clusters, at least half of K."""
    if num_visual <= num_keep:
        return num_visual
    for kept in range(num_keep, 0, -1):
        removed = num_visual - kept
        if kept + int((int(0.3 * removed) + 1) / 10) + 1 == num_keep:
            return max(kept, num_keep - num_keep // 2)
    return num_keep - num_keep // 2


def density_peaks(points: Tensor, num_clusters: int) -> list[list[int]]:
    """Return the members of each cluster, its centre first; clusters in order of their centres."""
    count = len(points)
    distance = [
        [float((points[i] - points[j]).norm()) / math.sqrt(points.shape[1]) for j in range(count)]
        for i in range(count)
    ]
    density = []
    for i in range(count):
        nearest = sorted(distance[i])[:num_clusters]
        density.append(math.exp(-sum(d * d for d in nearest) / num_clusters))
    largest = max(max(row) for row in distance)
    peaks = []
    for i in range(count):
        denser = [j for j in range(count) if density[j] > density[i] or (density[j] == density[i] and j < i)]
        peaks.append(density[i] * min((distance[i][j] for j in denser), default=largest))
    centres = best(peaks, num_clusters)
    members: dict[int, list[int]] = {centre: [centre] for centre in centres}
    for i in range(count):
        if i not in centres:
            members[min(centres, key=lambda centre: (distance[i][centre], centre))].append(i)
    return [members[centre] for centre in centres]
