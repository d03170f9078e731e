"""The number format of each part of a bundle, and the syntax of ``--quantize``."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

from trio_edge.runtime.bundle.errors import CheckpointError, ScheduleError
from trio_edge.runtime.bundle.manifest import PART_FROM_ROLE, Part

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trio_edge.export.checkpoints.checkpoint import Checkpoint
    from trio_edge.runtime.bundle.manifest import Role
    from trio_edge.runtime.bundle.schedule import Schedule

Format = Literal["none", "int4", "int8", "fp8"]
FORMATS: tuple[Format, ...] = get_args(Format)
PARTS: tuple[Part, ...] = get_args(Part)
_PARTS_FROM_NAME: dict[str, tuple[Part, ...]] = {
    **{part: (part,) for part in PARTS},
    "decoder": ("prefix", "segments", "suffix"),
    "all": ("vision", "prefix", "segments", "suffix", "select", "head"),
}
_ONLY_INT8: dict[Part, str] = {
    "embedding": "its rows are read by the host, one scale each",
    "kv": "INT4 is for weights only, and FP8 caches are not supported",
}
_MOST_OUTLIERS = 25
"""In per cent; with more, INT8 is smaller."""
OPSETS: dict[Format, int] = {"int4": 21, "int8": 19, "fp8": 19}
"""First ONNX opset with INT4; with float16 in QuantizeLinear; with FP8."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizePlan:
    """The weight format of every part; other parts stay in floating point."""

    formats: Mapping[Part, Format] = field(default_factory=dict)
    outliers: float = 0.0
    """Share of the inputs of an INT4 weight that stay in floating point."""

    def of_part(self, part: Part) -> Format:
        """Return the format of ``part``."""
        return self.formats.get(part, "none")

    def of_role(self, role: Role) -> Format:
        """Return the format of graphs with ``role``."""
        return self.of_part(PART_FROM_ROLE[role]) if role in PART_FROM_ROLE else "none"

    def names(self, role: Role) -> bool:
        """Return whether it has a format for graphs with ``role``."""
        return PART_FROM_ROLE.get(role) in self.formats

    def of_layers(self, schedule: Schedule, *, num_layers: int) -> list[Format]:
        """Return the format of each decoder layer's own graph."""
        starts = [stage.layer for stage in schedule.stages]
        parts: list[Part] = []
        for layer in range(num_layers):
            is_last = bool(starts) and layer >= starts[-1]
            parts.append("suffix" if is_last else "segments" if starts and layer >= starts[0] else "prefix")
        return [self.of_part(part) for part in parts]

    @property
    def has_cache(self) -> bool:
        """Whether the KV caches are in INT8."""
        return self.of_part("kv") == "int8"

    @property
    def has_factors(self) -> bool:
        """Whether a calibration chooses smoothing factors: not for FP8, nor for selections, which use their layers' ones."""
        return any(
            self.of_part(part) in ("int4", "int8") for part in _PARTS_FROM_NAME["all"] if part != "select"
        )


def parse_plan(text: str) -> QuantizePlan:
    """Return the plan in the text of ``--quantize``: FORMAT for the decoder, or PART=FORMAT,…; later entries win.

    PART is one of ``PARTS``, "decoder" (prefix, segments, suffix) or "all" (every graph); "kv" means the KV caches.
    "outliers" has a percentage in place of a format.

    Raises:
        ScheduleError: If the text has another form.
    """
    formats: dict[Part, Format] = {}
    outliers = 0.0
    for entry in text.split(","):
        name, equals, kind = entry.strip().rpartition("=")
        if name == "outliers":
            outliers = _share(kind)
            continue
        if kind not in FORMATS:
            raise ScheduleError(
                f"--quantize: expected {', '.join(FORMATS)}, got {kind!r}; write it as int4 or suffix=int4,head=int8"
            )
        if (parts := _PARTS_FROM_NAME.get(name if equals else "decoder")) is None:
            raise ScheduleError(
                f"--quantize: expected one of {', '.join(_PARTS_FROM_NAME)}, got {name!r}; write it as suffix=int4,head=int8"
            )
        formats |= dict.fromkeys(parts, kind)
    for part, reason in _ONLY_INT8.items():
        if (kind := formats.get(part, "none")) not in ("int8", "none"):
            raise ScheduleError(
                f"--quantize: expected {part}=int8 or none, got {kind} ({reason}); choose one of these"
            )
    if outliers and "int4" not in formats.values():
        raise ScheduleError(
            "--quantize: expected outliers with a part in int4, got none; write it as int4,outliers=10%"
        )
    return QuantizePlan(formats=formats, outliers=outliers)


def _share(text: str) -> float:
    """Return the share in a text such as "10%"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)%", text)
    if match is None or not 0 < float(match[1]) <= _MOST_OUTLIERS:
        raise ScheduleError(
            f"--quantize: expected outliers above 0% and up to {_MOST_OUTLIERS}%, got {text!r}; write it as int4,outliers=10%"
        )
    return float(match[1]) / 100


def check_packed(checkpoint: Checkpoint, plan: QuantizePlan) -> None:
    """Raise CheckpointError if ``checkpoint`` has integers with zero points and ``plan`` is empty."""
    asymmetric = next((name for name, one in checkpoint.packed.items() if not one.format.is_symmetric), None)
    if asymmetric is not None and not plan.formats:
        raise CheckpointError(
            f"{checkpoint.folder} {asymmetric}: expected symmetric integers, which alone TensorRT reads, got zero points; add"
            " --quantize int4 to round the values again, or --quantize none for floating point"
        )
