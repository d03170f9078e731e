"""Fixed shapes that fit the samples: text buckets, and the picture sizes that get shapes of their own."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio_edge.calibration.model.prompts import SampleShape

TEXT_MARGIN = 1.25
"""Largest text bucket over the longest prompt of the samples."""
MAX_TEXT_BUCKETS = 3
MAX_PICTURE_SIZES = 4
WORTHWHILE = 0.02
"""Share of all rows that another shape must save."""
_MULTIPLE = 8
_SMALLEST = 8


def text_buckets(shapes: Sequence[SampleShape], *, room: int) -> tuple[int, ...]:
    """Return the sizes that prompts are padded to, ascending.

    The last one is the longest prompt with a margin, as far as there is ``room``, in multiples of 8. Shorter ones are added, the
    most useful first, while each takes ``WORTHWHILE`` off the mean number of rows, text and visual.
    """
    lengths = [shape.num_text for shape in shapes]
    with_margin = min(_rounded(TEXT_MARGIN * max(lengths)), room - room % _MULTIPLE)
    buckets = [max(with_margin, _rounded(max(lengths)))]
    candidates = {_rounded(length) for length in lengths} - set(buckets)

    def mean_rows(sizes: Sequence[int]) -> float:
        return sum(
            min(size for size in sizes if size >= shape.num_text) + shape.sizes["N"] for shape in shapes
        ) / len(shapes)

    while candidates and len(buckets) < MAX_TEXT_BUCKETS:
        best = min(sorted(candidates), key=lambda size: mean_rows([*buckets, size]))
        if mean_rows([*buckets, best]) > (1 - WORTHWHILE) * mean_rows(buckets):
            break
        buckets.append(best)
        candidates.discard(best)
    return tuple(sorted(buckets))


def picture_sizes(shapes: Sequence[SampleShape]) -> tuple[tuple[int, int], ...]:
    """Return (width, height) of pictures whose numbers of visual tokens the bundle gets exact shapes for.

    The first one has the most tokens of all samples, so every sample has room. Others are added, the most useful first, while
    each takes ``WORTHWHILE`` off the mean number of visual rows. Of the pictures with one number of tokens the most common
    size stands for all.
    """
    of_count: dict[int, Counter[tuple[int, int]]] = {}
    for shape in shapes:
        of_count.setdefault(shape.sizes["N"], Counter())[(shape.width, shape.height)] += 1
    chosen = [max(of_count)]

    def mean_rows(counts: Sequence[int]) -> float:
        return sum(min(count for count in counts if count >= shape.sizes["N"]) for shape in shapes) / len(
            shapes
        )

    others = set(of_count) - set(chosen)
    while others and len(chosen) < MAX_PICTURE_SIZES:
        best = min(sorted(others), key=lambda count: mean_rows([*chosen, count]))
        if mean_rows([*chosen, best]) > (1 - WORTHWHILE) * mean_rows(chosen):
            break
        chosen.append(best)
        others.discard(best)
    return tuple(max(sorted(of_count[count]), key=of_count[count].__getitem__) for count in chosen)


def rounds_with_margin(largest: int) -> int:
    """Return NMS rounds with a margin of a quarter, at least 2, over the largest number that a sample took."""
    return largest + max(2, math.ceil(largest / 4))


def _rounded(length: float) -> int:
    return max(math.ceil(length / _MULTIPLE) * _MULTIPLE, _SMALLEST)
