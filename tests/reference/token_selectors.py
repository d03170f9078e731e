"""Token selectors in plain loops over Python numbers, as their papers state them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tests.trio.selectors.token_graph import NUM_KEEP, Case, cosine, filled, first_best


def relevance(case: Case) -> dict[int, float]:
    raw = {
        i: sum(cosine(case.tokens[i], case.text[t]) for t in range(case.num_text)) / max(case.num_text, 1)
        for i in case.shown
    }
    low, high = min(raw.values(), default=0.0), max(raw.values(), default=0.0)
    return {i: 1.0 if high - low < 1e-6 else (raw[i] - low + 1e-6) / (high - low) for i in raw}


def cdpruner(case: Case, num_keep: int = NUM_KEEP, *, worth: dict[int, float] | None = None) -> list[int]:
    shown, worth = case.shown, relevance(case) if worth is None else worth
    kernel = {
        (i, j): worth[i] * cosine(case.tokens[i], case.tokens[j]) * worth[j] for i in shown for j in shown
    }
    left = {i: kernel[i, i] for i in shown}
    rows: list[dict[int, float]] = []
    chosen: list[int] = []
    while len(chosen) < min(num_keep, len(shown)):
        free = [i for i in shown if i not in chosen]
        best = first_best({i: left[i] if left[i] > 0 else worth[i] - 3.0 for i in free})
        chosen.append(best)
        row = dict.fromkeys(shown, 0.0)
        if left[best] > 0:
            for i in shown:
                explained = sum(earlier[best] * earlier[i] for earlier in rows)
                row[i] = (kernel[best, i] - explained) / np.sqrt(left[best])
        rows.append(row)
        for i in shown:
            left[i] -= row[i] ** 2
            if left[i] <= 1e-4 * kernel[i, i]:
                left[i] = 0.0
    return filled(chosen, case, num_keep)


def divprune(case: Case, num_keep: int = NUM_KEEP) -> list[int]:
    real = range(case.num_visual)
    distance = [[1.0 - cosine(case.tokens[i], case.tokens[j]) for j in real] for i in real]
    chosen: list[int] = []
    while len(chosen) < min(num_keep, case.num_visual):
        others = chosen or list(real)
        gains = {
            i: min((distance[i][j] for j in others if j != i), default=4.0) for i in real if i not in chosen
        }
        chosen.append(first_best(gains))
    return filled(chosen, case, num_keep)


def scaled(values: dict[int, float]) -> dict[int, float]:
    low, high = min(values.values(), default=0.0), max(values.values(), default=0.0)
    return {i: 1.0 if high - low < 1e-6 else (value - low) / (high - low) for i, value in values.items()}


def importance(case: Case, *, text_share: float = 0.2, global_share: float = 0.5) -> dict[int, float]:
    words = range(case.num_text)
    mean = case.text[: case.num_text].astype(np.float64).sum(0)
    whole = {i: -cosine(mean, case.tokens[i]) for i in case.shown}
    single = [{i: -cosine(case.text[t], case.tokens[i]) for i in case.shown} for t in words]
    entropy = []
    for t in words:
        top = max(single[t].values(), default=0.0)
        mass = {i: math.exp(100 * (value - top)) for i, value in single[t].items()}
        shares = [value / sum(mass.values()) for value in mass.values()]
        entropy.append(-sum(p * math.log(p) for p in shares if p > 0))
    counted = sorted(words, key=lambda t: entropy[t])[: max(1, math.floor(text_share * len(words) + 1e-4))]
    weights = {t: math.exp(-(entropy[t] - entropy[counted[0]]) / 0.01) for t in counted}
    total = sum(weights.values())
    dense = {i: sum(weights[t] / total * single[t][i] for t in counted) for i in case.shown}
    return scaled({i: global_share * whole[i] + (1 - global_share) * dense[i] for i in case.shown})


def cover(case: Case, weights: dict[int, float], num_keep: int) -> list[int]:
    shown = case.shown
    similarity = {(i, j): (1 + cosine(case.tokens[i], case.tokens[j])) / 2 for i in shown for j in shown}
    covered = dict.fromkeys(shown, 0.0)
    chosen: list[int] = []
    while len(chosen) < min(num_keep, len(shown)):
        best = first_best({
            i: sum(weights[j] * max(0.0, similarity[i, j] - covered[j]) for j in shown)
            for i in shown if i not in chosen
        })  # fmt: skip
        chosen.append(best)
        covered = {j: max(covered[j], similarity[best, j]) for j in shown}
    return filled(chosen, case, num_keep)


def eadp(case: Case, num_keep: int = NUM_KEEP) -> list[int]:
    return cover(case, {i: value**2 for i, value in importance(case).items()}, num_keep)


def clip_relevance(case: Case, patches: Any, texts: list[Any]) -> dict[int, float]:
    """Of each token's patch to whole texts, each a list of token rows with the end last."""
    raw = {i: -sum(cosine(patches[i], text[-1]) for text in texts) / len(texts) for i in case.shown}
    low, high = min(raw.values()), max(raw.values())
    return {i: (raw[i] - low + 1e-6) / (high - low) for i in raw}


def clip_importance(
    case: Case, patches: Any, texts: list[Any], *, text_share: float = 0.2, global_share: float = 0.5
) -> dict[int, float]:
    """Of each token's patch: each text is a list of token rows, start first and end last."""
    fused = dict.fromkeys(case.shown, 0.0)
    for text in texts:
        whole = {i: -cosine(patches[i], text[-1]) for i in case.shown}
        words = [{i: -cosine(patches[i], word) for i in case.shown} for word in text[1:-1]]
        entropy = []
        for values in words:
            mass = [math.exp(100 * (value - max(values.values()))) for value in values.values()]
            entropy.append(-sum(m / sum(mass) * math.log(m / sum(mass)) for m in mass if m > 0))
        counted = sorted(range(len(words)), key=lambda word: entropy[word])
        counted = counted[: max(1, math.floor(text_share * len(words) + 1e-4))]
        weights = [math.exp((entropy[counted[0]] - entropy[word]) / 0.01) for word in counted]
        for i in fused:
            dense = sum(weight * words[word][i] for weight, word in zip(weights, counted)) / sum(weights)
            fused[i] += (global_share * whole[i] + (1 - global_share) * dense) / len(texts)
    return scaled(fused)


def holov(case: Case, num_keep: int = NUM_KEEP, num_chunks: int = 16) -> list[int]:
    shown = case.shown
    chunks: list[list[int]] = [[] for _ in range(num_chunks)]
    for place, i in enumerate(shown):
        chunks[place * num_chunks // len(shown)].append(i)
    attention = {i: float(case.attention[i]) for i in shown}
    score: dict[int, float] = {}
    for chunk in chunks:
        variance = {}
        for i in chunk:
            row = [0.0 if i == j else cosine(case.tokens[i], case.tokens[j]) for j in chunk]
            variance[i] = float(np.var(row))
        total = sum(variance.values())
        scale = sum(1000 * attention[i] for i in chunk) / total if total > 0 else 0.0
        score |= {i: 1000 * attention[i] + 0.09 * scale * variance[i] for i in chunk}
    used = [p for p in range(num_chunks) if chunks[p]]
    mean = {p: sum(score[i] for i in chunks[p]) / len(chunks[p]) for p in used}
    if sum(mean.values()) == 0:
        mean = dict.fromkeys(used, 1.0)
    weight = {p: mean[p] / sum(mean.values()) for p in used}
    quota = {p: math.floor(weight[p] * num_keep + 1e-4) for p in used}
    step = max(weight.values(), default=1.0) / 2**17
    for p in sorted(used, key=lambda p: (-round(weight[p] / step), p))[: num_keep - sum(quota.values())]:
        quota[p] += 1
    chosen = [i for p in used for i in sorted(chunks[p], key=lambda i: (-attention[i], i))[: quota[p]]]
    step = (max(score.values(), default=1.0) or 1.0) / 2**17
    others = sorted((i for i in shown if i not in chosen), key=lambda i: (-round(score[i] / step), i))
    return filled([*chosen, *others][: min(num_keep, len(shown))], case, num_keep)


def scope(case: Case, num_keep: int = NUM_KEEP) -> list[int]:
    shown = case.shown
    cover = dict.fromkeys(shown, 0.0)
    chosen: list[int] = []
    while len(chosen) < min(num_keep, len(shown)):
        gains = {}
        for i in shown:
            if i not in chosen:
                new = [max(0.0, cosine(case.features[i], case.features[j]) - cover[j]) for j in shown]
                gains[i] = float(case.attention[i]) * sum(new)
        best = first_best(gains)
        chosen.append(best)
        for j in shown:
            cover[j] = max(cover[j], cosine(case.features[best], case.features[j]))
    return filled(chosen, case, num_keep)
