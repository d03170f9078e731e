"""A folder that appears complete or not at all: written beside its target and renamed at the end.

The folder beside the target is locked while its process lives, so the next export into the same target can tell what a
killed one left (and deletes it) from what another one is still writing.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from trio_edge.runtime.errors import CheckpointError
from trio_edge.runtime.manifest import MANIFEST_NAME

if TYPE_CHECKING:
    from collections.abc import Iterator

_SPARE_BYTES = 64 << 20  # graphs, tokenizer and manifest beside the weights
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # Linux


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

    What earlier exports into ``out`` left when they were killed is deleted first.

    Args:
        out: The target.
        num_bytes: What is going to be written, checked against the free space first.
        force: Whether an existing bundle at ``out`` is replaced.

    Raises:
        CheckpointError: If the folder cannot be written or the disk is full.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        delete_leftovers(out)
        free = shutil.disk_usage(out.parent).free
        if free < num_bytes + _SPARE_BYTES:
            raise CheckpointError(
                f"{out.parent}: expected {(num_bytes + _SPARE_BYTES) / 1e9:.2f} GB of free space,"
                f" got {free / 1e9:.2f} GB; free some or choose another --out"
            )
        partial, lock = _new_folder(out)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot create it ({error.strerror}); choose another --out") from None
    try:
        partial.chmod(0o755)  # mkdtemp makes it private; a bundle is an ordinary folder
        yield partial
        check_output(out, force=force)  # again: the export took a while
        _replace(partial, out)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise CheckpointError(
            f"{out}: expected room for the whole bundle, got '{error.strerror}';"
            " nothing is left behind, free some space or choose another --out"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        _unlock(lock)


def delete_leftovers(out: Path) -> None:
    """Delete the folders beside ``out`` that killed exports left; one that a living process holds stays.

    Raises:
        OSError: If the folder that holds ``out`` cannot be listed.
    """
    pattern = re.compile(rf"\.{re.escape(out.name)}\.partial-[a-z0-9_]{{8}}")
    for folder in [path for path in out.parent.iterdir() if pattern.fullmatch(path.name)]:
        try:
            lock = _lock(folder)
        except OSError:  # in use, not ours, or deleted by another export in this moment
            continue
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            _unlock(lock)


def _new_folder(out: Path) -> tuple[Path, int | None]:
    """Return a new folder beside ``out``, and its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
        try:
            lock = _lock(folder)
        except (BlockingIOError, FileNotFoundError):  # another export took it for a leftover
            continue
        if folder.exists():
            return folder, lock
        _unlock(lock)


def _lock(folder: Path) -> int | None:
    """Return a descriptor that holds ``folder`` until it is closed, also by a kill; None where folders have no locks.

    Raises:
        BlockingIOError: If another process holds it.
        OSError: If it is not there or not ours.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None  # some network file systems
    return descriptor


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def _replace(partial: Path, out: Path) -> None:
    """Rename ``partial`` to ``out``; an old bundle is there until the moment in which the new one is."""
    if not out.exists():
        partial.rename(out)
    elif not _exchange(partial, out):
        aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
        old = out.rename(aside / out.name)
        try:
            partial.rename(out)
        except BaseException:
            old.rename(out)
            raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders' names in one step; return whether this system and file system can."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    names = os.fsencode(first), os.fsencode(second)
    return bool(rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)
