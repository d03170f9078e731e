"""Keeps the kernels that tensorrt-rtx compiles on a GPU beside the engines, so that the next process need not compile them.

One runtime cache serves all engines of a bundle. tensorrt-rtx itself refuses what another GPU, driver or release has compiled.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, final

from trio_edge.runtime.errors import DataError
from trio_edge.runtime.output_files import write_output

if TYPE_CHECKING:
    from pathlib import Path

KERNELS_NAME = "kernels.cache"


@final
class CompiledKernels:
    """A runtime cache and its file; whoever has contexts that compile into it keeps it longer than these."""

    def __init__(self, file: Path) -> None:
        """Take note of where it is kept; a file that is not there or cannot be read is an empty cache."""
        self._file = file
        self._stored: bytes | None = None
        self._cache: Any = None
        self._is_final = file.is_symlink()  # it may lead out of the bundle: neither read nor written
        if not self._is_final:
            with suppress(OSError):
                self._stored = file.read_bytes()

    def attach(self, settings: Any) -> None:
        """Let the contexts that are made with ``settings``, an ``IRuntimeConfig``, compile into the cache."""
        if self._cache is None:
            self._cache = settings.create_runtime_cache()
            if self._stored is not None and not self._cache.deserialize(self._stored):
                self._stored = None
        settings.set_runtime_cache(self._cache)

    def store(self) -> None:
        """Write what has been compiled, once, if it is new; where the bundle cannot be written, it is compiled again next time."""
        if self._is_final or self._cache is None:
            return
        self._is_final = True
        content = self._cache.serialize()
        if content is not None and bytes(content) != self._stored:
            with suppress(DataError):
                write_output("kernels", self._file, bytes(content))
