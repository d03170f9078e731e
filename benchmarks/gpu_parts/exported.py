"""Full-size bundles of a random checkpoint, exported one at a time and deleted after use.

The checkpoint is on disk, so that torch and the bundles have the same weights. This needs disk space for two copies of the
weights and for the engines.
"""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpu_parts.subjects import Shapes
from parts.released_shapes import FAMILIES, make_checkpoint

from trio_edge.runtime.bundle.schedule import Schedule

_SHARD_BYTES = int(5e9)


@contextmanager
def random_checkpoint(shapes: Shapes, folder: Path, *, dtype: str) -> Iterator[Path]:
    """Yield a checkpoint of these shapes below ``folder``; it is deleted at the end."""
    family = dataclasses.replace(
        FAMILIES[shapes.family], config=shapes.config, preprocessor=shapes.preprocessor
    )
    checkpoint = folder / f"{shapes.family}-checkpoint"
    shutil.rmtree(checkpoint, ignore_errors=True)
    try:
        make_checkpoint(checkpoint, family=family, num_layers=None, dtype=dtype, shard_bytes=_SHARD_BYTES)
        yield checkpoint
    finally:
        shutil.rmtree(checkpoint, ignore_errors=True)


@contextmanager
def exported_bundle(
    checkpoint: Path,
    schedule: Schedule,
    *,
    picture: tuple[int, int],
    num_text: int,
    max_new_tokens: int,
    dtype: str,
) -> Iterator[Path]:
    """Yield a bundle of ``checkpoint`` for pictures of one size, made by ``trio-export``; it is deleted at the end."""
    bundle = checkpoint.with_name(f"{checkpoint.name}-bundle")
    stages = ",".join(f"{stage.layer}:{stage.keep}" for stage in schedule.stages)
    reduction = ["--schedule", stages] if stages else ["--keep", "100%"]
    arguments = [
        str(checkpoint), "--out", str(bundle), "--quiet", "--force", "--dtype", dtype, *reduction,
        "--image-size", "x".join(map(str, picture)), "--only-image-sizes", "--max-text", str(num_text),
        "--text-buckets", str(num_text), "--max-new-tokens", str(max_new_tokens),
    ]  # fmt: skip
    try:
        _export(arguments)
        yield bundle
    finally:
        shutil.rmtree(bundle, ignore_errors=True)


def export_packaged_model(bundle: Path, *, dtype: str) -> None:
    """Export the packaged model at 11.1 %."""
    _export(["tiny", "--out", str(bundle), "--quiet", "--keep", "11.1%", "--dtype", dtype])


def _export(arguments: list[str]) -> None:
    """Run ``trio-export`` in its own process, because it configures torch differently.

    Raises:
        RuntimeError: If it fails.
    """
    code = "import sys; from trio_edge.export.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], check=False, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["trio-export printed nothing"])[-1])
