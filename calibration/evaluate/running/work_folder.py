"""A folder of outcomes that grows answer by answer, so that an interrupted evaluation goes on where it stopped.

One file for each run: its header says what was run (``RunKey``), each of its results is an outcome. The folder belongs
to one data set and its bundles.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import msgspec

from trio_edge.calibration.json_lines import LOCK_NAME, SUFFIX, read_header
from trio_edge.runtime.bundle.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

SCHEMA_VERSION = 1


class RunKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that decides an answer: outcomes of equal keys are interchangeable."""

    schema_version: int
    data_sha256: str
    bundle_sha256: str
    """The manifest's, which has the digests of all other files."""
    selection: str
    reference_sha256: str | None
    """Bundle that ``first_token_kl`` compares with."""
    answer_tokens: int
    backend: str

    @property
    def file_name(self) -> str:
        """Name of the run's file."""
        digest = hashlib.sha256(msgspec.json.encode(self)).hexdigest()
        return f"{self.bundle_sha256[:12]}-{self.selection}-{digest[:12]}{SUFFIX}"


def check_folder(folder: Path, keys: Collection[RunKey]) -> None:
    """Raise DataError unless the folder is empty, or holds outcomes of these data and of at least one of these bundles."""
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a folder of outcomes, got none; check the name")
    paths = sorted(path for path in folder.iterdir() if path.name != LOCK_NAME)
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


def _key_of(path: Path) -> RunKey | None:
    """Return the header of a run's file; None if a kill cut it.

    Raises:
        DataError: If it is another file, or one of another schema.
    """
    what = "a file of outcomes"
    if path.suffix != SUFFIX:
        raise DataError(f"{path}: expected {what}, got something else; choose an empty folder")
    key = read_header(path, RunKey, what=what)
    if key is not None and key.schema_version != SCHEMA_VERSION:
        raise DataError(
            f"{path}: outcomes have schema_version {key.schema_version}, this release reads {SCHEMA_VERSION};"
            " choose another folder"
        )
    return key
