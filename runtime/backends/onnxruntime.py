"""ONNX Runtime: on the CPU, or on a GPU through its CUDA and TensorRT execution providers.

Every tensor is bound to a device address, so hidden states and KV caches stay where they are with all three providers.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np
import onnxruntime as ort

from trio_edge.runtime.backends.chunked_prefill import ChunkedLaunch, has_long_prefill
from trio_edge.runtime.backends.interface import selected_graphs
from trio_edge.runtime.backends.pieced_engine import PiecedEngine
from trio_edge.runtime.bundle.errors import BackendError
from trio_edge.runtime.bundle.manifest import shape_at
from trio_edge.runtime.devices.cuda import CudaDevice, load_cuda
from trio_edge.runtime.devices.host import HostDevice
from trio_edge.runtime.devices.interface import LoadedGraphs
from trio_edge.runtime.devices.memory import check_memory
from trio_edge.runtime.engines import cpu
from trio_edge.runtime.engines.files import ENGINES_FOLDER

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from trio_edge.runtime.backends.interface import OnnxRuntimeName
    from trio_edge.runtime.bundle.manifest import GraphSpec, Profile, TensorSpec
    from trio_edge.runtime.bundle.reader import Bundle
    from trio_edge.runtime.devices.interface import Device, DeviceTensor
    from trio_edge.runtime.engines.cpu import CpuAccuracy

_PROVIDERS: dict[OnnxRuntimeName, str] = {
    "onnxruntime": "CPUExecutionProvider",
    "onnxruntime-cuda": "CUDAExecutionProvider",
    "onnxruntime-tensorrt": "TensorrtExecutionProvider",
}
_ONLY_FATAL = 4


def has_provider(name: OnnxRuntimeName) -> bool:
    """Return whether the installed onnxruntime has the execution provider of a backend."""
    return _PROVIDERS[name] in ort.get_available_providers()


@final
@dataclass(frozen=True)
class OnnxRuntimeBackend:
    """Loads graphs into ONNX Runtime. The fields are arguments of ``make_backend``; ``notes`` go to the loaded graphs.

    Raises:
        BackendError: If the installed onnxruntime lacks the execution provider that ``name`` needs.
    """

    name: OnnxRuntimeName
    threads: int
    cpu_accuracy: CpuAccuracy
    layer_times: Path | None
    notes: Sequence[str]

    def __post_init__(self) -> None:
        ort.set_default_logger_severity(_ONLY_FATAL)
        if not has_provider(self.name):
            raise BackendError(
                f"backend: expected onnxruntime {ort.__version__} with {_PROVIDERS[self.name]}, got one with"
                f" {', '.join(ort.get_available_providers())}; run pip install onnxruntime-gpu in place of onnxruntime"
            )

    def load(self, bundle: Bundle, names: Sequence[str] | None = None) -> LoadedGraphs:
        """Load graphs into ONNX Runtime."""
        specs = bundle.manifest.graphs if names is None else selected_graphs(bundle, names)
        device: Device = HostDevice() if self.name == "onnxruntime" else CudaDevice(load_cuda())
        stream = device.stream if isinstance(device, CudaDevice) else None
        loaded = LoadedGraphs(device=device, engines={}, notes=list(self.notes))
        try:
            weight_bytes = sum(spec.weight_bytes for spec in specs)
            loaded.memory.update(check_memory(device, bundle.manifest, specs, weight_bytes=weight_bytes))
            nothing, accuracy = cpu.Prepared({}, ()), self.cpu_accuracy
            prepared = nothing if stream else cpu.open_prepared(bundle, accuracy=accuracy)
            loaded.notes.extend(prepared.notes)
            last = [[spec for spec in specs if spec.role == role][-1:] for role in ("vision", "select")]
            # A session needs twice its memory while it is loaded: the largest first, so that it does not come on top of the others.
            for spec in sorted(specs, key=lambda spec: -spec.weight_bytes):
                parts = cpu.sessions_of(bundle, spec, on_gpu=stream is not None)
                # with one engine the range would go from a piece without rows to all its rows
                if self.name == "onnxruntime-tensorrt":
                    parts = spec.split()
                engines = [self._engine(bundle, part, prepared, stream) for part in parts]
                if stream is None and [spec] in last:
                    engines[0].shrink_after_runs()
                loaded.engines[spec.name] = engines[0] if parts == (spec,) else PiecedEngine(spec, engines)
        except BaseException:
            loaded.close()
            raise
        return loaded

    def _engine(
        self, bundle: Bundle, spec: GraphSpec, prepared: cpu.Prepared, stream: int | None
    ) -> OnnxRuntimeEngine:
        session = self._session(bundle, spec, prepared.files.get(spec.name), stream)
        _check_interface(spec.inputs, session.get_inputs(), where=f"{spec.file} inputs")
        _check_interface(spec.outputs, session.get_outputs(), where=f"{spec.file} outputs")
        if stream is None:
            _release_free_memory()  # loading takes twice the memory, and the C library would keep half of it
        num_heads, on_gpu = bundle.manifest.dimensions.num_heads, stream is not None
        return OnnxRuntimeEngine(session, spec, num_heads, on_gpu, self.layer_times)

    def _session(
        self, bundle: Bundle, spec: GraphSpec, prepared: Path | None, stream: int | None
    ) -> ort.InferenceSession:
        file, own = prepared or bundle.folder / spec.file, [_PROVIDERS[self.name]]
        options = ort.SessionOptions()
        if prepared is not None:  # it was optimized then
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = self.threads
        options.log_severity_level = _ONLY_FATAL  # errors are raised as well, with our own message
        # Each session has its own threads. While they spin, other sessions and programs lack their cores; while they sleep,
        # each operator has to wake them. An answer of the packaged model on 2 cores takes 24 ms if they sleep at once, 21 ms if
        # they spin for 20 microseconds and 130 ms without a limit, which onnxruntime before 1.26 does not have.
        spins = stream is None and cpu.onnxruntime_version() >= (1, 26)
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spins)))
        options.add_session_config_entry("session.intra_op.spin_duration_us", "20")
        if stream is not None:
            options.add_session_config_entry(cpu.ACCURACY_KEY, cpu.ACCURACY_LEVELS["float32"])
        else:
            cpu.set_cpu_options(options, bundle, spec, accuracy=self.cpu_accuracy)
        if self.layer_times is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(self.layer_times / f".{spec.name}")
        try:
            session = ort.InferenceSession(
                file,
                options,
                providers=own if stream is None else self._on_gpu(stream, bundle.folder, spec),
                disabled_optimizers=cpu.unwanted_optimizers(bundle, spec),
            )
        except Exception as error:  # onnxruntime's exceptions have no common public base
            raise BackendError(
                f"{file}: expected a graph that onnxruntime {ort.__version__} loads, got:"
                f" {cpu.first_line(error)}; export the bundle again"
            ) from None
        # Without an error it falls back to the CPU.
        if (wanted := _PROVIDERS[self.name]) not in session.get_providers():
            raise BackendError(
                f"backend: expected {wanted} to start, onnxruntime {ort.__version__} fell back to"
                f" {session.get_providers()[0]}; install the CUDA and cuDNN that it was built for"
            )
        return session

    def _on_gpu(self, stream: int, folder: Path, spec: GraphSpec) -> list[Any]:
        cuda = {
            "device_id": "0",
            "user_compute_stream": str(stream),
            "arena_extend_strategy": "kSameAsRequested",
            "use_tf32": "0",  # otherwise a float32 bundle would keep other tokens than on other backends
        }
        found: list[Any] = [("CUDAExecutionProvider", cuda), "CPUExecutionProvider"]
        if self.name == "onnxruntime-tensorrt":
            found.insert(0, (_PROVIDERS[self.name], _tensorrt_options(stream, folder, spec)))
        return found


def _tensorrt_options(stream: int, folder: Path, spec: GraphSpec) -> dict[str, str]:
    """Return the TensorRT provider's options: one profile with the range of all shapes, cached next to the bundle's engines.

    The provider reads several profiles and runs only the first (microsoft/onnxruntime issue 31624).
    """
    options = {"device_id": "0", "user_compute_stream": str(stream)}
    for bound, end in (("min", min), ("opt", max), ("max", max)):
        shapes = (
            (tensor.name, zip(*(shape_at(tensor.shape, profile) for profile in spec.profiles)))
            for tensor in spec.inputs
            if any(isinstance(size, str) for size in tensor.shape)
        )
        options[f"trt_profile_{bound}_shapes"] = ",".join(
            f"{name}:{'x'.join(str(end(sizes)) for sizes in axes)}" for name, axes in shapes
        )
    cache = folder / ENGINES_FOLDER / "onnxruntime-tensorrt"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:  # a read-only bundle: engines are built at every start
        return options
    return options | {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(cache)}


def _release_free_memory() -> None:
    """Return memory that the C library keeps for later to the system; glibc only."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _check_interface(expected: tuple[TensorSpec, ...], got: list[Any], *, where: str) -> None:
    wanted = [(one.name, f"tensor({one.dtype.replace('float32', 'float')})") for one in expected]
    found = [(tensor.name, tensor.type) for tensor in got]
    if wanted != found:
        odd = next((pair for pair in zip(wanted, found) if pair[0] != pair[1]), (len(wanted), len(found)))
        raise BackendError(f"{where}: expected {odd[0]} (manifest), got {odd[1]}; export the bundle again")


@final
@dataclass
class OnnxRuntimeEngine:
    """One graph in ONNX Runtime."""

    _session: ort.InferenceSession | None
    spec: GraphSpec
    """The graph's entry in the manifest."""
    _num_heads: int
    _on_gpu: bool
    _layer_times: Path | None
    _run_options: ort.RunOptions = field(default_factory=ort.RunOptions)

    def __post_init__(self) -> None:
        self._run_options.log_severity_level = _ONLY_FATAL
        if self._on_gpu:  # the next graph is enqueued on the same stream, so there is no need to wait
            self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def prepare(
        self, profile: Profile, tensors: Mapping[str, DeviceTensor]
    ) -> OnnxRuntimeLaunch | ChunkedLaunch:
        """Bind a profile to addresses."""
        session = self._open_session()
        # Layer times are those of one pass.
        may_split = not self._on_gpu and self._layer_times is None
        if may_split and has_long_prefill(self.spec, profile, num_heads=self._num_heads):
            return ChunkedLaunch(self.run, session, self.spec, tensors)
        binding, device = session.io_binding(), "cuda" if self._on_gpu else "cpu"
        for spec in self.spec.tensors:
            bind = binding.bind_input if spec in self.spec.inputs else binding.bind_output
            tensor = tensors[spec.name]
            bind(spec.name, device, 0, np.dtype(spec.dtype), tensor.shape, tensor.address)
        return OnnxRuntimeLaunch(self, binding)

    def run(self, binding: ort.IOBinding) -> None:
        """Run the session with a binding of ``prepare``."""
        try:
            self._open_session().run_with_iobinding(binding, self._run_options)
        except BackendError:
            raise
        except Exception as error:  # onnxruntime's exceptions have no common public base
            raise BackendError(f"{self.spec.name}: onnxruntime failed: {cpu.first_line(error)}") from None

    def shrink_after_runs(self) -> None:
        """Release the memory that graphs share after each run; for vision and the last stage."""
        self._run_options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")

    def close(self) -> None:
        """Close the session; write the layer times if they were recorded."""
        if self._session is not None and self._layer_times is not None:
            Path(self._session.end_profiling()).replace(self._layer_times / f"{self.spec.name}.json")
        self._session = None

    def _open_session(self) -> ort.InferenceSession:
        if self._session is None:
            raise BackendError(
                f"{self.spec.name}: expected an open session, got a closed one; load the bundle again"
            )
        return self._session


@final
class OnnxRuntimeLaunch:
    """One profile of a graph bound to addresses."""

    capturable = False
    """A session may compute shapes on the host, which a CUDA graph cannot hold."""

    def __init__(self, engine: OnnxRuntimeEngine, binding: ort.IOBinding) -> None:
        self._engine, self._binding = engine, binding

    def enqueue(self) -> None:
        """Run the session."""
        self._engine.run(self._binding)
