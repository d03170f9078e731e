"""Runs the TensorRT engines that ``trio-build`` made, with ``tensorrt`` or ``tensorrt-rtx``.

Each engine is loaded once. Its decode profile has its own execution context, which never switches profiles and can
therefore be captured. Each piece of its graph has one context for all its other profiles. All contexts of all engines
share one workspace, because they run one after the other on one stream.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

import numpy as np

from trio_edge.runtime.backends.interface import selected_graphs
from trio_edge.runtime.backends.pieced_engine import PiecedEngine
from trio_edge.runtime.bundle.errors import BackendError, DataError
from trio_edge.runtime.bundle.files import write_output
from trio_edge.runtime.bundle.graph_io import CANDIDATES
from trio_edge.runtime.bundle.manifest import shape_at
from trio_edge.runtime.devices.cuda import CudaDevice, load_cuda
from trio_edge.runtime.devices.interface import LoadedGraphs
from trio_edge.runtime.devices.machine import find_host
from trio_edge.runtime.devices.memory import check_memory
from trio_edge.runtime.engines.files import engine_sets, open_engines
from trio_edge.runtime.engines.package import (
    ENGINE_BACKENDS,
    EngineErrors,
    EngineLayerTimes,
    engine_errors,
    load_tensorrt,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from trio_edge.runtime.bundle.manifest import GraphSpec, Profile
    from trio_edge.runtime.bundle.reader import Bundle
    from trio_edge.runtime.devices.interface import DeviceTensor
    from trio_edge.runtime.engines.package import EngineBackend, TensorRT

_DECODE = "decode"
_KERNELS_NAME = "kernels.cache"


def engines_that_run(bundle: Bundle) -> tuple[EngineBackend | None, str | None]:
    """Return the backend whose engines of ``bundle`` run here, or None and the reason why the existing engines do not."""
    built = {engines.backend for engines in engine_sets(bundle.folder).values()}
    reason = None
    for backend in ENGINE_BACKENDS:
        if backend in built:
            try:
                open_engines(
                    bundle, backend=backend, version=load_tensorrt(backend).version, host=find_host()
                )
            except BackendError as error:
                reason = reason or str(error)
                continue
            return backend, None
    return None, reason


@final
class TensorRTBackend:
    """Loads a bundle's engines."""

    def __init__(
        self, name: EngineBackend, *, cuda_graph: bool = True, layer_times: Path | None = None
    ) -> None:
        """Import the package of the backend; the arguments are those of ``make_backend``.

        Raises:
            BackendError: If it is not installed.
        """
        self._tensorrt = load_tensorrt(name)
        self._cuda_graph = cuda_graph
        self._layer_times = layer_times

    @property
    def name(self) -> str:
        """Name for messages and statistics."""
        return self._tensorrt.backend

    def load(self, bundle: Bundle, names: Sequence[str] | None = None) -> LoadedGraphs:
        """Load engines, which must fit this machine as ``open_engines`` checks."""
        specs = bundle.manifest.graphs if names is None else selected_graphs(bundle, names)
        tensorrt = self._tensorrt
        engines = open_engines(bundle, backend=tensorrt.backend, version=tensorrt.version, host=find_host())
        parts = {spec.name: engines.engine_set.parts_of(spec) for spec in specs}
        sizes = [engines.path(part.name).stat().st_size for one in parts.values() for part in one]
        device = CudaDevice(load_cuda())
        loaded = LoadedGraphs(device=device, engines={}, notes=list(engines.notes))
        try:
            loaded.memory.update(check_memory(device, bundle.manifest, specs, weight_bytes=sum(sizes)))
            # Contexts have no memory of their own. The workspace is allocated once all engines have said how much they need.
            workspace, errors = Workspace(device), engine_errors(tensorrt.module)
            runtime = _new_runtime(tensorrt, errors)
            kernels = CompiledKernels(engines.folder / _KERNELS_NAME) if tensorrt.compiles_on_device else None

            def opened(spec: GraphSpec) -> TensorRTEngine:
                engine = _read_engine(runtime, engines.path(spec.name), device, errors)
                layers = None
                if self._layer_times is not None:
                    times = self._layer_times / f"{spec.name}.json"
                    layers = EngineLayerTimes(tensorrt.module, engine, times)
                # A layer profiler waits after every run, which a CUDA graph cannot do.
                may_capture = self._cuda_graph and layers is None
                return TensorRTEngine(
                    engine, spec, tensorrt, device.stream, workspace, errors, kernels, layers, may_capture
                )

            for spec in specs:
                own = [opened(part) for part in parts[spec.name]]
                loaded.engines[spec.name] = own[0] if own[0].spec == spec else PiecedEngine(spec, own)
            loaded.memory["workspace"] = workspace.allocate()
        except BaseException:
            loaded.close()
            raise
        return loaded


def _new_runtime(tensorrt: TensorRT, errors: EngineErrors) -> Any:
    try:
        return tensorrt.module.Runtime(errors.logger)
    except TypeError:  # raised by the bindings when TensorRT returns no runtime
        raise BackendError(
            f"backend: expected {tensorrt.backend} {tensorrt.version} to start on this GPU, it did"
            f" not{errors.reason()}; install the release for this GPU and its driver"
        ) from None


def _read_engine(runtime: Any, file: Path, device: CudaDevice, errors: EngineErrors) -> Any:
    # The file is mapped, so the host never holds a second copy of the weights.
    engine = runtime.deserialize_cuda_engine(np.memmap(file, dtype=np.uint8, mode="r"))
    if engine is None:
        free = device.free_bytes() or 0
        raise BackendError(
            f"{file}: expected an engine that this GPU loads with {file.stat().st_size / 1e6:.1f} MB of its memory, got"
            f" none{errors.reason()}, {free / 1e6:.1f} MB are free; close other programs, or run trio-build"
            f" {file.parents[2]} --force"
        )
    return engine


@final
class Workspace:
    """Device memory for activations, shared by all engines of a bundle."""

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        self.address = 0
        self.num_bytes = 0

    def reserve(self, num_bytes: int) -> None:
        """Note the need of an engine; call this before ``allocate``."""
        self.num_bytes = max(self.num_bytes, num_bytes)

    def allocate(self) -> int:
        """Allocate the largest reserved size and return it in bytes.

        Raises:
            BackendError: If there is not enough memory.
        """
        self.address = self._device.allocate(self.num_bytes, purpose="TensorRT's workspace")
        return self.num_bytes


@final
@dataclass
class TensorRTEngine:
    """One graph's engine and its execution contexts."""

    _engine: Any
    spec: GraphSpec
    """The graph's entry in the manifest."""
    _tensorrt: TensorRT
    stream: int
    _workspace: Workspace
    errors: EngineErrors
    _kernels: CompiledKernels | None
    layers: EngineLayerTimes | None
    may_capture: bool
    _contexts: dict[str, _Context] = field(default_factory=dict)
    """By "decode" or the name of a piece."""

    def __post_init__(self) -> None:
        self._workspace.reserve(self._engine.device_memory_size_v2)  # of the largest profile

    def prepare(self, profile: Profile, tensors: Mapping[str, DeviceTensor]) -> TensorRTLaunch:
        """Bind a profile to addresses."""
        index = self.spec.profiles.index(profile)
        # A CUDA graph holds its context's state, so decode shares its context with no other profile. Pieces take turns in
        # every prefill, and switching profiles takes time.
        is_own = profile.name.startswith(_DECODE) or profile.name == CANDIDATES
        key = profile.name if is_own else self.spec.part_at(profile).name
        if key not in self._contexts:
            self._contexts[key] = self._new_context()
        return TensorRTLaunch(self._contexts[key], index, tensors)

    def _new_context(self) -> _Context:
        settings = _context_settings(self._engine, self._tensorrt, self._kernels)
        context = self._engine.create_execution_context(settings)
        if context is None:
            raise BackendError(
                f"{self.spec.name}: expected {self._tensorrt.backend} to make an execution context, it did"
                f" not{self.errors.reason()}; close other programs, or use --backend onnxruntime"
            )
        context.set_device_memory(self._workspace.address, self._workspace.num_bytes)
        return _Context(self, context, settings)

    def close(self) -> None:
        """Release contexts and engine, and store the compiled kernels."""
        # TensorRT wants contexts released before their engine, and both before the kernels.
        if self._engine is not None and self._kernels is not None:
            self._kernels.store()
        for context in self._contexts.values():
            context.close()
        self._contexts.clear()
        was_open, self._engine = self._engine is not None, None
        if was_open and self.layers is not None:
            self.layers.write()


@final
class TensorRTLaunch:
    """One profile of an engine bound to addresses."""

    def __init__(self, context: _Context, profile_index: int, tensors: Mapping[str, DeviceTensor]) -> None:
        self._context, self.profile_index, self.tensors = context, profile_index, dict(tensors)

    @property
    def capturable(self) -> bool:
        """Whether the engine can be captured."""
        return self._context.is_capturable()

    def enqueue(self) -> None:
        """Run the engine; bind the context again only if another launch has used it in between."""
        self._context.enqueue(self)


@final
class _Context:
    """An execution context and the launch that it is bound to."""

    def __init__(self, engine: TensorRTEngine, context: Any, settings: Any) -> None:
        self._engine, self._context = engine, context
        # The context refers to them, and TensorRT's bindings do not keep them alive.
        self._settings = settings
        if engine.layers is not None:
            engine.layers.attach(context)
        self._bound: TensorRTLaunch | None = None
        self._profile_index: int | None = None

    def enqueue(self, launch: TensorRTLaunch) -> None:
        if launch is not self._bound:
            self._bind(launch)
        self._check(self._context.execute_async_v3(self._engine.stream), "to run")
        if self._engine.layers is not None:
            self._engine.layers.end_run()

    def is_capturable(self) -> bool:
        """Return what tensorrt-rtx says; TensorRT has no such query and captures all engines without control flow."""
        if not self._engine.may_capture:
            return False
        asked = getattr(self._context, "is_stream_capturable", None)
        return True if asked is None else bool(asked(self._engine.stream))

    def close(self) -> None:
        self._context = self._bound = None
        self._settings = None

    def _bind(self, launch: TensorRTLaunch) -> None:
        context, index = self._context, launch.profile_index
        if index != self._profile_index:
            switched = context.set_optimization_profile_async(index, self._engine.stream)
            self._check(switched, f"to take profile {self._engine.spec.profiles[index].name}")
            self._profile_index = index
        for tensor in self._engine.spec.inputs:
            shape = shape_at(tensor.shape, self._engine.spec.profiles[index])
            self._check(context.set_input_shape(tensor.name, shape), f"to take {tensor.name} {list(shape)}")
        for name, bound in launch.tensors.items():
            self._check(context.set_tensor_address(name, bound.address), f"to take the address of {name}")
        self._bound = launch

    def _check(self, accepted: bool, what: str) -> None:
        if not accepted:
            self._bound = None
            raise BackendError(
                f"{self._engine.spec.name}: expected its engine {what}, it refused{self._engine.errors.reason()};"
                " run trio-build again with --force"
            )


def _context_settings(engine: Any, tensorrt: TensorRT, kernels: CompiledKernels | None) -> Any:
    """Return the settings of a context without its own memory.

    By default tensorrt-rtx compiles kernels for a shape in the background and replaces the slow ones later. A CUDA graph
    would keep the slow ones, so all kernels are compiled at once.
    """
    module = tensorrt.module
    strategy = module.ExecutionContextAllocationStrategy.USER_MANAGED
    if kernels is None:
        return strategy
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(strategy)
    config.dynamic_shapes_kernel_specialization_strategy = (
        module.DynamicShapesKernelSpecializationStrategy.EAGER
    )
    kernels.attach(config)
    return config


@final
class CompiledKernels:
    """Stores the kernels that tensorrt-rtx compiles on a GPU, so that the next process need not compile them again.

    One runtime cache serves all engines of a bundle and must live longer than their contexts. tensorrt-rtx itself rejects
    kernels of another GPU, driver or release.
    """

    def __init__(self, file: Path) -> None:
        """Read the stored kernels; a missing or unreadable file is an empty cache."""
        self._file = file
        self._stored: bytes | None = None
        self._cache: Any = None
        # A link may lead out of the bundle, so it is neither read nor written.
        self._is_final = file.is_symlink()
        if not self._is_final:
            with suppress(OSError):
                self._stored = file.read_bytes()

    def attach(self, settings: Any) -> None:
        """Let contexts with ``settings``, an ``IRuntimeConfig``, compile into the cache."""
        if self._cache is None:
            self._cache = settings.create_runtime_cache()
            if self._stored is not None and not self._cache.deserialize(self._stored):
                self._stored = None
        settings.set_runtime_cache(self._cache)

    def store(self) -> None:
        """Write newly compiled kernels, once. In a read-only bundle they are compiled again next time."""
        if self._is_final or self._cache is None:
            return
        self._is_final = True
        content = self._cache.serialize()
        if content is not None and bytes(content) != self._stored:
            with suppress(DataError):
                write_output("kernels", self._file, bytes(content))
