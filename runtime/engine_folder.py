"""Where a target's engines are written: complete or not at all, and no empty folder of targets stays."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from trio_edge.runtime.errors import BackendError
from trio_edge.runtime.folder_beside import folder_beside

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


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
        with folder_beside(
            target,
            num_bytes=num_bytes,
            error=BackendError,
            what="set of engines",
            way_out="make the bundle's folder writable",
        ) as folder:
            yield folder
    finally:
        if made_parent:
            with suppress(OSError):  # it holds engines now, or could not be made
                target.parent.rmdir()
