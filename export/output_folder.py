"""Where a bundle is written: what may be replaced, how much room it takes, and what a user is told."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from trio_edge.runtime.errors import CheckpointError
from trio_edge.runtime.folder_beside import folder_beside as locked_folder_beside
from trio_edge.runtime.manifest import MANIFEST_NAME

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

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
    """Yield a new folder beside ``out`` that becomes the bundle ``out`` when the block ends well; see the runtime's.

    Args:
        out: The target.
        num_bytes: Of the weights.
        force: Whether an existing bundle at ``out`` is replaced.

    Raises:
        CheckpointError: If the folder cannot be written, the disk is full, or ``out`` may not be replaced.
    """
    with locked_folder_beside(
        out,
        num_bytes=num_bytes + _SPARE_BYTES,
        error=CheckpointError,
        what="bundle",
        way_out="choose another --out",
        elsewhere=" or choose another --out",
        before_rename=lambda: check_output(out, force=force),  # again: the export took a while
    ) as folder:
        yield folder
