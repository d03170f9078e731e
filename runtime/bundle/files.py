"""Writes folders and files completely or not at all: next to their target, and renamed at the end.

The temporary folder or file is locked while its process lives. So the next writer of the same target can tell the leftovers
of a killed process, which it deletes, from what another process is still writing.
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
from typing import TYPE_CHECKING, Any

from trio_edge.runtime.bundle.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from trio_edge.runtime.bundle.errors import TrioEdgeError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # Linux


@contextmanager
def atomic_folder(
    target: Path,
    *,
    num_bytes: int,
    error: type[TrioEdgeError],
    what: str,
    way_out: str,
    elsewhere: str = "",
    before_rename: Callable[[], None] = lambda: None,
) -> Iterator[Path]:
    """Yield a new folder that replaces ``target`` in one step when the block succeeds, and is deleted when it fails.

    Leftovers of killed writers of ``target`` are deleted first.

    Args:
        target: The final folder.
        num_bytes: Expected size, compared with the free space first.
        error: Class of the error if the folder cannot be written or the disk is full.
        what: Name of the content for messages, such as "bundle".
        way_out: Advice for a place that cannot be written to.
        elsewhere: Advice for a full disk, apart from freeing space: " or choose another --out".
        before_rename: Called when everything is written; if it raises, ``target`` stays as it was.

    Raises:
        TrioEdgeError: An ``error``, see above.
    """
    _check_name(target, error=error)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        delete_leftovers(target)
        _check_free(target.parent, num_bytes=num_bytes, error=error, elsewhere=elsewhere)
        partial, lock = _new_partial(target, is_folder=True)
    except OSError as reason:
        raise error(f"{target}: cannot be created ({reason.strerror}); {way_out}") from None
    try:
        partial.chmod(0o755)  # mkdtemp makes it private, but its content is ordinary files
        yield partial
        before_rename()
        _replace(partial, target)
    except OSError as reason:
        if reason.errno not in _FULL:
            raise
        raise error(
            f"{target}: expected room for the whole {what}, got '{reason.strerror}';"
            f" nothing was kept, free some space{elsewhere}"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        unlock_folder(lock)


def check_place(target: Path, *, num_bytes: int, error: type[TrioEdgeError], way_out: str) -> None:
    """Raise ``error`` if ``atomic_folder`` could not create ``target`` now; changes nothing.

    It saves the user a long computation whose result cannot be written. Arguments are those of ``atomic_folder``.
    """
    _check_name(target, error=error)
    # Path.exists raises in a folder that may not be entered
    place = next(folder for folder in target.absolute().parents if os.path.exists(folder))  # noqa: PTH110
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise error(f"{target}: expected {place} to be a writable folder, got none; {way_out}")
    _check_free(place, num_bytes=num_bytes, error=error, elsewhere=f" or {way_out}")


def _check_name(target: Path, *, error: type[TrioEdgeError]) -> None:
    if target.name in ("", ".."):  # the root, or a folder that a command runs in
        raise error(
            f"{target}: expected a new folder's name, got one that cannot be replaced; choose another"
        )


def _check_free(folder: Path, *, num_bytes: int, error: type[TrioEdgeError], elsewhere: str) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise error(
            f"{folder}: expected {num_bytes / 1e9:.2f} GB of free space, got {free / 1e9:.2f} GB; free some space{elsewhere}"
        )


def delete_leftovers(target: Path) -> None:
    """Delete what killed writers of ``target`` have left; what a living process has locked stays.

    Raises:
        OSError: If the folder that holds ``target`` cannot be listed.
    """
    pattern = re.compile(rf"\.{re.escape(target.name)}\.partial-[a-z0-9_]{{8}}")
    for partial in [path for path in target.parent.iterdir() if pattern.fullmatch(path.name)]:
        try:
            lock = lock_folder(partial)
        except OSError:  # in use, not ours, or just deleted by another writer
            continue
        if lock is not None:
            _delete(partial)
            unlock_folder(lock)


def _delete(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    with suppress(OSError):  # a folder, which is gone, or a file of another user
        partial.unlink()


def _new_partial(target: Path, *, is_folder: bool) -> tuple[Path, int | None]:
    """Return a new folder or file next to ``target``, and its lock."""
    place: dict[str, Any] = {"prefix": f".{target.name}.partial-", "dir": target.parent}
    while True:
        if is_folder:
            partial = Path(tempfile.mkdtemp(**place))
        else:
            handle, name = tempfile.mkstemp(**place)
            os.close(handle)
            partial = Path(name)
        try:
            lock = lock_folder(partial)
        except (BlockingIOError, FileNotFoundError):  # another writer mistook it for a leftover
            continue
        if partial.exists():
            return partial, lock
        unlock_folder(lock)


def lock_folder(folder: Path) -> int | None:
    """Return a descriptor that locks ``folder`` until it is closed, also by a kill; None where folders have no locks.

    A file can be locked as well.

    Raises:
        BlockingIOError: If another process has locked it.
        OSError: If it does not exist or belongs to another user.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY | os.O_NONBLOCK)  # a named pipe would block
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None  # some network file systems
    return descriptor


def unlock_folder(lock: int | None) -> None:
    """Release the lock of ``lock_folder``."""
    if lock is not None:
        os.close(lock)


def _replace(partial: Path, target: Path) -> None:
    """Rename ``partial`` to ``target``; an old folder stays until the new one replaces it."""
    if not target.exists():
        partial.rename(target)
    elif not _exchange(partial, target):
        _replace_in_two_steps(partial, target)


def _replace_in_two_steps(partial: Path, target: Path) -> None:
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
    old = target.rename(aside / target.name)
    try:
        partial.rename(target)
    except BaseException:
        old.rename(target)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap the names of two folders in one step; return whether the system and the file system support it."""
    # Python has no call for it. Without it, there is a moment when no folder has the name.
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    names = os.fsencode(first), os.fsencode(second)
    return bool(rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)


# Single files


def check_outputs(paths: Mapping[str, Path]) -> None:
    """Raise DataError unless every path can be written and all are different files; leaves nothing there.

    ``paths`` are files by the options that name them; existing files will be replaced later.
    """
    named: dict[Path, str] = {}
    for option, path in paths.items():
        with _data_errors(option, path):
            _check_output(option, path)
        if (other := named.setdefault(path.resolve(), option)) != option:
            raise DataError(
                f"{option}: expected another file than {other}'s, got {path} for both; rename one"
            )


def _check_output(option: str, path: Path) -> None:
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise DataError(f"{option}: expected a file in an existing folder, got {path}; create the folder")
    # Renaming onto a device would put a file in its place.
    if (path.exists() or path.is_symlink()) and not path.is_file():
        raise DataError(f"{option}: expected a regular file, got {path}; choose another name")
    partial, lock = _new_partial(path.resolve(), is_folder=False)
    partial.unlink()
    unlock_folder(lock)


def write_output(option: str, path: Path, content: bytes) -> None:
    """Write ``content`` next to ``path`` and rename it; a link's target is replaced, not the link.

    Leftovers of killed writers of ``path`` are deleted first.

    Raises:
        DataError: If it cannot be written; the message names ``option``, and an existing file stays as it was.
    """
    with _data_errors(option, path):
        target = path.resolve()
        with suppress(OSError):  # a folder that cannot be listed
            delete_leftovers(target)
        partial, lock = _new_partial(target, is_folder=False)
        try:
            partial.chmod(0o644)  # mkstemp makes it private; a report is an ordinary file
            partial.write_bytes(content)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
            unlock_folder(lock)


@contextmanager
def _data_errors(option: str, path: Path) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    # The last two: a link to itself, a null byte in the name.
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{option} {path}: cannot be written ({reason}); choose another folder") from None
