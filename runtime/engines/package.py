"""Finds TensorRT, ``tensorrt`` (JetPack's, or a pip package) or ``tensorrt-rtx``: its module, its log and its profiler.

No other file imports them. Neither is a dependency: they are imported when an engine is built or run. The abilities of a
release are read from its module, not from its version.
"""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, final

from trio_edge.runtime.bundle.errors import BackendError, install_command
from trio_edge.runtime.devices.machine import is_jetson

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
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
    # tensorrt times its tactics on this machine's GPU; tensorrt-rtx also builds for other GPUs.
    builds_here = host.gpu is not None and not ahead_of_time
    order = ENGINE_BACKENDS if builds_here else ENGINE_BACKENDS[::-1]
    for backend in order:
        if name == backend or (name == "auto" and is_installed(backend)):
            return backend
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
    name, path = _MODULES[backend], sys.path.copy()
    folders = system_folders() if folders is None else folders
    if _spec(name, folders) is None:
        raise _missing(backend)
    sys.path += map(str, folders)  # the environment's packages come first
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the bindings warn about their own deprecated names
            module = importlib.import_module(name)
        version = module.__version__
    except (ImportError, OSError, AttributeError) as error:
        line = " ".join(str(error).split())
        raise BackendError(
            f"{backend}: expected a package that python {sys.version_info.major}.{sys.version_info.minor} imports,"
            f" got: {line}; install the release for this python"
        ) from None
    finally:
        sys.path[:] = path
    return TensorRT(backend=backend, module=module, version=version)


def _spec(name: str, folders: Sequence[Path]) -> ModuleSpec | None:
    return find_spec(name) or PathFinder.find_spec(name, [str(folder) for folder in folders])


def _missing(backend: EngineBackend) -> BackendError:
    remedy = f"run {install_command('rtx')}"
    if backend == "tensorrt":
        jetson = "on a Jetson it comes with JetPack (sudo apt install python3-libnvinfer)"
        remedy = f"{jetson}, elsewhere pip install tensorrt"
    return BackendError(f"backend: expected {backend} to be installed, it is not; {remedy}")


def make_logger(module: Any, on_error: Callable[[str], None]) -> Any:
    """Return a logger for ``module``, ``tensorrt`` or ``tensorrt_rtx``, that passes every error to ``on_error``."""

    class Logger(module.ILogger):  # type: ignore[misc]  # the base class is known only at run time
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= module.ILogger.ERROR:
                on_error(message)

    return Logger()


@final
class EngineErrors:
    """TensorRT's errors while engines are loaded and run."""

    def __init__(self, module: Any) -> None:
        self._texts: list[str] = []
        self.logger = make_logger(module, lambda text: self._texts.append(" ".join(text.split())[:300]))
        """For ``Runtime``."""

    def reason(self) -> str:
        """Return the first error since the last call in brackets, because later ones follow from it; "" if there was none."""
        first = f" ({self._texts[0]})" if self._texts else ""
        self._texts.clear()
        return first


@cache
def engine_errors(module: Any) -> EngineErrors:
    """Return the one error log of ``tensorrt`` or ``tensorrt_rtx`` in this process.

    TensorRT writes to the first logger that it gets as long as any of its objects lives, and ignores all later ones.
    """
    return EngineErrors(module)


@final
class EngineLayerTimes:
    """The layers of one engine in all runs: times from TensorRT's profiler, names and kinds from its inspector.

    While times are recorded, every run waits for the device.
    """

    def __init__(self, module: Any, engine: Any, file: Path) -> None:
        """Make a profiler for ``engine`` of ``module``, ``tensorrt`` or ``tensorrt_rtx``; ``write`` writes to ``file``."""
        self._file = file
        self._runs: list[list[tuple[str, float]]] = []
        self._run: list[tuple[str, float]] = []
        run = self._run

        class Profiler(module.IProfiler):  # type: ignore[misc]
            def __init__(self) -> None:
                module.IProfiler.__init__(self)  # TensorRT's bindings require this instead of super()

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                run.append((layer_name, ms))

        self._profiler = Profiler()
        inspector = engine.create_engine_inspector()
        self._layers = json.loads(inspector.get_engine_information(module.LayerInformationFormat.JSON))

    def attach(self, context: Any) -> None:
        """Let ``context`` report the layers of each run."""
        context.profiler = self._profiler

    def end_run(self) -> None:
        """Take the reported times as one run."""
        self._runs.append(self._run.copy())
        self._run.clear()

    def write(self) -> None:
        """Write all runs and the inspector's list of layers."""
        self._file.write_text(json.dumps({"runs": self._runs, "layers": self._layers.get("Layers", [])}))
