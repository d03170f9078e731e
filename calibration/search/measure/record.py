"""What was measured, in a file that grows line by line, so that an interrupted calibration goes on where it stopped.

The first line says what it is about (``RecordKey``); a file of something else is refused. A line is written in one call, and
what a kill left of the last one is dropped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, BinaryIO, final

import msgspec

from trio_edge.calibration.search.measure.importance import LayerImportance
from trio_edge.runtime.bundle.errors import DataError
from trio_edge.runtime.bundle.schedule import Schedule

if TYPE_CHECKING:
    from pathlib import Path

RECORD_NAME = "measurements.jsonl"


class RecordKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What decides a measurement: those of equal keys are interchangeable."""

    model: str
    weights: str
    """Digest of names, sizes and times of the weight files."""
    samples_sha256: str
    answer_tokens: int
    dtype: str
    max_visual: int
    """Of all samples: the probes' form follows from it."""


class MeasuredLine(msgspec.Struct, frozen=True, kw_only=True, tag="schedule"):
    """One schedule on one sample."""

    index: int
    schedule: Schedule
    kl: float
    agrees: bool
    rounds: int


class ImportanceLine(msgspec.Struct, frozen=True, kw_only=True, tag="importance"):
    """All layers of one sample."""

    index: int
    layers: list[LayerImportance]


Line = MeasuredLine | ImportanceLine
_ENCODER = msgspec.json.Encoder()
_DECODER: msgspec.json.Decoder[Line] = msgspec.json.Decoder(Line)


@final
class Record:
    """An open file of measurements."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path

    def append(self, line: Line | RecordKey) -> None:
        """Write a line in one call.

        Raises:
            DataError: If it cannot be written, or not whole.
        """
        data, reason = _ENCODER.encode(line) + b"\n", "the disk is full"
        try:
            if self._file.write(data) == len(data):
                return
        except OSError as error:
            reason = str(error.strerror)
        raise DataError(
            f"{self._path}: expected room for a line, got none ({reason}); free some and run again"
        )

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def open_record(folder: Path, key: RecordKey) -> tuple[Record, list[Line]]:
    """Return the folder's record, to append to, and what it holds already.

    Raises:
        DataError: If it cannot be read or written, is broken, or is about something else.
    """
    path = folder / RECORD_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        whole, _, _ = path.read_bytes().rpartition(b"\n") if path.exists() else (b"", b"", b"")
        lines = whole.split(b"\n") if whole else []
        found = _decoded(lines, key, path)
        file = path.open("ab", buffering=0)
    except OSError as error:
        raise DataError(
            f"--work {folder}: cannot be used ({error.strerror}); choose another folder"
        ) from None
    file.truncate(len(whole) + 1 if whole else 0)
    record = Record(file, path)
    if not lines:
        record.append(key)
    return record, found


def _decoded(lines: list[bytes], key: RecordKey, path: Path) -> list[Line]:
    if not lines:
        return []
    try:
        theirs = msgspec.json.decode(lines[0], type=RecordKey)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise DataError(
            f"{path}: expected a record of measurements, got something else; choose an empty folder"
        ) from None
    if theirs != key:
        names = [name for name in key.__struct_fields__ if getattr(theirs, name) != getattr(key, name)]
        raise DataError(
            f"{path}: expected measurements of this model and these samples, got others ({', '.join(names)} differ);"
            " choose another --work"
        )
    found = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            found.append(_DECODER.decode(line))
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise DataError(
                f"{path}:{number}: expected a measurement, got {line[:40]!r}; delete the line"
            ) from None
    return found
