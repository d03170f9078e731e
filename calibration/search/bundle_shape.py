"""Fixed shapes of the bundle to be, from the samples; their costs, and whether they fit the device's memory."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Literal

from trio_edge.calibration.search.schedules.prefill_cost import PrefillCost, Situation
from trio_edge.export.check.fit import check_fit, fit_inputs
from trio_edge.export.families.decoder_config import check_positions, max_positions
from trio_edge.export.graphs.layout import Layout
from trio_edge.export.plan import bundle_dtype, dimensions_of
from trio_edge.trio.cost.devices import find_device

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from trio_edge.calibration.model.prompts import SampleShape
    from trio_edge.calibration.model.torch_model import TorchModel
    from trio_edge.export.quantize.plan import QuantizePlan
    from trio_edge.runtime.bundle.manifest import FloatType
    from trio_edge.runtime.bundle.schedule import Schedule

TEXT_MARGIN = 1.25
"""Largest text bucket over the longest prompt of the samples."""
MAX_TEXT_BUCKETS = 3
MAX_IMAGE_SIZES = 4
WORTHWHILE = 0.02
"""Share of all rows that another shape must save."""
_MULTIPLE = 8  # tensor cores take rows by eights
_SMALLEST = 8


@dataclass(frozen=True, kw_only=True)
class BundleShape:
    """The fixed shapes that the samples ask for."""

    image_sizes: tuple[tuple[int, int], ...]
    """(width, height), the one with the most visual tokens first."""
    text_buckets: tuple[int, ...]
    dtype: FloatType
    max_new_tokens: int
    profiles: tuple[Mapping[str, int], ...]
    """Sizes of the vision graph at each of ``image_sizes``."""

    @property
    def num_visual(self) -> int:
        """N of the largest image, which the schedule is made for."""
        return max(sizes["N"] for sizes in self.profiles)


def bundle_shape(
    model: TorchModel,
    samples: Sequence[SampleShape],
    *,
    dtype: Literal["auto", "float16", "float32"],
    max_new_tokens: int,
) -> BundleShape:
    """Return the shapes that fit the samples.

    Raises:
        ScheduleError: If the longest sequence does not fit the model.
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
    """Return what schedules cost on ``target`` for images and prompts like the samples'."""
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
    """Return one line that says why a bundle with ``schedule`` cannot fit the target's memory; None if it fits."""
    layout = Layout(
        vision_sizes=shape.profiles,
        schedule=schedule,
        token_keep=None,
        text_buckets=shape.text_buckets,
        max_new_tokens=shape.max_new_tokens,
        dtype=shape.dtype,
        opset=18,
    )
    dimensions = dimensions_of(model.parts)
    inputs = fit_inputs(model.parts, dimensions, layout=layout, processing=model.images, quantize=quantize)
    return check_fit(inputs, find_device(target))


def text_buckets(shapes: Sequence[SampleShape], *, room: int) -> tuple[int, ...]:
    """Return the sizes that prompts are padded to, ascending.

    The last one is the longest prompt with a margin, as far as there is ``room``, in multiples of 8. Shorter ones are added, the
    most useful first, while each takes ``WORTHWHILE`` off the mean number of rows, text and visual.
    """
    lengths = [shape.num_text for shape in shapes]
    with_margin = min(_rounded(TEXT_MARGIN * max(lengths)), room - room % _MULTIPLE)
    longest = max(with_margin, _rounded(max(lengths)))

    def rows(sizes: Sequence[int]) -> float:
        return fmean(_covering(sizes, shape.num_text) + shape.sizes["N"] for shape in shapes)

    others = {_rounded(length) for length in lengths} - {longest}
    return tuple(sorted(_worthwhile(longest, others, most=MAX_TEXT_BUCKETS, rows=rows)))


def image_sizes(shapes: Sequence[SampleShape]) -> tuple[tuple[int, int], ...]:
    """Return (width, height) of images whose numbers of visual tokens the bundle gets exact shapes for.

    The first one has the most tokens of all samples, so every sample has room. Others are added, the most useful first, while
    each takes ``WORTHWHILE`` off the mean number of visual rows. Of the images with one number of tokens the most common
    size stands for all.
    """
    of_count: dict[int, Counter[tuple[int, int]]] = {}
    for shape in shapes:
        of_count.setdefault(shape.sizes["N"], Counter())[(shape.width, shape.height)] += 1

    def rows(counts: Sequence[int]) -> float:
        return fmean(_covering(counts, shape.sizes["N"]) for shape in shapes)

    most = max(of_count)
    chosen = _worthwhile(most, set(of_count) - {most}, most=MAX_IMAGE_SIZES, rows=rows)
    # of equally common sizes the smaller one: the order of the samples decides nothing
    return tuple(max(sorted(of_count[count]), key=of_count[count].__getitem__) for count in chosen)


def rounds_with_margin(largest: int) -> int:
    """Return NMS rounds with a margin of a quarter, at least 2, over the largest number that a sample took."""
    return largest + max(2, math.ceil(largest / 4))


def _worthwhile(
    largest: int, others: set[int], *, most: int, rows: Callable[[Sequence[int]], float]
) -> list[int]:
    """Return ``largest`` and those ``others``, the most useful first, that each take ``WORTHWHILE`` off ``rows``."""
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
    """Return which profile and which text bucket a sample runs at."""
    room = [index for index, sizes in enumerate(shape.profiles) if sizes["N"] >= sample.sizes["N"]]
    profile = min(room, key=lambda index: shape.profiles[index]["N"])
    return profile, _covering(shape.text_buckets, sample.num_text)
