"""Points that no other point beats in both time and error."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Point = TypeVar("Point")


def pareto_front(points: Iterable[Point], *, key: Callable[[Point], tuple[float, float]]) -> list[Point]:
    """Return the points that are better than every faster one, fastest first; of equal ones the first."""
    front: list[Point] = []
    lowest = float("inf")
    for point in sorted(points, key=key):
        if key(point)[1] < lowest:
            front.append(point)
            lowest = key(point)[1]
    return front


def first_fronts(
    points: Iterable[Point], *, key: Callable[[Point], tuple[float, float]], count: int
) -> list[Point]:
    """Return at most ``count`` points: the front, then that of what is left, and so on."""
    left, chosen = list(points), list[Point]()
    while left and len(chosen) < count:
        front = pareto_front(left, key=key)
        taken = {id(point) for point in front}
        left = [point for point in left if id(point) not in taken]
        chosen += spread(front, count - len(chosen))
    return chosen


def spread(front: list[Point], count: int) -> list[Point]:
    """Return ``count`` points of a front, evenly along it, its ends among them."""
    if len(front) <= count:
        return front
    if count == 1:
        return front[-1:]
    return [front[round(index * (len(front) - 1) / (count - 1))] for index in range(count)]
