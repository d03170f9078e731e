"""What the bundle of a calibration is going to be like: its fixed shapes, what they cost, and whether they fit the target."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from trio_edge.calibration.search.fixed_shapes import picture_sizes, text_buckets
from trio_edge.calibration.search.prefill_cost import PrefillCost, Situation
from trio_edge.export.bundle import bundle_dtype, dimensions_of
from trio_edge.export.check.fit import check_fit, fit_inputs
from trio_edge.export.families.decoder_config import check_positions, max_positions
from trio_edge.export.layout import Layout
from trio_edge.trio.cost.devices import find_device

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from trio_edge.calibration.model.prompts import SampleShape
    from trio_edge.calibration.model.torch_model import TorchModel
    from trio_edge.export.quantize.plan import QuantizePlan
    from trio_edge.runtime.bundle.manifest import FloatType
    from trio_edge.runtime.bundle.schedule import Schedule


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
        """N of the largest picture, which the schedule is made for."""
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
    sizes = picture_sizes(samples)
    profiles = tuple(model.pictures.sizes(*size) for size in sizes)
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
    """Return what schedules cost on ``target`` for pictures and prompts like the samples'."""
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
    inputs = fit_inputs(model.parts, dimensions, layout=layout, processing=model.pictures, quantize=quantize)
    return check_fit(inputs, find_device(target))


def _padded(shape: BundleShape, sample: SampleShape) -> tuple[int, int]:
    """Return which profile and which text bucket a sample runs at."""
    room = [index for index, sizes in enumerate(shape.profiles) if sizes["N"] >= sample.sizes["N"]]
    profile = min(room, key=lambda index: shape.profiles[index]["N"])
    return profile, next(bucket for bucket in shape.text_buckets if bucket >= sample.num_text)
