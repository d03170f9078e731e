"""Finds TensorRT: ``tensorrt`` (JetPack's, or a pip package) or ``tensorrt-rtx``. No other file imports them.

Neither is a dependency: they are imported when an engine is built or run. The abilities of a release are read from its
module, not from its version.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trio_edge.runtime.bundle.errors import BackendError
from trio_edge.runtime.devices.machine import is_jetson

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec

    from trio_edge.runtime.devices.machine import Host

EngineBackend = Literal["tensorrt", "tensorrt-rtx"]
ENGINE_BACKENDS: tuple[EngineBackend, ...] = ("tensorrt", "tensorrt-rtx")
ENGINES_BACKENDS_HELP = (
    "Builder: tensorrt (JetPack), tensorrt-rtx, auto (the installed one that can build for the target), or onnxruntime"
    " (prepares graphs for this CPU). [default: auto]"
)
_MODULES: dict[EngineBackend, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRT:
    """An imported TensorRT."""

    backend: EngineBackend
    module: Any
    version: str
    """The package's version, such as "10.3.0.30"."""

    @property
    def ahead_of_time(self) -> tuple[int, ...]:
        """Compute capabilities that it can build for without such a GPU, ascending."""
        names = dir(getattr(self.module, "ComputeCapability", None))
        return tuple(sorted(int(name[2:]) for name in names if name.startswith("SM") and name[2:].isdigit()))

    @property
    def streams_engines(self) -> bool:
        """Whether an engine is written piece by piece, so that it is never in memory as a whole."""
        return getattr(self.module.Builder, "build_serialized_network_to_stream", None) is not None

    @property
    def has_timing_cache(self) -> bool:
        """Whether a build times tactics on the GPU; tensorrt-rtx chooses its kernels later, on the device."""
        return self.backend == "tensorrt"

    @property
    def compiles_on_device(self) -> bool:
        """Whether kernels are compiled on the device, by default in the background."""
        return getattr(self.module, "DynamicShapesKernelSpecializationStrategy", None) is not None


def system_folders() -> tuple[Path, ...]:
    """Return the folders of the system's Python packages, where JetPack installs TensorRT."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return (
        Path(f"/usr/lib/{version}/dist-packages"),
        Path("/usr/lib/python3/dist-packages"),
        Path(f"/usr/local/lib/{version}/dist-packages"),
    )


def choose_backend(name: str, *, host: Host, ahead_of_time: bool) -> EngineBackend:
    """Return the backend called ``name``; for "auto", the installed one that can do this build.

    ``ahead_of_time`` says whether the user names GPUs to build for.

    Raises:
        BackendError: If there is no such backend, or none is installed.
    """
    if name not in ("auto", *ENGINE_BACKENDS):
        raise BackendError(
            f"--backend: expected one of auto, {', '.join(ENGINE_BACKENDS)}, got {name!r}; choose one of them"
        )
    for backend in ENGINE_BACKENDS:
        if name == backend:
            return backend
    # tensorrt times its tactics on this machine's GPU; tensorrt-rtx also builds for other GPUs.
    if host.gpu is not None and not ahead_of_time and _spec("tensorrt", system_folders()) is not None:
        return "tensorrt"
    if _spec("tensorrt_rtx", ()) is not None:
        return "tensorrt-rtx"
    if _spec("tensorrt", system_folders()) is not None:
        return "tensorrt"
    raise _missing("tensorrt" if is_jetson() else "tensorrt-rtx")


def installed_backend() -> EngineBackend | None:
    """Return the first backend whose package is installed; None without any."""
    return next((name for name in ENGINE_BACKENDS if is_installed(name)), None)


def is_installed(backend: EngineBackend) -> bool:
    """Return whether a backend's package is installed; importing it may still fail."""
    return _spec(_MODULES[backend], system_folders()) is not None


def load_tensorrt(backend: EngineBackend, *, folders: Sequence[Path] | None = None) -> TensorRT:
    """Import a backend's package from the environment or else from ``folders``, by default ``system_folders()``.

    A virtual environment on a Jetson does not see JetPack's packages.

    Raises:
        BackendError: If it is not installed or cannot be imported.
    """
    name = _MODULES[backend]
    spec = _spec(name, system_folders() if folders is None else folders)
    if spec is None:
        raise _missing(backend)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the bindings warn about their own deprecated names
            module = _import(name, spec)
        version = module.__version__
    except (ImportError, OSError, AttributeError) as error:
        line = " ".join(str(error).split())
        raise BackendError(
            f"{backend}: expected a package that python {sys.version_info.major}.{sys.version_info.minor} imports,"
            f" got: {line}; install the release for this python"
        ) from None
    return TensorRT(backend=backend, module=module, version=version)


def _spec(name: str, folders: Sequence[Path]) -> ModuleSpec | None:
    if (spec := find_spec(name)) is not None:
        return spec
    return PathFinder.find_spec(name, [str(folder) for folder in folders])


def _import(name: str, spec: ModuleSpec) -> Any:
    if name in sys.modules or find_spec(name) is not None:
        return importlib.import_module(name)
    if spec.loader is None:
        raise ImportError(f"no loader for {name}")
    module = module_from_spec(spec)
    sys.modules[name] = module  # before it runs, because it imports itself
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _missing(backend: EngineBackend) -> BackendError:
    remedy = {
        "tensorrt": "on a Jetson it comes with JetPack (sudo apt install python3-libnvinfer), elsewhere pip install tensorrt",
        "tensorrt-rtx": 'run pip install "trio-edge[rtx]"',
    }[backend]
    return BackendError(f"backend: expected {backend} to be installed, it is not; {remedy}")
