"""A file of measurements that grows line by line, so that an interrupted calibration goes on where it stopped.

Its header (``RecordKey``) says what was measured; a file about something else is refused.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec

from trio_edge.calibration.json_lines import ResultFile, locked_folder, opened_results, read_header
from trio_edge.calibration.search.measure.measuring import MeasuredSchedule
from trio_edge.runtime.bundle.errors import DataError
from trio_edge.runtime.bundle.schedule import Schedule

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RECORD_NAME = "measurements.jsonl"


class RecordKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that decides a measurement: those of equal keys are interchangeable."""

    model: str
    weights: str
    """Digest of names, sizes and times of the weight files."""
    samples_sha256: str
    answer_tokens: int
    dtype: str
    max_visual: int
    """Largest N of all samples: the probes' form follows from it."""


class MeasuredLine(msgspec.Struct, frozen=True, kw_only=True):
    """One schedule on one sample."""

    index: int
    schedule: Schedule
    result: MeasuredSchedule


@contextmanager
def opened_record(folder: Path, key: RecordKey) -> Iterator[tuple[ResultFile, list[MeasuredLine]]]:
    """Yield the folder's record, to append to, and what it holds already.

    Raises:
        DataError: If it cannot be read or written, is in use, is broken, or is about something else.
    """
    path = folder / RECORD_NAME
    with locked_folder(folder):
        _check(path, key)
        with opened_results(path, key, MeasuredLine, what="a measurement") as opened:
            yield opened


def _check(path: Path, key: RecordKey) -> None:
    """Raise DataError if a record is there already and its header is not ``key``."""
    try:
        theirs = read_header(path, RecordKey)
    except (OSError, ValueError):  # msgspec's errors are ValueErrors
        raise DataError(
            f"{path}: expected a record of measurements, got something else; choose an empty folder"
        ) from None
    if theirs is not None and theirs != key:
        names = [name for name in key.__struct_fields__ if getattr(theirs, name) != getattr(key, name)]
        raise DataError(
            f"{path}: expected measurements of this model and these samples, got others ({', '.join(names)} differ);"
            " choose another --work"
        )
