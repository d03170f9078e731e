"""Where a target's engines are written: complete or not at all, and no empty folder of targets stays."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from trio_edge.runtime.errors import BackendError
from trio_edge.runtime.folder_beside import check_place, folder_beside

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_WAY_OUT = "make the bundle's folder writable"


def check_engines_place(target: Path) -> None:
    """Raise BackendError if ``engines_beside`` could not write ``target`` now; changes nothing."""
    check_place(target, num_bytes=0, error=BackendError, way_out=_WAY_OUT)


@contextmanager
def engines_beside(
    target: Path, *, num_bytes: int, before_rename: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """Yield a new folder that becomes ``target`` when the block ends well and vanishes when it does not.

    Args:
        target: The folder of one target's engines; an old one is replaced in one step.
        num_bytes: About what is going to be written, compared with the free space first.
        before_rename: As ``folder_beside``'s.

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
            way_out=_WAY_OUT,
            before_rename=before_rename,
        ) as folder:
            yield folder
    finally:
        if made_parent:
            with suppress(OSError):  # it holds engines now, or could not be made
                target.parent.rmdir()
