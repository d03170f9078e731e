"""Graphs on the CPU: ONNX Runtime's settings for each, and graphs prepared ahead of time.

A session of ONNX Runtime optimizes its graph, converts float16 weights, and packs quantized ones for the processor's kernels.
This takes seconds, and the new weights need extra memory. ``prepare_graphs`` (``trio-build --backend onnxruntime``) does it
once and stores the result in ``engines/onnxruntime-cpu``, from where a session maps the weights.
"""

from __future__ import annotations

import functools
import hashlib
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec
import onnxruntime as ort

from trio_edge.runtime.bundle.errors import BackendError
from trio_edge.runtime.bundle.graph_io import PROBE_OUTPUT, is_probe
from trio_edge.runtime.bundle.limits import MAX_JSON_BYTES, typed
from trio_edge.runtime.bundle.manifest import MANIFEST_NAME, PART_FROM_ROLE
from trio_edge.runtime.bundle.reader import file_problem, read_regular, sha256_of
from trio_edge.runtime.devices.machine import found_in
from trio_edge.runtime.engines.files import ENGINES_FOLDER, atomic_engines

if TYPE_CHECKING:
    from collections.abc import Callable

    from trio_edge.runtime.bundle.manifest import GraphSpec
    from trio_edge.runtime.bundle.reader import Bundle

CpuAccuracy = Literal["auto", "float32", "int8"]
"""Type that ONNX Runtime rounds the inputs of quantized products to; "auto" chooses by the graph's size."""
CPU_TARGET = "onnxruntime-cpu"
"""Folder below ``engines``."""
_FILE_NAME = "graphs.json"
_SCHEMA_VERSION = 2
ACCURACY_KEY = "session.qdq_matmulnbits_accuracy_level"
ACCURACY_LEVELS = {"float32": "1", "int8": "4"}
"""Accuracy levels of ONNX Runtime's MatMulNBits, by the type that it rounds its inputs to."""
LARGE_GRAPH_BYTES = 32 << 20
"""Bytes of weights from which copies of them matter, and rounding inputs saves a noticeable time."""
_PREFILL_ROLES = ("vision", "clip_text", "reduce", "select")
_LEAST_STORED_BYTES = "1024"
"""Smaller tensors are stored in the graph's file, others next to it."""


class _Spec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the values in ``graphs.json``: immutable, keyword-only, unknown keys rejected."""


class PreparedFile(_Spec, frozen=True):
    """A file next to ``graphs.json``."""

    file: str
    num_bytes: int
    sha256: str


class PreparedGraphs(_Spec, frozen=True):
    """The prepared graphs of a bundle, and what they depend on."""

    schema_version: int
    onnxruntime_version: str
    processor: str
    """``processor_key`` of the machine: the packing of weights depends on it."""
    cpu_accuracy: str
    manifest_sha256: str
    graphs: dict[str, tuple[PreparedFile, ...]]
    """Files by graph, the ONNX file first."""


class Prepared(NamedTuple):
    """Graphs that a backend loads instead of the bundle's graphs."""

    files: dict[str, Path]
    """ONNX file by graph."""
    notes: tuple[str, ...]
    """Why existing prepared graphs are not used."""


def set_cpu_options(
    options: ort.SessionOptions, bundle: Bundle, spec: GraphSpec, *, accuracy: CpuAccuracy
) -> None:
    """Set the options that trade memory, speed and accuracy of a graph on the CPU."""
    # An arena keeps the session's largest activations forever, and a memory pattern allocates all of a run's at once.
    options.enable_cpu_mem_arena = False
    can_share, is_packed = _share_arena(), _has_packed_weights(bundle, spec)
    is_in_prefill = spec.role in _PREFILL_ROLES or is_probe(spec)
    if is_in_prefill:
        options.enable_mem_pattern = False
    # These graphs run once a prompt and write large buffers, such as float32 copies of weights. Allocating each time takes up to
    # twice the time: they share memory. ONNX Runtime's plan for reuse would keep a buffer of each size for later nodes.
    if can_share and (spec.role in ("vision", "select") or is_probe(spec)):
        options.add_session_config_entry("session.use_env_allocators", "1")
        options.enable_mem_reuse = False
    if accuracy == "auto":
        accuracy = "int8" if _is_large(spec) else "float32"
    options.add_session_config_entry(ACCURACY_KEY, ACCURACY_LEVELS[accuracy])
    kind = bundle.manifest.format_of(spec)
    if accuracy == "float32" and kind in ("int8", "fp8"):
        # onnxruntime 1.32's kernel for INT8 weights and float32 inputs dequantizes all weights in every run, which takes
        # 2 s for the head of a 3B. Without this kernel they are dequantized once. FP8 has no kernel, and the same cost.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    else:
        # Otherwise weights are folded into transposed copies: the head of a 3B needs 1.2 GB more while it is loaded.
        options.add_session_config_entry("optimization.constant_folding_max_output_size_in_bytes", "1000000")
    # INT8 weights have one scale per output; the kernel needs one per block of inputs, and is fastest with long blocks.
    options.add_session_config_entry("session.qdq_matmulnbits_block_size", "128")
    # Prepacking copies weights. It saves time in decode only, and little in large graphs. The kernel for INT4 and INT8 weights
    # always needs it. A packed product adds in another order, which the coarse rounding of FP8 inputs makes visible: without,
    # FP8 answers are the same whether weights are dequantized once or in every run.
    if kind == "fp8" or ((is_in_prefill or _is_large(spec)) and not is_packed):
        options.add_session_config_entry("session.disable_prepacking", "1")


def _is_large(spec: GraphSpec) -> bool:
    return spec.weight_bytes >= LARGE_GRAPH_BYTES


def unwanted_optimizers(bundle: Bundle, spec: GraphSpec) -> list[str]:
    """Return the optimizers to leave out: most make graphs that onnxruntime cannot load or run; remove one when a release can."""
    quantization, found = bundle.manifest.quantization, []
    if not _is_worth_preparing(bundle, spec):
        # It makes float32 copies of all float16 weights when a graph is loaded. These graphs need each weight once a prompt.
        found.append("FuseFp16InitializerToFp32NodeTransformer")
    if any(tensor.dtype == "int8" for tensor in spec.inputs):
        # 1.31 moves DequantizeLinear after Transpose by a node that opset 21 does not allow (microsoft/onnxruntime issue 25526).
        found.append("QDQPropagationTransformer")
    has_int8_inputs = quantization is not None and PART_FROM_ROLE.get(spec.role) in quantization.inputs
    if bundle.manifest.format_of(spec) == "fp8" or (has_int8_inputs and onnxruntime_version() < (1, 24)):
        # It makes integer products of FP8 inputs and weights; 1.23 makes QGemm without the zero points that QGemm needs.
        found.append("QDQSelectorActionTransformer")
    return found


def onnxruntime_version() -> tuple[int, ...]:
    """Return the first two numbers of the release."""
    return tuple(int(part) for part in re.findall(r"\d+", ort.__version__)[:2])


def prepare_graphs(
    bundle: Bundle,
    *,
    accuracy: CpuAccuracy = "auto",
    started: Callable[[GraphSpec], None] = lambda _spec: None,
) -> Path:
    """Prepare the graphs of ``bundle`` for this machine's CPU and return their folder; an older one is replaced.

    Selections and most of a probe are not prepared: they read their weights once per prompt, directly from the bundle. Large
    float32 graphs always do.
    ``accuracy`` is ``make_backend``'s ``cpu_accuracy``; ``started`` is called before each graph.

    Raises:
        BackendError: If ONNX Runtime cannot read a graph, or nothing can be written.
    """
    specs = [spec for spec in _sessions(bundle) if _is_worth_preparing(bundle, spec)]
    target = bundle.folder / ENGINES_FOLDER / CPU_TARGET
    expected_bytes = 2 * sum(spec.weight_bytes for spec in specs)
    with atomic_engines(target, num_bytes=expected_bytes) as folder:
        graphs = {}
        for spec in specs:
            started(spec)
            _prepare(bundle, spec, folder, accuracy=accuracy)
            files = [folder / name for name in _file_names(spec.name)[0] if (folder / name).exists()]
            graphs[spec.name] = tuple(
                PreparedFile(file=file.name, num_bytes=file.stat().st_size, sha256=sha256_of(file))
                for file in files
            )
        found = PreparedGraphs(cpu_accuracy=accuracy, graphs=graphs, **_made_here(bundle))
        (folder / _FILE_NAME).write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
    return target


def open_prepared(bundle: Bundle, *, accuracy: CpuAccuracy) -> Prepared:
    """Return the prepared graphs that fit this bundle, this onnxruntime and this processor.

    Raises:
        BackendError: If a file was changed since it was written.
    """
    folder = bundle.folder / ENGINES_FOLDER / CPU_TARGET
    is_there = (folder / _FILE_NAME).is_file() and not folder.parent.is_symlink()
    return _opened(folder, bundle, accuracy) if is_there else Prepared({}, ())


def _opened(folder: Path, bundle: Bundle, accuracy: CpuAccuracy) -> Prepared:
    again = f"run trio-build {bundle.folder} --backend onnxruntime --force"

    def unused(reason: str, advice: str = again) -> Prepared:
        return Prepared({}, (f"prepared graphs are not used: {reason}; {advice}",))

    try:
        content = read_regular(folder / _FILE_NAME, max_bytes=MAX_JSON_BYTES)
        found = typed(msgspec.json.decode(content), PreparedGraphs)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return unused(f"{folder / _FILE_NAME}: {error}")
    if found.cpu_accuracy != accuracy:
        reason = f"expected cpu_accuracy {accuracy}, they have {found.cpu_accuracy}"
        return unused(reason, "ask for that, or go on without")
    for name, value in _made_here(bundle).items():
        if getattr(found, name) != value:
            return unused(f"expected {name} {value}, they have {getattr(found, name)}")
    files = {}
    for name in (spec.name for spec in _sessions(bundle) if spec.name in found.graphs):
        entries = found.graphs[name]
        if tuple(entry.file for entry in entries) not in _file_names(name):
            raise BackendError(
                f"{folder}: expected {name}.onnx and its data inside the bundle, got others; {again}"
            )
        for entry in entries:
            problem = file_problem(folder / entry.file, entry, root=folder, hash_all=False)
            if problem is not None:
                raise BackendError(f"{problem}; {again}")
        files[name] = folder / entries[0].file
    return Prepared(files, ())


def _made_here(bundle: Bundle) -> dict[str, Any]:
    """Return what prepared graphs depend on."""
    return {
        "schema_version": _SCHEMA_VERSION,
        "onnxruntime_version": ort.__version__,
        "processor": processor_key(),
        "manifest_sha256": sha256_of(bundle.folder / MANIFEST_NAME),
    }


def sessions_of(bundle: Bundle, spec: GraphSpec, *, on_gpu: bool = False) -> tuple[GraphSpec, ...]:
    """Return the graphs that get a session each: the pieces of ``spec``, or all of it at once.

    On a GPU one session holds the weights once. On the CPU all sessions map the same files, and separate pieces are faster.
    Quantized weights, however, are packed: pieces that share products would need them twice.
    """
    is_one = on_gpu or (_is_large(spec) and bundle.manifest.format_of(spec) is not None)
    # onnxruntime 1.23 cannot run a graph whose other pieces have no elements.
    return (spec,) if is_one and onnxruntime_version() >= (1, 24) else spec.split()


def _sessions(bundle: Bundle) -> list[GraphSpec]:
    return [part for spec in bundle.manifest.graphs for part in sessions_of(bundle, spec)]


def _is_worth_preparing(bundle: Bundle, spec: GraphSpec) -> bool:
    """Return whether ONNX Runtime converts or packs a graph's weights, which it does once for many runs."""
    if spec.role == "select" or (is_probe(spec) and not _has_packed_weights(bundle, spec)):
        return False
    is_float32 = bundle.manifest.dtype == "float32" and bundle.manifest.format_of(spec) is None
    return not (is_float32 and _is_large(spec))


def _has_packed_weights(bundle: Bundle, spec: GraphSpec) -> bool:
    """Return whether ONNX Runtime packs the weights; a probe's backward half reads them unpacked."""
    is_backward = is_probe(spec) and PROBE_OUTPUT not in {tensor.name for tensor in spec.outputs}
    return bundle.manifest.format_of(spec) is not None and not is_backward


def _file_names(graph: str) -> tuple[tuple[str, ...], ...]:
    """Return the possible files of a prepared graph: with a separate file for weights, and without."""
    return (f"{graph}.onnx", f"{graph}.data"), (f"{graph}.onnx",)


def processor_key() -> str:
    """Return a key for the kernels that a library chooses here: the machine and a digest of the processor's features."""
    flags = found_in(Path("/proc/cpuinfo"), r"^(?:flags|Features)\s*:(.*)$")
    features = platform.processor() if flags is None else " ".join(sorted(flags.split()))
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:16]}"


def _prepare(bundle: Bundle, spec: GraphSpec, folder: Path, *, accuracy: CpuAccuracy) -> None:
    options = ort.SessionOptions()
    options.log_severity_level = 4  # only what is fatal
    set_cpu_options(options, bundle, spec, accuracy=accuracy)
    external = "session.optimized_model_external_initializers"
    options.add_session_config_entry(f"{external}_file_name", f"{spec.name}.data")
    options.add_session_config_entry(f"{external}_min_size_in_bytes", _LEAST_STORED_BYTES)
    options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    file = bundle.folder / spec.file
    unwanted = unwanted_optimizers(bundle, spec)
    try:
        options.optimized_model_filepath = str(folder / f"{spec.name}.onnx")  # a name that is not UTF-8 fails
        ort.InferenceSession(file, options, providers=["CPUExecutionProvider"], disabled_optimizers=unwanted)
    except Exception as error:  # onnxruntime's exceptions have no common public base
        raise BackendError(
            f"{file}: expected a graph that onnxruntime {ort.__version__} prepares, got: {first_line(error)}"
        ) from None


def first_line(error: Exception) -> str:
    """Return the first line of an ONNX Runtime error, at most 300 characters."""
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__


@functools.cache
def _share_arena() -> bool:
    """Make the process's one arena that sessions can share; return whether it worked."""
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    same_as_requested = ort.OrtArenaCfg({"arena_extend_strategy": 1})
    try:
        ort.create_and_register_allocator(memory, same_as_requested)
    # onnxruntime's exceptions have no common public base; the program already has such an arena.
    except Exception:
        return False
    return True
