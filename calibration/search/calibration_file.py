"""``calibration.json``: options and results of a calibration. Its ``options`` alone repeat the calibration."""

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
"""Rules for the options that are given, with the rule in words."""


class CalibrationOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that a user can choose, as ``trio-calibrate --help`` explains it. The fields hold the only defaults."""

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
                f"--max-kl, --target-ms, --keep: expected one of them, got {names}; choose one"
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
    """Closeness of a schedule to keep-all on one part of the samples."""

    samples: int
    kl: Measure
    agreement: Measure
    """Share of samples with the same answer tokens."""


class FrontPoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A schedule that no cheaper one beats on the search samples."""

    stages: tuple[tuple[int, int], ...]
    first_token_ms: float
    """Predicted."""
    flops: float
    """FLOPs of the prefill with the vision tower, mean over the samples."""
    average_keep: float
    """Share of the largest image's visual tokens."""
    search: Fidelity
    held_out: Fidelity


class SingleStage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The divergence of one stage alone, on the search samples."""

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
    """Fixed shapes that fit the samples."""

    image_sizes: tuple[tuple[int, int], ...]
    text_buckets: tuple[int, ...]
    largest_rounds: int
    """Most rounds that the NMS of the chosen schedule took on any sample."""


class Accuracy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Exact matches with the samples' own answers, on the held-out samples that have some."""

    samples: int
    keep_all: Measure
    chosen: Measure
    difference: Measure


class Calibration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file."""

    schema_version: int
    options: CalibrationOptions
    data: CalibrationData
    rule: str
    """Why the schedule was chosen, in words."""
    schedule: Schedule
    """The chosen one, with NMS rounds for the bundle."""
    shapes: Shapes
    chosen: FrontPoint
    usual: FrontPoint | None
    """``trio-export``'s schedule of the average keep nearest below the chosen one's, with default settings."""
    compared_by: CostKind
    keep_all_ms: float
    """Predicted time without any stage."""
    keep_all_flops: float
    prediction: str
    """Error of such predictions where they could be compared."""
    accuracy: Accuracy | None
    quantization: QuantizationReport | None
    """None where neither vision graph, decoder, head nor a KV cache is quantized."""
    quantized_held_out: Fidelity | None
    """The chosen schedule with quantized weights and KV caches against keep-all in floating point."""
    front: list[FrontPoint]
    settings: list[Tried]
    single_stages: list[SingleStage]
    num_measured: int
    revision: str | None
    compute_dtype: str
    versions: dict[str, str]


class _DataHead(msgspec.Struct):
    sha256: str | None = None


class _Head(msgspec.Struct):
    """The part of a ``--config`` that is read; the rest may be of another release."""

    options: CalibrationOptions
    data: _DataHead | None = None


def read_options(path: Path) -> tuple[CalibrationOptions, str | None]:
    """Return the options of a ``calibration.json``, and the digest of the samples that it was made with.

    A file that holds ``{"options": …}`` alone will do.

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
    """Return the file's bytes."""
    return msgspec.json.format(msgspec.json.encode(calibration), indent=1) + b"\n"
