"""Exports test checkpoints once per test session: tracing takes seconds, so tests share bundles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trio_edge.export.bundle import ExportOptions, export_bundle
from trio_edge.runtime.schedule import Schedule

if TYPE_CHECKING:
    from pathlib import Path


def export(checkpoint: Path | str, out: Path, *, schedule: Schedule = Schedule(), **options: Any) -> Path:  # noqa: B008
    """Export with small text sizes and return the bundle's folder."""
    settings = {"max_text": 64, "max_new_tokens": 40, **options}
    export_bundle(
        ExportOptions(model=str(checkpoint), out=out, **settings),
        schedule_for=lambda _layers, _visual: schedule,
    )
    return out
