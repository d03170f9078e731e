"""Exports test checkpoints, each once in a test run: tracing takes seconds, so tests and worker processes share bundles."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

from tests.shared_folder import made_once
from tests.shared_traces import shared_traces
from trio_edge.export.bundle import export_bundle
from trio_edge.export.checkpoints.checkpoint import TINY_FOLDER
from trio_edge.export.options import ExportOptions
from trio_edge.export.quantize.scales import CacheRange, CalibratedScales
from trio_edge.runtime.bundle.schedule import Schedule

INT8_CACHES = CalibratedScales(
    cache_max=tuple(CacheRange(key=2.0 + 0.5 * layer, value=1.0 + 0.2 * layer) for layer in range(3))
)
"""Of three layers, all different; some keys and values are larger."""


def export(
    checkpoint: Path | str,
    copy: Path | None = None,
    *,
    schedule: Schedule = Schedule(),  # noqa: B008
    scales: CalibratedScales = CalibratedScales(),  # noqa: B008
    **options: Any,
) -> Path:
    """Return a bundle of ``checkpoint`` with small text sizes, exported once for all who ask for the same.

    Args:
        checkpoint: A folder, or "tiny".
        copy: Where to put a copy that the caller may change. Without it, nobody may change the bundle.
        schedule: The reduction.
        scales: What a calibration would find.
        **options: Other fields of ``ExportOptions``.
    """
    source = TINY_FOLDER if checkpoint == "tiny" else Path(checkpoint)
    settings = {"max_text": 64, "max_new_tokens": 40, **options}

    def make(out: Path) -> None:
        wanted = ExportOptions(model=str(source), out=out, schedule=schedule, **settings)
        with shared_traces():
            export_bundle(wanted, scales=scales)

    wanted = f"{_digest(source)} {schedule} {scales} {sorted(settings.items())}"
    bundle = made_once(f"bundle-{hashlib.sha256(wanted.encode()).hexdigest()[:16]}", make)
    return bundle if copy is None else shutil.copytree(bundle, copy)


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size} ".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
