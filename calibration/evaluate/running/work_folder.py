"""A folder of outcomes that grows answer by answer, so that an interrupted evaluation goes on where it stopped.

One JSON-lines file for each run: its first line says what was run (``RunKey``), every other is an outcome. A line is
written in one call; what a kill left of the last one is dropped. The folder belongs to one data set and its bundles.
"""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO, final

import msgspec

from trio_edge.calibration.evaluate.running.answering import Outcome
from trio_edge.runtime.bundle.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

    from trio_edge.calibration.questions import Question

SCHEMA_VERSION = 1
_LOCK_NAME = ".lock"
_SUFFIX = ".jsonl"
_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(Outcome)


class RunKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What decides an answer: outcomes of equal keys are interchangeable."""

    schema_version: int
    data_sha256: str
    bundle_sha256: str
    """Of its manifest, which has the digests of all other files."""
    selection: str
    reference_sha256: str | None
    """Bundle that ``first_token_kl`` compares with."""
    answer_tokens: int
    backend: str

    @property
    def file_name(self) -> str:
        """Name of the run's file."""
        digest = hashlib.sha256(_ENCODER.encode(self)).hexdigest()
        return f"{self.bundle_sha256[:12]}-{self.selection}-{digest[:12]}{_SUFFIX}"


@contextmanager
def opened_for_work(folder: Path, keys: Collection[RunKey]) -> Iterator[None]:
    """Create the folder if it is not there, check that it is of these runs, and lock it.

    Raises:
        DataError: If it cannot be written, is in use, or holds other files, other data, or other bundles only.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{folder}: expected a folder to write to ({error.strerror}); choose another"
        ) from None
    check_folder(folder, keys)
    with _locked(folder):
        yield


def check_folder(folder: Path, keys: Collection[RunKey]) -> None:
    """Raise DataError unless the folder is empty, or holds outcomes of these data and of at least one of these bundles."""
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a folder of outcomes, got none; check the name")
    paths = sorted(path for path in folder.iterdir() if path.name != _LOCK_NAME)
    found = [key for key in map(_key_of, paths) if key is not None]
    if not found:
        return
    if any(key.data_sha256 not in {own.data_sha256 for own in keys} for key in found):
        raise DataError(
            f"{folder}: expected outcomes of these questions, got those of others"
            " (data, metric, --count, --seed, --split or --suffix differ); choose another folder"
        )
    if not {key.bundle_sha256 for key in found} & {own.bundle_sha256 for own in keys}:
        raise DataError(
            f"{folder}: expected outcomes of these bundles, got those of others; choose another folder"
        )


def read_outcomes(folder: Path, key: RunKey) -> dict[int, Outcome]:
    """Return the run's outcomes by question; none if it has no file yet. A cut last line is left out.

    Raises:
        DataError: If another line is broken; the message starts with FILE:LINE.
    """
    path = folder / key.file_name
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); choose another folder") from None
    outcomes = {}
    for number, line in enumerate(lines[1:-1], start=2):  # the last one has no line break: cut, or empty
        try:
            outcome = _DECODER.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise DataError(
                f"{path}:{number}: expected an outcome, got {line[:40]!r}; delete the line"
            ) from None
        outcomes[outcome.index] = outcome
    return outcomes


@contextmanager
def appending(folder: Path, key: RunKey) -> Iterator[OutcomeFile]:
    """Yield the run's file, to append to; what a kill left of its last line is cut off first."""
    path = folder / key.file_name
    try:
        with path.open("ab", buffering=0) as file:
            size = path.read_bytes().rfind(b"\n") + 1
            file.truncate(size)
            out = OutcomeFile(file, path)
            if not size:
                out.write_line(_ENCODER.encode(key))
            yield out
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror}); free some space or choose another folder"
        ) from None


@final
class OutcomeFile:
    """A run's file."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path

    def append(self, outcome: Outcome) -> None:
        """Write one outcome."""
        self.write_line(_ENCODER.encode(outcome))

    def write_line(self, line: bytes) -> None:
        """Write a line in one call."""
        data = line + b"\n"
        if self._file.write(data) != len(data):
            raise DataError(
                f"{self._path}: expected room for a line, the disk is full; free some and run again"
            )


def still_valid(outcomes: dict[int, Outcome], questions: Collection[Question]) -> dict[int, Outcome]:
    """Return the outcomes of those of ``questions`` whose picture is still the same."""
    pictures = {question.index: question.picture_id for question in questions}
    return {
        index: outcome for index, outcome in outcomes.items() if pictures.get(index) == outcome.picture_id
    }


def _key_of(path: Path) -> RunKey | None:
    """Return what a run's file says on its first line; None if a kill cut that."""
    try:
        with path.open("rb") as file:
            line = file.readline()
        if path.suffix == _SUFFIX and not line.endswith(b"\n"):
            return None
        key = msgspec.json.decode(line, type=RunKey)
    except (OSError, ValueError):  # msgspec's errors are ValueErrors
        raise DataError(
            f"{path}: expected a file of outcomes, got something else; choose an empty folder"
        ) from None
    if key.schema_version != SCHEMA_VERSION:
        raise DataError(
            f"{path}: outcomes have schema_version {key.schema_version}, this release reads {SCHEMA_VERSION};"
            " choose another folder"
        )
    return key


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / _LOCK_NAME).open("wb") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows has no such lock; two runs at once only repeat work
            pass
        except OSError:
            raise DataError(
                f"{folder}: expected one trio-eval at a time, another one writes to it; wait or choose another"
            ) from None
        yield
