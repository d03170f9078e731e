"""Opens a bundle: reads its manifest and checks that every file is there and unchanged."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, final

import msgspec
import numpy as np

from trio_edge.runtime.bundle.checks import graph_files, manifest_from_json
from trio_edge.runtime.bundle.errors import BundleError
from trio_edge.runtime.bundle.limits import MAX_JSON_BYTES
from trio_edge.runtime.bundle.manifest import MANIFEST_NAME, Manifest, StoredTensor
from trio_edge.runtime.bundle.onnx_files import MOST_BYTES, check_weight_places

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

_HASH_CHUNK_BYTES = 4 << 20
# Hashing the weights of a 7B model would take longer than loading them.
LARGEST_HASHED_BYTES = 64 << 20
"""Larger files are hashed only on request; when a bundle is opened, their sizes are compared."""
MAX_TEXT_BYTES = 1 << 20
"""Size of the largest chat template; released templates have less than 20 kB."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened bundle: where it is and what its manifest says."""

    folder: Path
    manifest: Manifest

    def path(self, name: str) -> Path:
        """Return the path of a file that the manifest lists."""
        return self.folder / name

    def read_text(self, name: str) -> str:
        """Return a UTF-8 text file of the bundle."""
        path = self.path(name)
        try:
            return _content(path, max_bytes=MAX_TEXT_BYTES).decode("utf-8")
        except UnicodeDecodeError as error:
            raise BundleError(f"{path}: expected UTF-8 text ({error}); export the bundle again") from None

    def map_tensor(self, tensor: StoredTensor) -> NDArray[Any]:
        """Return a stored tensor as a read-only memory map; its file's header must list it."""
        path = self.path(tensor.file)
        try:
            _check_listed(path, tensor)
            return np.memmap(path, dtype=tensor.dtype, mode="r", offset=tensor.offset, shape=tensor.shape)
        except (OSError, ValueError) as error:  # the second if the file has become shorter
            reason = getattr(error, "strerror", error)
            raise BundleError(f"{path}: cannot be read ({reason}); export the bundle again") from None


@final
class TokenTable:
    """Rows by token id, read from the mapped file on access: the embeddings, or the head's rows."""

    def __init__(self, bundle: Bundle, rows: StoredTensor, scales: StoredTensor | None) -> None:
        """Map ``rows`` [V, D] and the ``scales`` [V] of INT8 rows; all are gathered on the host."""
        self._dtype = bundle.manifest.dtype
        self._rows = bundle.map_tensor(rows)
        self._scales = None if scales is None else bundle.map_tensor(scales)

    def __getitem__(self, token_ids: NDArray[Any] | list[int] | int) -> NDArray[Any]:
        """Return the rows of ``token_ids``, [..., D], in the graphs' dtype.

        Raises:
            BundleError: If there is no such row, because the tokenizer belongs to another model.
        """
        ids = np.asarray(token_ids)
        if ids.size and not 0 <= ids.min() <= ids.max() < len(self._rows):
            raise BundleError(
                f"tokenizer: expected token ids below {len(self._rows)} (rows of the table), got {ids.max()};"
                " export the bundle again"
            )
        rows: NDArray[Any] = self._rows[token_ids]
        if self._scales is None:
            return rows
        scaled: NDArray[Any] = rows.astype(self._dtype) * self._scales[token_ids][..., None]
        return scaled


def open_bundle(folder: str | Path, *, hash_all: bool = False) -> Bundle:
    """Return the bundle in ``folder`` after checking its files.

    ``hash_all`` also hashes files above ``LARGEST_HASHED_BYTES``; otherwise only their sizes are compared.

    Raises:
        BundleError: If the folder is no finished bundle, or a file is missing, changed or a link to elsewhere.
        ManifestError: If the manifest is broken or of another schema version.
    """
    if not isinstance(folder, (str, os.PathLike)):
        kind = type(folder).__name__
        raise BundleError(f"bundle: expected the path of a folder, got {kind}; name one of trio-export")
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    if (problem := _place_problem(path, root=folder)) is not None:
        raise _no_bundle(folder, problem)
    manifest = manifest_from_json(_content(path, max_bytes=MAX_JSON_BYTES), where=str(path))
    for entry in manifest.files:
        problem = file_problem(folder / entry.path, entry, root=folder, hash_all=hash_all)
        if problem is not None:
            raise BundleError(f"{problem}; export the bundle again")
    sizes = {entry.path: entry.num_bytes for entry in manifest.files}
    for graph in sorted(graph_files(manifest)):
        file = folder / graph
        check_weight_places(_content(file, max_bytes=MOST_BYTES), sizes, where=file)
    return Bundle(folder=folder, manifest=manifest)


def _no_bundle(folder: Path, problem: str) -> BundleError:
    """Return the error for a folder whose manifest has a ``problem``."""
    path = folder / MANIFEST_NAME
    try:
        if not folder.is_dir():
            return BundleError(f"{folder}: expected a bundle folder, got none; make one with trio-export")
        path.lstat()
    except FileNotFoundError:
        advice = "this is no bundle, name a folder that trio-export wrote"
        if any(folder.glob("*.onnx")):
            advice = "the export or the copy did not finish, run it again"
        return BundleError(f"{folder}: expected {MANIFEST_NAME}, got none; {advice}")
    except OSError as error:  # no permission, or a name that is too long
        return BundleError(f"{path}: cannot be read ({error.strerror}); export the bundle again")
    return BundleError(f"{problem}; export the bundle again")


def _content(path: Path, *, max_bytes: int) -> bytes:
    try:
        return read_regular(path, max_bytes=max_bytes)
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror}); export the bundle again") from None


def read_regular(path: Path, *, max_bytes: int) -> bytes:
    """Return the content of a regular file. Pipes and devices, which may be endless, are refused.

    Raises:
        OSError: If the file cannot be read, is not regular, or is larger than ``max_bytes``.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with open(descriptor, "rb") as file:  # noqa: PTH123  # a descriptor has no Path
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        if status.st_size > max_bytes:
            raise OSError(errno.EFBIG, f"larger than {max_bytes >> 20} MiB")
        return file.read(max_bytes)


def _check_listed(path: Path, tensor: StoredTensor) -> None:
    """Raise ValueError unless the header of a safetensors file has a tensor of this size and shape at this place."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = msgspec.json.decode(file.read(min(size, MAX_JSON_BYTES)), type=dict[str, dict[str, Any]])
    start = tensor.offset - 8 - size
    wanted = {"data_offsets": [start, start + tensor.num_bytes], "shape": [*tensor.shape]}
    if not any(wanted.items() <= entry.items() for entry in header.values()):
        raise ValueError(
            f"expected {tensor.dtype} {wanted['shape']} at byte {tensor.offset}, got another tensor"
        )


class WrittenFile(Protocol):
    """Size and hash of a file, from a bundle's JSON."""

    @property
    def num_bytes(self) -> int:
        """Size of the file."""

    @property
    def sha256(self) -> str:
        """SHA-256 in hexadecimal."""


def file_problem(file: Path, entry: WrittenFile, *, root: Path, hash_all: bool) -> str | None:
    """Return how ``file`` differs from its description ``entry``; None if it does not. ``hash_all`` as for ``open_bundle``.

    ``root`` is the folder that the file must lie in: links that leave it are not followed.
    """
    if (problem := _place_problem(file, root=root)) is not None:
        return problem
    size = file.stat().st_size
    if size != entry.num_bytes:
        return f"{file}: expected {entry.num_bytes} bytes, got {size}"
    if (hash_all or size <= LARGEST_HASHED_BYTES) and (digest := sha256_of(file)) != entry.sha256:
        return f"{file}: expected SHA-256 {entry.sha256[:12]}…, got {digest[:12]}…; the file was changed"
    return None


def _place_problem(file: Path, *, root: Path) -> str | None:
    """Return why ``file`` may not be read: it is missing, lies outside of ``root``, or is a pipe or a device."""
    try:
        place = Path(os.path.realpath(file, strict=True))
        is_regular = stat.S_ISREG(place.stat().st_mode)
    except FileNotFoundError:
        return f"{file}: expected this file, got none"
    except (OSError, RuntimeError, ValueError) as error:  # a link to itself; Python 3.10 raises RuntimeError
        return f"{file}: cannot be read ({error.strerror if isinstance(error, OSError) else error})"
    if not place.is_relative_to(os.path.realpath(root)):
        return f"{file}: expected a file inside the bundle, got a link to elsewhere, which is refused"
    return None if is_regular else f"{file}: expected a regular file, got a folder, pipe or device"


def sha256_of(path: Path, *, on_bytes: Callable[[int], None] = lambda _count: None) -> str:
    """Return the SHA-256 of a file in hexadecimal; ``on_bytes`` gets the number of bytes just hashed, for progress.

    Raises:
        BundleError: If it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while chunk := stream.read(_HASH_CHUNK_BYTES):
                digest.update(chunk)
                on_bytes(len(chunk))
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    return digest.hexdigest()
