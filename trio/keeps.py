"""The visual tokens that each stage keeps, chosen to spend a budget.

A *shape* gives keeps in a method's proportions; ``integer_keeps`` makes them strictly decreasing integers.
``rest`` is the budget after the first stage: the visual tokens that its layers may process, summed over these layers.
``weights`` are the numbers of layers that each stage's tokens pass through.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Shape = Callable[[int, Sequence[int], int, bool], list[float] | None]
    """From rest, weights, N and whether these are the earliest layers: the wanted keeps; None to try earlier layers."""

_TRIO_KEEPS = (460, 270, 110)
_LEAST_LAMBDA = 0.25
_TABLE_VISUAL = 576
_SPARSEVLM_TABLES = ((82, 32, 18), (249, 55, 27), (312, 117, 39), (309, 204, 113))
"""Rows after each stage, merged ones included. Their true averages are 82.2 to 206.5 of 576, not the published 64 to 192:
the scoring layer runs before its tokens are dropped."""


def integer_keeps(
    real_keeps: Sequence[float], *, budget: int, weights: Sequence[int], num_visual: int
) -> tuple[int, ...] | None:
    """Return strictly decreasing keeps near ``real_keeps`` that spend most of ``budget``; None if there are none.

    ``budget`` is the module's ``rest``.
    """
    least = sum(weight * (len(weights) - index) for index, weight in enumerate(weights))
    if budget < least or num_visual < len(weights):
        return None
    keeps = [math.floor(keep) for keep in real_keeps]
    for index in range(len(keeps) - 1, -1, -1):  # strictly decreasing, at least 1
        low = keeps[index + 1] + 1 if index + 1 < len(keeps) else 1
        keeps[index] = min(max(keeps[index], low), num_visual - index)
    # Raising small keeps may have exceeded the budget: lower the largest ones.
    for index in range(len(keeps)):
        floor = len(keeps) - index
        while sum(w * k for w, k in zip(weights, keeps)) > budget and keeps[index] > floor:
            if index + 1 < len(keeps) and keeps[index] == keeps[index + 1] + 1:
                break
            keeps[index] -= 1
    return _spend_rest(budget, weights=weights, keeps=keeps, num_visual=num_visual)


def _spend_rest(
    budget: int, *, weights: Sequence[int], keeps: list[int], num_visual: int
) -> tuple[int, ...] | None:
    """Return the keeps near ``keeps`` that leave least of the budget; of equals, the nearest."""
    candidates: list[tuple[int, ...]] = [()]
    # Varying two stages within the largest weight reaches every remainder; varying more only costs time.
    reach = [max(weights) if index < 2 else 0 for index in range(len(keeps) - 1)]
    for keep, distance in zip(keeps, reach):
        steps = range(-distance, distance + 1)
        candidates = [(*head, keep + step) for head in candidates for step in steps]
    best: tuple[tuple[int, int], tuple[int, ...]] | None = None
    for head in candidates:
        rest = budget - sum(weight * keep for weight, keep in zip(weights, head))
        last = min(rest // weights[-1], (head[-1] - 1) if head else num_visual)
        full = (*head, last)
        if last < 1 or full[0] > num_visual or any(a <= b for a, b in zip(full, full[1:])):
            continue
        cost = (rest - last * weights[-1], sum(abs(a - b) for a, b in zip(full, keeps)))
        if best is None or cost < best[0]:
            best = (cost, full)
    return None if best is None else best[1]


def trio_shape(rest: int, weights: Sequence[int], num_visual: int, _is_last: bool) -> list[float]:
    """Return keeps in the presets' proportions; for larger budgets, between their largest size and keeping all."""
    shape = [float(keep) for keep in _TRIO_KEEPS]
    if len(weights) != len(shape):  # geometric between the same ends
        first, last, steps = _TRIO_KEEPS[0], _TRIO_KEEPS[-1], max(len(weights) - 1, 1)
        shape = [first * (last / first) ** (index / steps) for index in range(len(weights))]
    unit = sum(weight * keep for weight, keep in zip(weights, shape))
    largest = [keep * num_visual / shape[0] for keep in shape]
    most = sum(weight * keep for weight, keep in zip(weights, largest))
    if rest <= most:
        return [keep * rest / unit for keep in shape]
    share = (rest - most) / (num_visual * sum(weights) - most)
    return [keep + share * (num_visual - keep) for keep in largest]


def equal_steps(rest: int, weights: Sequence[int], _num_visual: int, _is_last: bool) -> list[float]:
    """Return keeps that fall in equal steps; a single stage gets the whole budget."""
    shape = [float(len(weights) - index) for index in range(len(weights))]
    unit = sum(weight * share for weight, share in zip(weights, shape))
    return [share * rest / unit for share in shape]


def pyramid(rest: int, weights: Sequence[int], num_visual: int, is_last: bool) -> list[float] | None:
    """Return λ N, λ² N, λ³ N with the λ that spends the budget; the paper's 0.5 has an average keep of 46.9 %.

    Below λ = 1/4 it returns None if there are earlier layers: with 8, 16, 24 of 32 a quarter of the full cost is spent
    before the first stage.
    """

    def spent(share: float) -> float:
        return sum(weight * num_visual * share ** (stage + 1) for stage, weight in enumerate(weights))

    if spent(_LEAST_LAMBDA) > rest and not is_last:
        return None
    low, high = 0.0, 1.0
    for _ in range(60):  # halvings; float64 has 53 bits
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) <= rest else (low, middle)
    return [num_visual * low ** (stage + 1) for stage in range(len(weights))]


def sparse_vlm_tables(rest: int, weights: Sequence[int], num_visual: int, _is_last: bool) -> list[float]:
    """Return keeps interpolated between the two published tables around the budget, scaled to N.

    Below the smallest table they have its proportions; above the largest they approach all tokens.
    """
    scale = num_visual / _TABLE_VISUAL
    tables = [[scale * keep for keep in table[: len(weights)]] for table in _SPARSEVLM_TABLES]
    points = [[0.0] * len(weights), *tables, [float(num_visual)] * len(weights)]
    costs = [sum(weight * keep for weight, keep in zip(weights, point)) for point in points]
    place = next(place for place in range(len(points) - 1) if rest <= costs[place + 1])
    share = (rest - costs[place]) / (costs[place + 1] - costs[place])
    return [low + share * (high - low) for low, high in zip(points[place], points[place + 1])]
