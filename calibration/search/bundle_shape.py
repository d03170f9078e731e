"""Fixed shapes of the calibrated bundle, from the samples; their cost, and whether they fit the device's memory."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Literal

from trio_edge.calibration.search.schedules.prefill_cost import PrefillCost, Situation
from trio_edge.export.check.fit import check_fit, fit_inputs
from trio_edge.export.families.base import check_positions, max_positions
from trio_edge.export.plan import Layout, bundle_dtype, dimensions_of
from trio_edge.trio.cost.devices import find_device

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from trio_edge.calibration.model.prompts import SampleShape
    from trio_edge.calibration.model.torch_model import TorchModel
    from trio_edge.export.quantize.plan import QuantizePlan
    from trio_edge.runtime.bundle.manifest import FloatType
    from trio_edge.runtime.bundle.schedule import Schedule

TEXT_MARGIN = 1.25
"""Largest text bucket divided by the samples' longest prompt."""
MAX_TEXT_BUCKETS = 3
MAX_IMAGE_SIZES = 4
WORTHWHILE = 0.02
"""Share of all rows that each further shape must save."""
_MULTIPLE = 8  # tensor cores take rows by eights
_SMALLEST = 8


@dataclass(frozen=True, kw_only=True)
class BundleShape:
    """The fixed shapes for the samples."""

    image_sizes: tuple[tuple[int, int], ...]
    """(width, height), the one with the most visual tokens first."""
    text_buckets: tuple[int, ...]
    dtype: FloatType
    max_new_tokens: int
    profiles: tuple[Mapping[str, int], ...]
    """Sizes of the vision graph at each of ``image_sizes``."""

    @property
    def num_visual(self) -> int:
        """Visual tokens of the largest image, N."""
        return max(sizes["N"] for sizes in self.profiles)


def bundle_shape(
    model: TorchModel,
    samples: Sequence[SampleShape],
    *,
    dtype: Literal["auto", "float16", "float32"],
    max_new_tokens: int,
) -> BundleShape:
    """Return the shapes for the samples.

    Raises:
        ScheduleError: If the longest sequence exceeds the model's positions.
    """
    sizes = image_sizes(samples)
    profiles = tuple(model.images.sizes(*size) for size in sizes)
    others = max(profile["N"] for profile in profiles) + max_new_tokens
    shape = BundleShape(
        image_sizes=sizes,
        text_buckets=text_buckets(samples, room=max_positions(model.parts.text_config) - others),
        dtype=bundle_dtype(model.checkpoint, dtype),
        max_new_tokens=max_new_tokens,
        profiles=profiles,
    )
    longest = max(samples, key=lambda sample: sample.num_text)
    check_positions(
        model.parts.text_config,
        num_visual=shape.num_visual,
        max_text=shape.text_buckets[-1],
        max_new_tokens=max_new_tokens,
        way_out=f"shorten the longest prompt, {longest.where}, or lower --max-new-tokens",
    )
    return shape


def prefill_cost(
    model: TorchModel, shape: BundleShape, samples: Sequence[SampleShape], *, target: str
) -> PrefillCost:
    """Return the cost model of schedules on ``target``, for the samples' images and prompts."""
    decoder = dimensions_of(model.parts)
    runs_at = Counter(_padded(shape, sample) for sample in samples)
    return PrefillCost(
        decoder=decoder,
        vision=model.parts.vision_dimensions,
        situations=[
            Situation(share=count / len(samples), sizes=shape.profiles[profile], num_text=bucket)
            for (profile, bucket), count in sorted(runs_at.items())
        ],
        target=find_device(target),
    )


def memory_warning(
    model: TorchModel, shape: BundleShape, schedule: Schedule, *, target: str, quantize: QuantizePlan
) -> str | None:
    """Return one line with the reason why a bundle with ``schedule`` cannot fit the target's memory; None if it fits."""
    dimensions = dimensions_of(model.parts)
    layout = Layout(
        vision_sizes=shape.profiles,
        schedule=schedule,
        token_keep=None,
        text_buckets=shape.text_buckets,
        max_new_tokens=shape.max_new_tokens,
        dtype=shape.dtype,
    )
    inputs = fit_inputs(model.parts, dimensions, layout=layout, processing=model.images, quantize=quantize)
    return check_fit(inputs, find_device(target))


def text_buckets(shapes: Sequence[SampleShape], *, room: int) -> tuple[int, ...]:
    """Return the text buckets, ascending.

    The largest is the longest prompt with a margin, at most ``room``, in multiples of 8. Smaller ones are added, the most useful
    first, while each saves ``WORTHWHILE`` of the mean number of rows, text and visual.
    """
    lengths = [shape.num_text for shape in shapes]
    with_margin = min(_rounded(TEXT_MARGIN * max(lengths)), room - room % _MULTIPLE)
    longest = max(with_margin, _rounded(max(lengths)))

    def rows(sizes: Sequence[int]) -> float:
        return fmean(_covering(sizes, shape.num_text) + shape.sizes["N"] for shape in shapes)

    others = {_rounded(length) for length in lengths} - {longest}
    return tuple(sorted(_worthwhile(longest, others, most=MAX_TEXT_BUCKETS, rows=rows)))


def image_sizes(shapes: Sequence[SampleShape]) -> tuple[tuple[int, int], ...]:
    """Return the (width, height) of images whose numbers of visual tokens get exact shapes.

    The first one has the most tokens of all samples. Others are added, the most useful first, while each saves ``WORTHWHILE`` of
    the mean number of visual rows. Among images with one number of tokens the most common size is taken.
    """
    of_count: dict[int, Counter[tuple[int, int]]] = {}
    for shape in shapes:
        of_count.setdefault(shape.sizes["N"], Counter())[(shape.width, shape.height)] += 1

    def rows(counts: Sequence[int]) -> float:
        return fmean(_covering(counts, shape.sizes["N"]) for shape in shapes)

    most = max(of_count)
    chosen = _worthwhile(most, set(of_count) - {most}, most=MAX_IMAGE_SIZES, rows=rows)
    # of equally common sizes the smaller one, so that the order of the samples does not matter
    return tuple(max(sorted(of_count[count]), key=of_count[count].__getitem__) for count in chosen)


def rounds_with_margin(largest: int) -> int:
    """Return the bundle's NMS rounds: the most of any sample, and a quarter more, at least 2."""
    return largest + max(2, math.ceil(largest / 4))


def _worthwhile(
    largest: int, others: set[int], *, most: int, rows: Callable[[Sequence[int]], float]
) -> list[int]:
    """Return ``largest``, then those of ``others`` that each save ``WORTHWHILE`` of ``rows``, the most useful first."""
    chosen = [largest]
    while others and len(chosen) < most:
        best = min(sorted(others), key=lambda size: rows([*chosen, size]))
        if rows([*chosen, best]) > (1 - WORTHWHILE) * rows(chosen):
            break
        chosen.append(best)
        others = others - {best}
    return chosen


def _covering(sizes: Sequence[int], needed: int) -> int:
    return min(size for size in sizes if size >= needed)


def _rounded(length: float) -> int:
    return max(math.ceil(length / _MULTIPLE) * _MULTIPLE, _SMALLEST)


def _padded(shape: BundleShape, sample: SampleShape) -> tuple[int, int]:
    """Return the index of the profile and the text bucket that a sample runs at."""
    room = [index for index, sizes in enumerate(shape.profiles) if sizes["N"] >= sample.sizes["N"]]
    profile = min(room, key=lambda index: shape.profiles[index]["N"])
    return profile, _covering(shape.text_buckets, sample.num_text)
