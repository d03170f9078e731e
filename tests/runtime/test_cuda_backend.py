"""The runtime's calls of CUDA and TensorRT, recorded one by one on a simulated GPU (tests/cuda_on_host.py)."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.bundles import export
from tests.cuda_on_host import (
    Context,
    CudaOnHost,
    Engine,
    Error,
    RuntimeCache,
    RuntimeConfig,
    pretend_gpu,
    write_engines,
)
from tests.engine_bundles import HOST, copy_bundle, replace_bytes
from tests.interleaved import interleaved
from tests.pictures import random_picture
from tests.qwen_checkpoints import save_qwen3_vl_checkpoint
from tests.tolerances import LOGITS_FLOAT32
from trio_edge.runtime.backends import registry as module
from trio_edge.runtime.backends import tensorrt as backend_tensorrt
from trio_edge.runtime.backends.registry import make_backend
from trio_edge.runtime.backends.single_graph import SingleGraph
from trio_edge.runtime.backends.tensorrt import TensorRTEngine
from trio_edge.runtime.bundle.errors import BackendError
from trio_edge.runtime.bundle.reader import open_bundle, sha256_of
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.runtime.cli.run import main
from trio_edge.runtime.devices import cuda as device_cuda
from trio_edge.runtime.devices.host import array_at
from trio_edge.runtime.devices.machine import Host
from trio_edge.runtime.model.decoder import Decoder
from trio_edge.runtime.model.programs import Programs
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Iterator

PROMPT = "w1 w2 w3"
LONG_PROMPT = " ".join(["w7"] * 40)
WAITS = ("cudaEventSynchronize", "cudaStreamSynchronize")
CHAIN = [
    "vision", "prefix",
    "segment_1", "head", "segment_1", "select_1", "segment_1",
    "suffix", "head", "suffix", "select_2", "suffix", "head",
]  # fmt: skip
"""Each probe runs forwards, through the head and back."""
STEP = ["prefix", "segment_1", "suffix", "head"]


@pytest.fixture
def folder(reduced_bundle: Path, tmp_path: Path) -> Path:
    copy = copy_bundle(reduced_bundle, tmp_path / "bundle")
    write_engines(copy, host=HOST)
    return copy


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> CudaOnHost:
    cuda = CudaOnHost()
    pretend_gpu(monkeypatch, cuda, HOST)
    return cuda


@pytest.fixture
def pipeline(folder: Path, cuda: CudaOnHost) -> Iterator[Pipeline]:
    with Pipeline.from_bundle(folder, backend="tensorrt") as opened:
        cuda.calls.clear()
        yield opened


def answer(pipeline: Pipeline, *, tokens: int = 1, prompt: str = PROMPT, seed: int = 0) -> Any:
    """Ask about a picture; random weights do not stop by themselves within a few tokens."""
    generation = pipeline.generate(random_picture(60, 40, seed=seed), prompt, max_new_tokens=tokens)
    _ = generation.text
    assert generation.statistics.new_tokens == tokens
    return generation


def named(calls: list[Any], *names: str) -> list[Any]:
    return [call for call in calls if call[0] in names]


def launches(calls: list[Any]) -> list[str]:
    return [call[1] for call in named(calls, "enqueue")]


def test_the_chain_is_enqueued_before_the_host_waits_once(pipeline: Pipeline, cuda: CudaOnHost) -> None:
    answer(pipeline)
    assert launches(cuda.calls) == CHAIN
    assert [call[0] for call in cuda.calls if call[0] in ("enqueue", *WAITS)] == ["enqueue"] * len(CHAIN) + [
        WAITS[0]
    ]


def test_each_graph_reads_where_the_one_before_wrote(pipeline: Pipeline, cuda: CudaOnHost) -> None:
    answer(pipeline)
    bound = {call[1]: call[3] for call in named(cuda.calls, "enqueue")}
    for giver, output, taker, taken in (
        ("prefix", "hidden_states_out", "select_1", "hidden_states"),
        ("select_1", "kept_hidden_states", "segment_1", "hidden_states"),
        ("select_1", "kept_position_ids", "segment_1", "position_ids"),
        ("select_1", "kept_position_ids", "select_2", "position_ids"),
        ("segment_1", "hidden_states_out", "select_2", "hidden_states"),
        ("select_2", "kept_hidden_states", "suffix", "hidden_states"),
        ("suffix", "hidden_states_out", "head", "hidden_states"),
    ):
        assert bound[giver][output] == bound[taker][taken]


def test_addresses_never_change(pipeline: Pipeline, cuda: CudaOnHost) -> None:
    for seed in range(2):
        answer(pipeline, tokens=2, seed=seed)
        answer(pipeline, tokens=2, prompt=LONG_PROMPT)
    seen: dict[tuple[str, str], Any] = {}
    for _, graph, profile, tensors in named(cuda.calls, "enqueue"):
        assert seen.setdefault((graph, profile), tensors) == tensors


def test_only_results_leave_the_device(pipeline: Pipeline, cuda: CudaOnHost) -> None:
    """One copy for the first token, with the logits; one for each later one, with the ids and logits of the most likely."""
    answer(pipeline, tokens=4)
    sizes = [call[3] for call in named(cuda.calls, "cudaMemcpyAsync") if call[4] == "to host"]
    dims, top = pipeline.manifest.dimensions, 2 * 256
    assert len(sizes) == 4
    assert dims.vocab_size * 4 < sizes[0] < dims.vocab_size * 4 + top + 7 * 256
    assert sizes[1:] == [pipeline._level.decoder.max_rows * top] * 3


def test_a_decoded_token_is_one_upload_one_sequence_one_download_and_one_wait(
    pipeline: Pipeline, cuda: CudaOnHost
) -> None:
    answer(pipeline)
    cuda.calls.clear()
    answer(pipeline, tokens=4)
    calls = [call for call in cuda.calls if call[0] not in ("switch", "cudaStreamBeginCapture")]
    starts = [index for index, call in enumerate(calls) if call[0] == WAITS[0]]
    names = [call[0] for call in calls]
    after_first = names[starts[0] + 1 :]
    copies = ["cudaMemcpy2DAsync"] * 3  # one for each range, after the copy of the ids
    step = ["cudaMemcpyAsync", *["enqueue"] * 4, "cudaMemcpyAsync", *copies, WAITS[0]]
    captured = ["cudaMemcpyAsync", *["enqueue"] * 4, "cudaGraphLaunch", "cudaMemcpyAsync", *copies, WAITS[0]]
    replayed = ["cudaMemcpyAsync", "cudaGraphLaunch", "cudaMemcpyAsync", *copies, WAITS[0]]
    assert after_first == step + captured + replayed


def test_decode_is_captured_once_over_all_ranges_and_the_head(pipeline: Pipeline, cuda: CudaOnHost) -> None:
    answer(pipeline, tokens=5)
    answer(pipeline, tokens=5)
    assert len(named(cuda.calls, "cudaStreamBeginCapture")) == 1
    assert [call[1] for call in named(cuda.calls, "cudaGraphLaunch")] == [len(STEP)] * 7


def test_every_number_of_rows_is_captured_once_and_gives_the_same(
    pipeline: Pipeline, cuda: CudaOnHost
) -> None:
    decoder, embeds = pipeline._level.decoder, pipeline._embedding[np.arange(5, 13)]
    found: dict[int, list[Any]] = {}
    for rows in (1, 2, 3, 8, 4, 1, 3, 8, 2):
        answer(pipeline)
        logits: list[Any] = []
        for first in range(0, 8, rows):
            tops = decoder.decode(embeds[first : first + rows])
            logits += [decoder.logits(row) for row in range(len(tops))]
        found.setdefault(rows, []).append(np.stack(logits))
    assert len(named(cuda.calls, "cudaStreamBeginCapture")) == 4  # three rows run as four
    for several in found.values():
        for logits_TV in several:
            np.testing.assert_allclose(logits_TV, found[1][0], **LOGITS_FLOAT32)


def test_answers_that_decode_together_are_captured_once(
    checkpoint: Path, tmp_path: Path, cuda: CudaOnHost
) -> None:
    """The stream is lazy: rows that leave the decoder's caches too late would be the next prompt's."""
    folder = export(checkpoint, tmp_path / "bundle", batch=4)
    write_engines(folder, host=HOST)
    found = []
    for backend in ("onnxruntime", "tensorrt"):
        with Pipeline.from_bundle(folder, backend=backend) as pipeline:
            cuda.calls.clear()
            for count in (3, 4):
                answers = [
                    pipeline.generate(random_picture(60, 40, seed=seed), prompt, max_new_tokens=3 + seed)
                    for seed, prompt in zip(range(count), (PROMPT, LONG_PROMPT, "w4", "w5"))
                ]
                interleaved(answers)
                found.append([answer.token_ids for answer in answers])
    assert found[:2] == found[2:]
    assert len(named(cuda.calls, "cudaStreamBeginCapture")) <= 2  # the batch, and a step of one answer


def test_an_engine_that_cannot_be_captured_is_run_without_and_told(
    pipeline: Pipeline, cuda: CudaOnHost
) -> None:
    captured = answer(pipeline, tokens=5).token_ids
    graphs = pipeline._graphs
    pipeline._level.decoder = Decoder(Programs(pipeline.manifest, graphs))
    cuda.uncapturable = "segment_1"
    cuda.calls.clear()
    assert answer(pipeline, tokens=5).token_ids == captured
    assert len(named(cuda.calls, "cudaStreamBeginCapture")) == 1
    assert named(cuda.calls, "cudaGraphLaunch") == []
    (note,) = pipeline.notes
    assert note.startswith(
        "decode runs without a CUDA graph, which costs time: segment_1: expected its engine"
    )


def test_new_kv_rows_go_behind_the_valid_ones(pipeline: Pipeline, cuda: CudaOnHost) -> None:
    """One copy for each range, which has one layer here. Its 2 heads take the room of 4 for aligned addresses."""
    answer(pipeline, tokens=3)
    dims = pipeline.manifest.dimensions
    row, height = dims.head_size * 4, 2 * 4
    lengths = [cache.length - 2 for cache in pipeline._level.decoder.caches]  # after the prefill
    visual, *copies = [call[1:] for call in named(cuda.calls, "cudaMemcpy2DAsync")]
    assert visual[-1] == 1  # the picture's tokens, which lie together
    prefill, first, second = copies[:3], copies[3:6], copies[6:]
    assert len(second) == 3
    for index, capacity in enumerate(pipeline.manifest.kv_capacities):
        base = prefill[index][0]
        assert prefill[index][1] == capacity * row
        assert prefill[index][4:] == (lengths[index] * row, height)
        for step, copy in enumerate((first[index], second[index])):
            assert copy[0] == base + (lengths[index] + step) * row
            assert copy[4:] == (row, height)


def test_every_range_is_told_its_own_length_and_position(pipeline: Pipeline, cuda: CudaOnHost) -> None:
    """With compact positions both are the rows of the range's own cache."""
    answer(pipeline, tokens=2)
    told = []
    for _, graph, profile, tensors in named(cuda.calls, "enqueue"):
        if profile == "decode" and graph != "head":
            read = [
                array_at(tensors[name][0], shape=(4,)).view(np.int32)[0]
                for name in ("position_ids", "past_length")
            ]
            told.append(read)
    assert told == [[cache.length - 1] * 2 for cache in pipeline._level.decoder.caches]


def test_another_bucket_switches_the_prefill_contexts_and_never_those_of_decode(
    pipeline: Pipeline, cuda: CudaOnHost
) -> None:
    answer(pipeline, tokens=3)
    first = [call[1] for call in named(cuda.calls, "switch")]
    gradients = CHAIN[:-1].count("head")  # all run at one profile, in a context of their own
    once = [*CHAIN, *STEP]
    for _ in range(gradients - 1):
        once.remove("head")
    assert sorted(first) == sorted(once)
    cuda.calls.clear()
    answer(pipeline, tokens=3)
    assert named(cuda.calls, "switch") == []
    answer(pipeline, tokens=3, prompt=LONG_PROMPT)
    switched = [call[1] for call in named(cuda.calls, "switch")]
    assert switched == [name for name in CHAIN[:-1] if name not in ("vision", "head")] + ["head"]


def test_separate_pieces_answer_as_joined_ones_do(
    reduced_bundle: Path, folder: Path, tmp_path: Path, cuda: CudaOnHost
) -> None:
    apart = copy_bundle(reduced_bundle, tmp_path / "apart")
    write_engines(apart, host=HOST, separate=True)
    found = []
    for bundle in (folder, apart):
        with Pipeline.from_bundle(bundle, backend="tensorrt") as pipeline:
            answers = [answer(pipeline, tokens=4, prompt=prompt) for prompt in (PROMPT, LONG_PROMPT)]
            assert len(cuda.engines) > 7 or bundle == folder
            assert named(cuda.calls, "cudaGraphLaunch")
        found.append(
            [(one.token_ids, [kept.tolist() for kept in one.kept], one.first_logits) for one in answers]
        )
        cuda.calls.clear()
    for theirs, ours in zip(*found):
        assert ours[:2] == theirs[:2]
        np.testing.assert_allclose(ours[2], theirs[2], **LOGITS_FLOAT32)


@pytest.fixture
def rtx(keep_all_bundle: Path, tmp_path: Path, cuda: CudaOnHost, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle with engines of tensorrt-rtx."""
    folder = copy_bundle(keep_all_bundle, tmp_path / "bundle")
    write_engines(folder, host=HOST, backend="tensorrt-rtx")
    pretend_gpu(monkeypatch, cuda, HOST, backend="tensorrt-rtx")
    return folder


def test_tensorrt_rtx_compiles_its_kernels_before_they_are_captured(rtx: Path, cuda: CudaOnHost) -> None:
    """Context creation here accepts no other setting."""
    with Pipeline.from_bundle(rtx) as pipeline:  # "auto" finds them, too
        assert pipeline.backend_name == "tensorrt-rtx"
        answer(pipeline, tokens=3)
    assert len(named(cuda.calls, "cudaGraphLaunch")) == 1


def _answer_anew(folder: Path, cuda: CudaOnHost) -> list[Any]:
    """Answer in a new pipeline and return the engines whose kernels were compiled."""
    cuda.calls.clear()
    with Pipeline.from_bundle(folder, backend="tensorrt-rtx") as pipeline:
        answer(pipeline, tokens=3)
    del pipeline
    return sorted(call[1] for call in named(cuda.calls, "compile"))


def test_what_tensorrt_rtx_has_compiled_is_kept_beside_the_engines(rtx: Path, cuda: CudaOnHost) -> None:
    graphs = ["head", "prefix", "vision"]
    assert _answer_anew(rtx, cuda) == graphs
    assert _answer_anew(rtx, cuda) == []
    (file,) = rtx.glob("engines/*/kernels.cache")
    file.write_bytes(b"of another driver")
    assert _answer_anew(rtx, cuda) == graphs
    assert _answer_anew(rtx, cuda) == []


def test_compiled_kernels_are_not_written_out_of_the_bundle(
    rtx: Path, cuda: CudaOnHost, tmp_path: Path
) -> None:
    (engines,) = rtx.glob("engines/*")
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    (engines / "kernels.cache").symlink_to(outside)
    assert _answer_anew(rtx, cuda) != []
    assert outside.read_bytes() == b"mine"


def test_a_bundle_that_cannot_be_written_compiles_each_time(rtx: Path, cuda: CudaOnHost) -> None:
    (engines,) = rtx.glob("engines/*")
    (engines / "kernels.cache").mkdir()  # no file can take its place
    assert _answer_anew(rtx, cuda) == _answer_anew(rtx, cuda) != []


def test_all_contexts_share_one_workspace(folder: Path, cuda: CudaOnHost) -> None:
    backend = make_backend("tensorrt")
    graphs = backend.load(open_bundle(folder))
    sizes = [call[1] for call in named(cuda.calls, "cudaMalloc")]
    assert sizes == [Engine.device_memory_size_v2] == [graphs.memory["workspace"]]
    graphs.close()


def test_closing_releases_everything(folder: Path, cuda: CudaOnHost) -> None:
    for _ in range(2):
        with Pipeline.from_bundle(folder, backend="tensorrt") as pipeline:
            answer(pipeline, tokens=4)
            assert len(cuda.engines) == 7
        del pipeline
        assert (cuda.used_bytes, len(cuda.pinned), cuda.open_handles, len(cuda.engines)) == (0, 0, 0, 0)


def test_what_cannot_be_released_keeps_nothing_else(
    folder: Path, cuda: CudaOnHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = Pipeline.from_bundle(folder, backend="tensorrt")
    answer(pipeline, tokens=3)
    engine, close = pipeline._graphs.engines["suffix"], TensorRTEngine.close

    def close_badly(this: TensorRTEngine) -> None:
        close(this)
        if this is engine:
            raise OSError("the disk is full")

    monkeypatch.setattr(TensorRTEngine, "close", close_badly)
    with pytest.raises(OSError, match="the disk is full"):
        pipeline.close()
    assert (cuda.used_bytes, len(cuda.pinned), cuda.open_handles) == (0, 0, 0)


def test_one_graph_alone_is_timed_and_captured(folder: Path, cuda: CudaOnHost) -> None:
    graphs = make_backend("tensorrt").load(open_bundle(folder), ["head"])
    head = SingleGraph(graphs, "head", profile="decode")
    hidden = np.ones((*head.spec.inputs[0].shape[:1], 1, *head.spec.inputs[0].shape[2:]), np.float32)
    outputs = head.run({"hidden_states": hidden, "last_row": np.zeros(1, np.int32)})
    top_ids, top_logits = outputs["top_ids"][0], outputs["top_logits"][0]
    order = np.argsort(-outputs["logits"][0], kind="stable")[: len(top_ids)]
    np.testing.assert_array_equal(top_ids, order)
    np.testing.assert_array_equal(top_logits, outputs["logits"][0][order])
    head.capture()
    assert head.milliseconds(3) > 0
    assert len(named(cuda.calls, "cudaGraphLaunch")) == 3
    cuda.uncapturable = "head"
    again = SingleGraph(graphs, "head", profile="decode")
    again.capture()
    assert again.milliseconds(3) > 0
    assert len(named(cuda.calls, "cudaGraphLaunch")) == 3
    graphs.close()


def test_too_little_memory_is_told_before_anything_is_loaded(folder: Path, cuda: CudaOnHost) -> None:
    cuda.memory_bytes = 100_000
    with pytest.raises(
        BackendError, match=r"GPU memory: expected .* GB free \(weights .*, got 0.00 GB; close"
    ):
        Pipeline.from_bundle(folder, backend="tensorrt")
    assert (cuda.used_bytes, cuda.open_handles, len(cuda.engines)) == (0, 0, 0)


def test_an_allocation_that_fails_says_what_it_was_for_and_releases_the_rest(
    folder: Path, cuda: CudaOnHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend_tensorrt, "check_memory", lambda *_, **__: {})
    with Pipeline.from_bundle(folder, backend="tensorrt"):
        cuda.memory_bytes = cuda.used_bytes - 1
    with pytest.raises(
        BackendError, match=r"GPU memory: expected .* MB for .*, got .* MB free of .* MB; close"
    ):
        Pipeline.from_bundle(folder, backend="tensorrt")
    assert (cuda.used_bytes, len(cuda.pinned), cuda.open_handles, len(cuda.engines)) == (0, 0, 0, 0)


def test_the_estimate_counts_what_is_allocated(folder: Path, cuda: CudaOnHost) -> None:
    with Pipeline.from_bundle(folder, backend="tensorrt") as pipeline:
        memory = pipeline._graphs.memory
        wanted = memory["KV caches"] + memory["buffers"] + memory["workspace"]
        assert wanted == pytest.approx(cuda.used_bytes, rel=0.01)


def test_an_engine_that_does_not_load_is_told_in_one_line_with_tensorrts_reason(
    folder: Path, cuda: CudaOnHost
) -> None:
    """Also when another pipeline was opened and closed before."""
    Pipeline.from_bundle(folder, backend="tensorrt").close()
    file = folder / "engines" / "tensorrt-10.3-sm86" / "suffix.engine"
    description, old_sha256 = file.parent / "engines.json", sha256_of(file)
    replace_bytes(file, b"broken".ljust(file.stat().st_size))
    replace_bytes(
        description, description.read_bytes().replace(old_sha256.encode(), sha256_of(file).encode())
    )
    with pytest.raises(
        BackendError, match=r"suffix.engine: expected .* got none \(.*Version tag does not match.\), \d"
    ):
        Pipeline.from_bundle(folder, backend="tensorrt")
    assert (cuda.used_bytes, cuda.open_handles) == (0, 0)


def test_a_cuda_python_newer_than_the_driver_says_which_one_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As pip installs on JetPack 6, whose driver is that of CUDA 12.6."""
    cuda = CudaOnHost()
    monkeypatch.setattr(cuda, "cudaSetDevice", lambda _: (Error.cudaErrorInsufficientDriver,), raising=False)
    monkeypatch.setattr(device_cuda, "find_gpu", lambda: HOST.gpu)
    with pytest.raises(
        BackendError, match=r"got 560\.35 \(CUDA 12\.6\); .*pip install \"cuda-python==12\.6\.\*\"$"
    ):
        device_cuda.CudaDevice(cuda)


def test_a_tensorrt_that_does_not_start_is_told_in_one_line(
    folder: Path, cuda: CudaOnHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorrt = backend_tensorrt.load_tensorrt("tensorrt")

    def refuse(logger: Any) -> None:
        logger.log(1, "CUDA initialization failure with error: 35")
        raise TypeError("factory function returned nullptr")

    monkeypatch.setattr(tensorrt.module, "Runtime", refuse)
    monkeypatch.setattr(backend_tensorrt, "load_tensorrt", lambda _: tensorrt)
    with pytest.raises(BackendError, match=r"tensorrt 10\.3\.0 to start .*\(CUDA init.* 35\); install"):
        Pipeline.from_bundle(folder, backend="tensorrt")
    assert (cuda.used_bytes, cuda.open_handles) == (0, 0)


def test_another_driver_is_told_beside_the_answer(
    folder: Path, cuda: CudaOnHost, capsys: pytest.CaptureFixture[str]
) -> None:
    (file,) = folder.glob("engines/*/engines.json")
    replace_bytes(file, file.read_bytes().replace(b"560.35", b"535.10"))
    assert main([str(folder), "--prompt", PROMPT, "--backend", "tensorrt", "--max-new-tokens", "1"]) == 0
    assert "trio-run: the engines were built with driver 535.10" in capsys.readouterr().err


# What is chosen, and what is told without a GPU


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tensorrt-rtx", "run trio-build"),
        ("onnxruntime-cuda", "CUDAExecutionProvider"),
        ("onnxruntime-tensorrt", "TensorrtExecutionProvider"),
        ("abacus", "expected one of auto, tensorrt"),
    ],
)
def test_without_a_gpu_a_backend_ends_in_one_line(
    name: str, message: str, reduced_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(reduced_bundle), "--prompt", PROMPT, "--backend", name]) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.err.count("\n") == 1


def test_engines_without_a_gpu_are_refused_in_one_line(
    folder: Path, cuda: CudaOnHost, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        backend_tensorrt, "find_host", lambda: Host(machine=HOST.machine, system=HOST.system, gpu=None)
    )
    assert main([str(folder), "--prompt", PROMPT, "--backend", "tensorrt"]) == 2
    error = capsys.readouterr().err
    assert "expected an NVIDIA GPU and its driver on this machine, got none" in error
    assert error.count("\n") == 1


def test_auto_takes_engines_where_a_gpu_runs_them(folder: Path, cuda: CudaOnHost) -> None:
    assert make_backend("auto", bundle=open_bundle(folder)).name == "tensorrt"


def test_auto_takes_onnxruntime_where_engines_do_not_fit_and_says_why(
    folder: Path, cuda: CudaOnHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Host(machine="aarch64", system="Linux", gpu=HOST.gpu)
    monkeypatch.setattr(backend_tensorrt, "find_host", lambda: other)
    bundle = open_bundle(folder)
    backend = make_backend("auto", bundle=bundle)
    assert backend.name == "onnxruntime"
    graphs = backend.load(bundle, ["head"])
    (note,) = graphs.notes
    assert note.startswith("engines are not used: ")
    graphs.close()


def test_auto_without_onnxruntime_says_what_the_engines_lack(
    reduced_bundle: Path, cuda: CudaOnHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a Jetson, where docs/jetson.md installs no ONNX Runtime."""
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    monkeypatch.setattr(module, "installed_backend", lambda: "tensorrt")
    with pytest.raises(BackendError, match=r"expected engines, got none; run trio-build"):
        Pipeline.from_bundle(reduced_bundle)


def test_auto_takes_the_cpu_without_a_gpu(folder: Path) -> None:
    assert make_backend("auto", bundle=open_bundle(folder)).name == "onnxruntime"


# The packages have what is called


def test_cuda_python_has_every_function_that_is_called() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    enums = (runtime.cudaError_t, runtime.cudaMemcpyKind, runtime.cudaStreamCaptureMode)
    known = {*dir(runtime), *(member.name for enum in enums for member in enum)}
    called = set(re.findall(r"cuda[A-Z]\w+", inspect.getsource(device_cuda)))
    assert len(called) > 25
    assert called <= known, called - known


def test_the_functions_of_the_pretended_cuda_take_what_the_real_ones_take() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    for name, method in inspect.getmembers(CudaOnHost, inspect.isfunction):
        if name.startswith("cuda"):
            first_line = getattr(runtime, name).__doc__.splitlines()[0]
            inside = first_line[first_line.index("(") + 1 : first_line.rindex(")")]
            wanted = [part.split(":")[0].split()[-1] for part in inside.split(",") if part.strip()]
            assert list(inspect.signature(method).parameters)[1:] == wanted, first_line


@pytest.mark.parametrize("package", ["tensorrt_rtx", "tensorrt"])
def test_tensorrt_has_every_name_that_is_used(package: str) -> None:
    module = pytest.importorskip(package, reason=f"needs pip install {package}; tensorrt_rtx is there in CI")
    has_strategy = package == "tensorrt_rtx"  # of kernels compiled on the device
    used = {
        module.IExecutionContext: _public(Context),
        module.ICudaEngine: _public(Engine)
        - {"compute"}
        - (set() if has_strategy else {"create_runtime_config"}),
        module.Runtime: {"deserialize_cuda_engine"},
        module.ExecutionContextAllocationStrategy: {"USER_MANAGED"},
        module.ILogger: {"ERROR", "log"},
    }
    if has_strategy:
        used[module.IRuntimeConfig] = {
            *_public(RuntimeConfig),
            "dynamic_shapes_kernel_specialization_strategy",
        }
        used[module.IRuntimeCache] = _public(RuntimeCache)
        used[module.DynamicShapesKernelSpecializationStrategy] = {"EAGER"}
    for real, names in used.items():
        assert names <= set(dir(real)), (real, names - set(dir(real)))


def _public(ours: type) -> set[str]:
    return {name for name in vars(ours) if not name.startswith("_")}


_STAGES = (Stage(layer=1, keep=14), Stage(layer=2, keep=6))
SHOWN: dict[str, dict[str, Any]] = {
    "images": {"schedule": Schedule(stages=_STAGES, budget="image"), "max_images": 3},
    "images before the decoder": {"token_method": "visionzip", "token_keep": 15, "max_images": 3},
    "a video": {
        "schedule": Schedule(stages=(Stage(layer=2, keep=7),), positions="preserved"),
        "max_frames": 6,
        "token_method": "evs",
        "token_keep": 5,
    },
}


@pytest.mark.parametrize("name", SHOWN)
def test_several_images_and_follow_ups_wait_where_they_must(
    name: str, checkpoint: Path, tmp_path: Path, cuda: CudaOnHost
) -> None:
    """The stream is lazy: an input that is overwritten too early, or read too early, changes the answer."""
    is_video = name == "a video"
    source = save_qwen3_vl_checkpoint(tmp_path / "ck") if is_video else checkpoint
    folder = export(source, tmp_path / "bundle", follow_ups=True, max_text=128, **SHOWN[name])
    write_engines(folder, host=HOST)
    pictures = [random_picture(60, 40, seed=seed) for seed in range(6)]
    asked = {"video": pictures, "source_fps": 2.0, "num_frames": 6} if is_video else {}
    answers = []
    for options in ({"backend": "onnxruntime"}, {"backend": "tensorrt", "keep_images": 2}):
        with Pipeline.from_bundle(folder, **options) as pipeline:  # type: ignore[arg-type]
            for prompt in (PROMPT, LONG_PROMPT, "w4", "w5"):
                shown = None if is_video else pictures[:2]
                found = pipeline.generate(shown, prompt, max_new_tokens=3, **asked)
                assert found.text is not None
                answers.append((found.token_ids, [kept.tolist() for kept in found.kept], found.first_logits))
            if "keep_images" in options:
                assert found.statistics.prefix_was_kept == (not is_video)
    for theirs, ours in zip(answers[:4], answers[4:]):
        assert ours[:2] == theirs[:2]
        np.testing.assert_array_equal(ours[2], theirs[2])
