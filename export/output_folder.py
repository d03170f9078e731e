"""A folder that appears complete or not at all: written beside its target and renamed at the end."""

from __future__ import annotations

import errno
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from trio_edge.runtime.errors import CheckpointError
from trio_edge.runtime.manifest import MANIFEST_NAME

if TYPE_CHECKING:
    from collections.abc import Iterator

_SPARE_BYTES = 64 << 20  # graphs, tokenizer and manifest beside the weights


def check_output(out: Path, *, force: bool) -> None:
    """Raise CheckpointError if ``out`` exists and may not be replaced. Only bundles and empty folders ever are."""
    if not out.exists() and not out.is_symlink():
        return
    if not force:
        raise CheckpointError(
            f"{out}: expected no such folder, it exists; choose another --out or add --force"
        )
    if not out.is_dir() or out.is_symlink():
        raise CheckpointError(
            f"{out}: expected a bundle to replace, got a file or a link; choose another --out"
        )
    if not (out / MANIFEST_NAME).exists() and any(out.iterdir()):
        raise CheckpointError(
            f"{out}: expected a bundle to replace, got a folder of other files; choose another --out"
        )


@contextmanager
def folder_beside(out: Path, *, num_bytes: int, force: bool) -> Iterator[Path]:
    """Yield a new folder beside ``out`` that becomes ``out`` when the block ends well and vanishes when it does not.

    Args:
        out: The target.
        num_bytes: What is going to be written, checked against the free space first.
        force: Whether an existing bundle at ``out`` is replaced.

    Raises:
        CheckpointError: If the folder cannot be written or the disk is full.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
        if free < num_bytes + _SPARE_BYTES:
            raise CheckpointError(
                f"{out.parent}: expected {(num_bytes + _SPARE_BYTES) / 1e9:.2f} GB of free space,"
                f" got {free / 1e9:.2f} GB; free some or choose another --out"
            )
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    except OSError as error:
        raise CheckpointError(f"{out}: cannot create it ({error.strerror}); choose another --out") from None
    try:
        partial.chmod(0o755)  # mkdtemp makes it private; a bundle is an ordinary folder
        yield partial
        check_output(out, force=force)  # again: the export took a while
        _replace(partial, out)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(
                f"{out}: no space left on the device; free some or choose another --out"
            ) from None
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace(partial: Path, out: Path) -> None:
    """Rename ``partial`` to ``out``; an old bundle is renamed aside first, so that no moment shows half of one."""
    if not out.exists():
        partial.rename(out)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
    try:
        old = out.rename(aside / out.name)
        try:
            partial.rename(out)
        except OSError:
            old.rename(out)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
