"""``calibration.json``: options and results of a calibration. Its ``options`` suffice to repeat it."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from trio_edge.calibration.quantize.report import QuantizationReport
from trio_edge.calibration.search.schedules.candidates import Tried
from trio_edge.calibration.search.schedules.prefill_cost import CostKind
from trio_edge.calibration.search.schedules.space import DEFAULT_KEEPS, DEFAULT_THRESHOLDS
from trio_edge.export.quantize.plan import parse_plan
from trio_edge.runtime.bundle.errors import DataError, ScheduleError
from trio_edge.runtime.bundle.schedule import Schedule
from trio_edge.trio.cost.devices import find_device

if TYPE_CHECKING:
    from pathlib import Path

CALIBRATION_NAME = "calibration.json"
REPORT_NAME = "calibration.html"
BUNDLE_NAME = "bundle"
SCHEMA_VERSION = 1


_BOUNDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "count": (lambda count: count >= 2, "2 or more samples"),
    "seed": (lambda seed: seed >= 0, "a number of 0 or more"),
    "held_out": (lambda share: 0.0 < share < 1.0, "a share between 0 and 100%"),
    "answer_tokens": (lambda count: 1 <= count <= 64, "1..64"),
    "max_kl": (lambda nats: 0.0 <= nats < inf, "nats of 0 or more"),
    "target_ms": (lambda time: 0.0 < time < inf, "a time above 0"),
    "keep": (lambda share: 0.0 < share <= 1.0, "a share above 0, up to 100%"),
    "max_stages": (lambda count: 1 <= count <= 4, "1..4"),
    "nms_thresholds": (lambda values: all(0.0 < value <= 1.0 for value in values), "values in (0, 1]"),
    "evaluations": (lambda count: 0 <= count <= 10_000, "0..10000"),
    "max_new_tokens": (lambda count: count >= 1, "1 or more"),
}
"""Checks of the options' values, and each rule in words."""


class CalibrationOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The options of ``trio-calibrate``, which explains them, under their names. The only defaults are here."""

    model: str
    samples: str
    target: str
    revision: str | None = None
    prompt: str | None = None
    count: int | None = None
    seed: int = 0
    held_out: float = 1 / 3
    answer_tokens: int = 4
    max_kl: float | None = None
    target_ms: float | None = None
    keep: float | None = None
    layers: tuple[int, ...] = ()
    keeps: tuple[float, ...] = DEFAULT_KEEPS
    max_stages: int = 3
    nms_thresholds: tuple[float, ...] = DEFAULT_THRESHOLDS
    evaluations: int = 120
    cost: Literal["auto", "time", "flops"] = "auto"
    dtype: Literal["auto", "float16", "float32"] = "auto"
    quantize: str = "none"
    max_visual: int | None = None
    max_new_tokens: int = 256
    only_image_sizes: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        find_device(self.target)
        parse_plan(self.quantize)
        rules = [name for name in ("max_kl", "target_ms", "keep") if getattr(self, name) is not None]
        if len(rules) > 1:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in rules)
            raise ScheduleError(
                f"--max-kl, --target-ms, --keep: expected one, got {names}; leave the others out"
            )
        for name, (holds, rule) in _BOUNDS.items():
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise ScheduleError(f"--{name.replace('_', '-')}: expected {rule}, got {value}")


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
    """Of vision tower and prefill, mean over the samples."""
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
    pictures: int
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
