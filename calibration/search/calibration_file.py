"""``calibration.json``: options and results of a calibration. Its ``options`` suffice to repeat it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from trio_edge.calibration.quantize.report import QuantizationReport
from trio_edge.calibration.search.options import CalibrationOptions
from trio_edge.calibration.search.schedules.prefill_cost import CostKind
from trio_edge.runtime.bundle.errors import DataError
from trio_edge.runtime.bundle.schedule import Schedule

if TYPE_CHECKING:
    from pathlib import Path

CALIBRATION_NAME = "calibration.json"
BUNDLE_NAME = "bundle"
SCHEMA_VERSION = 4


class Measure(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A mean with its 95 % interval."""

    value: float
    interval_95: tuple[float, float]


class Fidelity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Agreement of a schedule with keep-all on one part of the samples."""

    samples: int
    kl: Measure
    agreement: Measure
    """Share of samples with the same answer tokens."""


class FrontPoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A schedule's figures."""

    stages: tuple[tuple[int, int], ...]
    first_token_ms: float
    """Predicted."""
    flops: float
    """FLOPs of vision tower and prefill, mean over the samples."""
    average_keep: float
    """As a share of the largest image's visual tokens."""
    search: Fidelity
    held_out: Fidelity


class SingleStage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Divergence of a schedule with one stage, on the search samples."""

    layer: int
    keep: int
    kl: float


class CalibrationData(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The samples."""

    sha256: str
    """SHA-256 of questions and images."""
    samples: int
    search: int
    held_out: int
    images: int
    num_visual: tuple[int, int]
    """Fewest and most visual tokens of an image."""
    num_text: tuple[int, int]
    """Shortest and longest prompt in text tokens."""


class Shapes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The bundle's fixed shapes."""

    image_sizes: tuple[tuple[int, int], ...]
    text_buckets: tuple[int, ...]
    largest_rounds: int
    """Most NMS rounds of the chosen schedule on any sample."""


class Accuracy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Exact matches with the samples' answers, on the held-out samples that have any."""

    samples: int
    keep_all: Measure
    chosen: Measure
    difference: Measure


class LayerAgreement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A layer's saliency against the whole model's gradient of the same loss, mean over samples without reduction."""

    layer: int
    spearman: Measure
    """Rank correlation."""
    overlap: Measure
    """Share of the best ninth of the tokens by the gradient that the saliency has among its own best ninth."""


class Tried(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One value of a setting compared with the default, on the same schedules and samples."""

    setting: str
    value: str
    kl: float
    minus_default: float
    interval_95: tuple[float, float]
    """95 % interval of ``minus_default``; samples are paired by image."""
    chosen: bool


class Calibration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of the file."""

    schema_version: int
    options: CalibrationOptions
    data: CalibrationData
    rule: str
    """The selection rule in words."""
    schedule: Schedule
    """The chosen one, with the bundle's NMS rounds."""
    shapes: Shapes
    chosen: FrontPoint
    usual: FrontPoint | None
    """``trio-export``'s default schedule with the nearest average keep that is not above the chosen one's."""
    compared_by: CostKind
    keep_all_ms: float
    """Predicted time to the first token without stages."""
    keep_all_flops: float
    prediction: str
    """Known error of such predictions, in words."""
    accuracy: Accuracy | None
    quantization: QuantizationReport | None
    """None if neither vision graph, decoder, head nor KV caches are quantized."""
    quantized_held_out: Fidelity | None
    """The chosen schedule with quantized weights and KV caches, compared with keep-all in floating point."""
    front: list[FrontPoint]
    """Schedules that no cheaper one beats on the search samples."""
    settings: list[Tried]
    single_stages: list[SingleStage]
    largest_values: dict[str, float]
    """Largest absolute value into or out of each module on a few samples; empty if the bundle is not in float16."""
    gradients: list[LayerAgreement]
    whole_gradient: Measure | None
    """The chosen schedule's KL when the whole gradient ranks the tokens, minus its own, on the same samples."""
    num_measured: int
    revision: str | None
    compute_dtype: str
    versions: dict[str, str]


class _DataHead(msgspec.Struct):
    sha256: str | None = None


class _Head(msgspec.Struct):
    """The part of a ``--config`` that is read; the rest may come from another release."""

    options: CalibrationOptions
    data: _DataHead | None = None


def read_options(path: Path) -> tuple[CalibrationOptions, str | None]:
    """Return the options of a ``calibration.json``, and the digest of its samples, if it has one.

    The file needs only ``{"options": …}``.

    Raises:
        DataError: If it is not such a file.
    """
    try:
        head = msgspec.json.decode(path.read_bytes(), type=_Head)
    except OSError as error:
        raise DataError(f"--config {path}: cannot be read ({error.strerror}); check the name") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"--config {path}: expected a calibration.json with 'options', got something else ({reason});"
            " make one with trio-calibrate"
        ) from None
    return head.options, None if head.data is None else head.data.sha256


def json_of(calibration: Calibration) -> bytes:
    """Return the bytes of ``calibration.json``."""
    return msgspec.json.format(msgspec.json.encode(calibration), indent=1) + b"\n"
