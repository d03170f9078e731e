"""Engines of a bundle on disk: ``engines/<target>/engines.json`` and the files that it lists.

An engine belongs to one bundle and runs only with the TensorRT that built it, on the GPUs and the platform that it was
built for. ``open_engines`` compares all of this before anything is loaded.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

import msgspec

from trio_edge.runtime.bundle.errors import BackendError
from trio_edge.runtime.bundle.files import atomic_folder, check_place
from trio_edge.runtime.bundle.limits import MAX_JSON_BYTES, Name, typed
from trio_edge.runtime.bundle.manifest import MANIFEST_NAME, Profile
from trio_edge.runtime.bundle.reader import Bundle, file_problem, read_regular, sha256_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from trio_edge.runtime.bundle.manifest import GraphSpec
    from trio_edge.runtime.devices.machine import Host
    from trio_edge.runtime.engines.package import EngineBackend

ENGINES_SCHEMA_VERSION = 1
ENGINES_FOLDER = "engines"
ENGINES_NAME = "engines.json"
TIMING_CACHE_NAME = "timing.cache"


class _Spec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the values in ``engines.json``: immutable, keyword-only, unknown keys rejected."""


class EngineEntry(_Spec, frozen=True):
    """One graph's engine."""

    graph: Name
    file: Name
    """Relative to the folder of ``engines.json``."""
    profiles: tuple[Profile, ...]
    """Profiles in the order of the engine's own profiles."""
    num_bytes: int
    sha256: str
    build_seconds: float
    peak_memory_bytes: int | None
    """Peak resident memory of the build process, including mapped weight files."""


class EngineSet(_Spec, frozen=True):
    """All engines of one target, with their builder and the machines that they are for."""

    schema_version: int
    backend: Literal["tensorrt", "tensorrt-rtx"]
    tensorrt_version: Name
    compute_capabilities: tuple[int, ...]
    """Ascending; 87 is 8.7."""
    platform: Name
    """Machine and system, such as "aarch64-linux"."""
    gpu: Name | None
    """The GPU of the machine that built them, if any."""
    driver: Name | None
    manifest_sha256: str
    """SHA-256 of the bundle's ``trio.json``."""
    detailed_layers: bool
    """Whether the engines hold names and shapes of their layers, for profiling."""
    split_lm_head: int
    """Number of blocks of the lm_head; 1 if it is whole."""
    engines: tuple[EngineEntry, ...]

    def __post_init__(self) -> None:
        for entry in self.engines:
            pure = PurePosixPath(entry.file)
            is_odd = pure.name in ("..", ENGINES_NAME) or "\\" in entry.file or ":" in entry.file
            if is_odd or len(pure.parts) != 1:
                raise ValueError(f"expected a file next to {ENGINES_NAME}, got {entry.file!r}")

    def entry(self, graph: str) -> EngineEntry | None:
        """Return the engine of ``graph``, or None if it was not built."""
        return next((entry for entry in self.engines if entry.graph == graph), None)

    def parts_of(self, spec: GraphSpec) -> tuple[GraphSpec, ...]:
        """Return the graphs whose engines run ``spec``: itself, or its pieces if each was built separately."""
        return (spec,) if self.entry(spec.name) is not None else spec.split()

    @property
    def num_bytes(self) -> int:
        """Size of all engines."""
        return sum(entry.num_bytes for entry in self.engines)


@dataclass(frozen=True, slots=True, kw_only=True)
class Engines:
    """Engines that fit this bundle, this TensorRT and this machine."""

    folder: Path
    engine_set: EngineSet
    notes: tuple[str, ...]
    """Harmless differences: the driver."""

    def path(self, graph: str) -> Path:
        """Return the engine file of ``graph``."""
        entry = self.engine_set.entry(graph)
        assert entry is not None  # open_engines has checked that all are there
        return self.folder / entry.file


def target_name(backend: EngineBackend, *, version: str, compute_capabilities: tuple[int, ...]) -> str:
    """Return the folder name of a target, such as "tensorrt_rtx-1.7-sm86-sm89"."""
    release = ".".join(version.split(".")[:2])
    return "-".join([backend.replace("-", "_"), release, *(f"sm{number}" for number in compute_capabilities)])


def engine_sets(bundle_folder: Path) -> dict[str, EngineSet]:
    """Return the readable engine sets of a bundle by target name, in order of names."""
    found = {}
    for folder in _target_folders(bundle_folder):
        with suppress(BackendError):
            found[folder.name] = read_engine_set(folder)
    return found


def _target_folders(bundle_folder: Path) -> list[Path]:
    """Return the folders of engines by name, except those that are still being written."""
    root = bundle_folder / ENGINES_FOLDER
    files = [] if root.is_symlink() else sorted(root.glob(f"*/{ENGINES_NAME}"))
    return [file.parent for file in files if not file.parent.name.startswith(".")]


def read_engine_set(folder: Path) -> EngineSet:
    """Return the content of ``folder``'s ``engines.json``.

    Raises:
        BackendError: If it is missing, no JSON, of another schema version, or has unknown keys or paths outside of ``folder``.
    """
    file = folder / ENGINES_NAME
    try:
        head = msgspec.json.decode(read_regular(file, max_bytes=MAX_JSON_BYTES))
        version = head.get("schema_version") if isinstance(head, dict) else None
        if version != ENGINES_SCHEMA_VERSION:
            raise BackendError(
                f"{file}: expected schema_version {ENGINES_SCHEMA_VERSION}, got {version!r}; {_again(folder)}"
            )
        return typed(head, EngineSet)
    except OSError as error:
        raise BackendError(f"{file}: cannot be read ({error.strerror}); {_again(folder)}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BackendError(
            f"{file}: expected a description of engines, got: {error}; {_again(folder)}"
        ) from None


def write_engine_set(folder: Path, engine_set: EngineSet) -> None:
    """Write ``engines.json`` into ``folder``."""
    text = msgspec.json.format(msgspec.json.encode(engine_set), indent=1)
    (folder / ENGINES_NAME).write_bytes(text + b"\n")


def open_engines(bundle: Bundle, *, backend: EngineBackend, version: str, host: Host) -> Engines:
    """Return the engines of ``bundle`` that run on ``host``, after checking everything that they depend on.

    ``version`` is that of the installed ``backend``.

    Raises:
        BackendError: If there are no engines, or none fit; the message is about the target with the fewest differences.
    """
    folders = _target_folders(bundle.folder)
    if not folders:
        root = bundle.folder / ENGINES_FOLDER
        raise BackendError(f"{root}: expected engines, got none; run trio-build {bundle.folder}")
    unfit: list[tuple[int, str]] = []
    for folder in folders:
        try:
            engine_set = read_engine_set(folder)
        except BackendError as error:
            unfit.append((0, str(error)))
            continue
        problems = _differences(engine_set, bundle=bundle, backend=backend, version=version, host=host)
        if not problems:
            check_files(folder, engine_set, bundle=bundle)
            return Engines(folder=folder, engine_set=engine_set, notes=_notes(engine_set, host))
        unfit.append((-len(problems), f"{folder}: {problems[0]}"))
    raise BackendError(max(unfit, key=lambda pair: pair[0])[1])


def _differences(
    engines: EngineSet, *, bundle: Bundle, backend: EngineBackend, version: str, host: Host
) -> list[str]:
    """Return one message for each reason why ``engines`` do not run here."""
    build = f"run trio-build {bundle.folder} --backend {backend}"
    wanted = ", ".join(f"{number / 10:.1f}" for number in engines.compute_capabilities)
    problems = []
    if engines.backend != backend:
        problems.append(f"expected engines of {backend}, got {engines.backend}; {build}")
    elif engines.tensorrt_version != version:
        here = f"{backend} {version}, which is installed"
        problems.append(f"expected engines of {here}, got {engines.tensorrt_version}; {build} --force")
    if engines.platform != host.platform:
        here = f"{build} on this machine"
        problems.append(f"expected engines for {host.platform}, got {engines.platform}; {here}")
    if (gpu := host.gpu) is None:
        text = "expected an NVIDIA GPU and its driver on this machine, got none; use --backend onnxruntime"
        problems.append(text)
    elif gpu.compute_capability not in engines.compute_capabilities:
        here = f"compute capability {gpu.compute_capability / 10:.1f} ({gpu.name})"
        problems.append(f"expected engines for {here}, got {wanted}; {build}")
    if engines.manifest_sha256 != sha256_of(bundle.folder / MANIFEST_NAME):
        problems.append(f"expected engines of this bundle, got those of another export; {build} --force")
    return problems


def check_files(folder: Path, engine_set: EngineSet, *, bundle: Bundle) -> None:
    """Raise BackendError unless ``folder`` has an unchanged engine with the right profiles for every graph of ``bundle``.

    ``engine_set`` is the content of ``engines.json``. Files above ``LARGEST_HASHED_BYTES`` are not hashed.
    """
    root = folder.resolve()
    for spec in (part for graph in bundle.manifest.graphs for part in engine_set.parts_of(graph)):
        entry = engine_set.entry(spec.name)
        if entry is None:
            graph = spec.name.partition(".")[0]  # a piece is called graph.piece
            raise BackendError(
                f"{folder}: expected an engine of {graph}, got none;"
                f" run trio-build {bundle.folder} --backend {engine_set.backend} --graphs {graph}"
            )
        file = folder / entry.file
        problem = file_problem(file, entry, root=root, hash_all=False)
        if entry.profiles != spec.profiles:
            problem = f"{file}: expected the bundle's profiles, got others"
        if problem is not None:
            raise BackendError(f"{problem}; {_again(folder)}")


def _notes(engine_set: EngineSet, host: Host) -> tuple[str, ...]:
    driver = None if host.gpu is None else host.gpu.driver
    if engine_set.driver is None or engine_set.driver == driver:
        return ()
    return (f"the engines were built with driver {engine_set.driver}, this machine has {driver}",)


def _again(folder: Path) -> str:
    return f"run trio-build {folder.parent.parent} --force"


_WAY_OUT = "make the bundle's folder writable"


def check_engines_place(target: Path) -> None:
    """Raise BackendError if ``atomic_engines`` could not write ``target`` now; changes nothing."""
    # A link may lead out of the bundle, so it is neither read nor written.
    if target.parent.is_symlink() or (target.parent.exists() and not target.parent.is_dir()):
        raise BackendError(f"{target.parent}: expected a folder, got a link or a file; move it away")
    check_place(target, num_bytes=0, error=BackendError, way_out=_WAY_OUT)


@contextmanager
def atomic_engines(
    target: Path, *, num_bytes: int, before_rename: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """Yield a new folder for the engines of ``target``, see ``atomic_folder``; leaves no empty ``engines`` folder.

    Raises:
        BackendError: If the folder cannot be written, or the disk is or becomes full.
    """
    check_engines_place(target)
    # A failed build must leave the bundle as it was, so that copies and hashes stay equal.
    made_parent = not target.parent.exists()
    try:
        with atomic_folder(
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
            with suppress(OSError):  # it holds engines, or does not exist
                target.parent.rmdir()
