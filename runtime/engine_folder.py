"""A folder of engines that appears complete or not at all: written beside its target and renamed at the end.

A build that is killed leaves its hidden folder behind; the next build into the same target deletes it, and knows by a
lock which ones a living build still writes.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import sys
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from trio_edge.runtime.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Iterator

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD, RENAME_EXCHANGE


@contextmanager
def engines_beside(target: Path, *, num_bytes: int) -> Iterator[Path]:
    """Yield a new folder that becomes ``target`` when the block ends well and vanishes when it does not.

    Args:
        target: The folder of one target's engines; an old one is replaced in one step.
        num_bytes: About what is going to be written, compared with the free space first.

    Raises:
        BackendError: If nothing can be written there, or the disk is or becomes full.
    """
    made_parent = not target.parent.exists()
    try:
        target.parent.mkdir(exist_ok=True)
        _delete_leftovers(target)
        free = shutil.disk_usage(target.parent).free
        if free < num_bytes:
            raise BackendError(
                f"{target}: expected {num_bytes / 1e9:.2f} GB of free space, got {free / 1e9:.2f} GB; free some"
            )
        folder, lock = _new_folder(target)
    except OSError as error:
        raise BackendError(
            f"{target}: cannot be created ({error.strerror}); make the bundle's folder writable"
        ) from None
    try:
        folder.chmod(0o755)  # mkdtemp makes it private; engines are ordinary files
        yield folder
        _replace(folder, target)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise BackendError(
            f"{target}: expected room for all engines, got '{error.strerror}'; free some space"
        ) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)
        if made_parent:
            with suppress(OSError):  # it holds engines now
                target.parent.rmdir()


def _new_folder(target: Path) -> tuple[Path, int | None]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
        try:
            return folder, _lock(folder)
        except OSError:  # another build took it for a leftover
            continue


def _delete_leftovers(target: Path) -> None:
    pattern = re.compile(rf"\.{re.escape(target.name)}\.partial-\w{{8}}")
    for folder in [path for path in target.parent.iterdir() if pattern.fullmatch(path.name)]:
        try:
            lock = _lock(folder)
        except OSError:
            continue
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """Return a descriptor that holds ``folder`` while this process lives; None where there are no such locks.

    Raises:
        OSError: If another process holds it, or it is gone.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:  # some network file systems
        os.close(descriptor)
        return None
    return descriptor


def _replace(folder: Path, target: Path) -> None:
    if not target.exists():
        folder.rename(target)
    elif not _exchange(folder, target):
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
        old = target.rename(aside / target.name)
        try:
            folder.rename(target)
        except BaseException:
            old.rename(target)
            raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap the names of two folders in one step; return whether this system can."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    return bool(rename(_HERE, os.fsencode(first), _HERE, os.fsencode(second), _EXCHANGE) == 0)
