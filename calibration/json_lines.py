"""JSON-lines files that keep the results of a long run, so that an interrupted run can be continued.

The first line is a header that identifies the run; each other line is one result.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar, final

import msgspec

from trio_edge.runtime.bundle.errors import DataError
from trio_edge.runtime.bundle.files import lock_folder, unlock_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

SUFFIX = ".jsonl"
_ENCODER = msgspec.json.Encoder()
Header = TypeVar("Header", bound=msgspec.Struct)
Result = TypeVar("Result")


@final
class ResultFile:
    """A file that results are appended to."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path

    def append(self, line: msgspec.Struct) -> None:
        """Write one line.

        Raises:
            DataError: If not all of it can be written.
        """
        data, reason = _ENCODER.encode(line) + b"\n", "the disk is full"
        try:
            # one unbuffered call, so a kill can cut only the last line
            if self._file.write(data) == len(data):
                return
        except OSError as error:
            reason = str(error.strerror)
        raise DataError(
            f"{self._path}: expected space for one more line, got none ({reason}); free some and run again"
        )


def read_header(path: Path, kind: type[Header], *, what: str) -> Header | None:
    """Return the header; None if there is no file or its first line is incomplete. ``what`` names the file in messages.

    Raises:
        DataError: If the file cannot be read, or its first line is another kind of header.
    """
    try:
        with path.open("rb") as file:
            line = file.readline()
        return msgspec.json.decode(line, type=kind) if line.endswith(b"\n") else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError):  # msgspec's errors are ValueErrors
        raise DataError(f"{path}: expected {what}, got something else; choose an empty folder") from None


@contextmanager
def opened_results(
    path: Path, header: msgspec.Struct, kind: type[Result], *, what: str
) -> Iterator[tuple[ResultFile, list[Result]]]:
    """Yield a file to append to, and its results. A new file gets the header; an incomplete last line is removed.

    Raises:
        DataError: If the file has another header, cannot be read or written, or a line is not ``what``; that message starts
            with FILE:LINE.
    """
    theirs = read_header(path, type(header), what="a file of results")
    if theirs is not None and theirs != header:
        names = [name for name in header.__struct_fields__ if getattr(theirs, name) != getattr(header, name)]
        raise DataError(
            f"{path}: expected results of this model and these samples, got others"
            f" ({', '.join(names)} differ); choose another --work"
        )
    try:
        file = path.open("a+b", buffering=0)
        file.seek(0)
        data = file.readall()
        file.truncate(data.rfind(b"\n") + 1)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror}); free some space or choose another folder"
        ) from None
    with file:
        results, known = ResultFile(file, path), list[Result]()
        if b"\n" not in data:
            results.append(header)
        # the last line is empty or incomplete
        for number, line in enumerate(data.split(b"\n")[1:-1], start=2):
            try:
                known.append(msgspec.json.decode(line, type=kind))
            except (msgspec.DecodeError, UnicodeDecodeError):
                raise DataError(
                    f"{path}:{number}: expected {what}, got {line[:40]!r}; delete the line"
                ) from None
        yield results, known


@contextmanager
def work_folder(folder: Path | None) -> Iterator[Path]:
    """Yield ``folder``, created if needed and locked against other runs; for None a temporary one.

    Raises:
        DataError: If it cannot be written, or another run has locked it.
    """
    with ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trio-edge-")))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.callback(unlock_folder, lock_folder(folder))
        except BlockingIOError:
            raise DataError(
                f"{folder}: expected one run at a time, got a second one; wait, or choose another folder"
            ) from None
        except OSError as error:
            raise DataError(
                f"{folder}: expected a folder to write to ({error.strerror}); choose another"
            ) from None
        yield folder
