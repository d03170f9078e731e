"""trio-profile on two small bundles: what it measures, what it writes, and that it changes no answer."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
import tensorrt_rtx

from tests.engine_bundles import copy_bundle
from trio_edge.profiling.cli import main
from trio_edge.profiling.measure import ceilings, measuring
from trio_edge.profiling.measure.answers import LoadedBundle, RunQuestion
from trio_edge.profiling.measure.layers import SLOWEST, layer_runs, layer_times
from trio_edge.profiling.measure.measuring import PROMPT, measured_sizes, random_image
from trio_edge.profiling.measure.recording import Recording, RecordingBackend
from trio_edge.profiling.report.profile import ProfileReport
from trio_edge.runtime.backends.registry import make_backend
from trio_edge.runtime.bundle.errors import DataError, ShapeError
from trio_edge.runtime.bundle.files import check_outputs, write_output
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.devices.host import HostDevice
from trio_edge.runtime.devices.interface import LoadedGraphs
from trio_edge.runtime.engines.package import EngineLayerTimes
from trio_edge.runtime.pipeline import Pipeline

RUNS, NEW_TOKENS, QUICK_ROUNDS = 6, 4, 2
STAGES = 2
ODD_NAME = "reduced <b>&amp; 'odd'"


class Profile(NamedTuple):
    """Output and files of one call of the command."""

    printed: str
    report: ProfileReport
    values: dict[str, Any]
    page: str


def measure_quickly(patch: pytest.MonkeyPatch) -> None:
    """Let ceilings be measured with little work; test_numbers.py measures them as they are."""
    patch.setattr(ceilings, "_SECONDS", 0.01)
    patch.setattr(ceilings, "_COPY_BYTES", 1 << 20)
    patch.setattr(ceilings, "_SIZES", {True: 64})
    patch.setattr(measuring, "_SIZE_RUNS", 2)
    patch.setattr(measuring, "ROUNDS", QUICK_ROUNDS)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    measure_quickly(monkeypatch)


@pytest.fixture(scope="module")
def profile(reduced_bundle: Path, keep_all_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """A profile of the reduced bundle, under a name that HTML must escape, and of the one that keeps all."""
    folder = tmp_path_factory.mktemp("profile")
    bundle = copy_bundle(reduced_bundle, folder / ODD_NAME)
    files = {kind: folder / f"profile.{kind}" for kind in ("json", "html")}
    options = [argument for kind, file in files.items() for argument in (f"--{kind}", str(file))]
    with pytest.MonkeyPatch.context() as patch, (folder / "printed").open("w") as printed:
        patch.setattr("sys.stdout", printed)
        measure_quickly(patch)
        settings = ["--threads", "1", "--runs", str(RUNS), "--new-tokens", str(NEW_TOKENS), "--warm-up", "0"]
        code = main([str(bundle), "--compare", str(keep_all_bundle), *settings, *options])
    assert code == 0
    content = files["json"].read_bytes()
    return Profile(
        printed=(folder / "printed").read_text(),
        report=msgspec.json.decode(content, type=ProfileReport),
        values=json.loads(content),
        page=files["html"].read_text(encoding="utf-8"),
    )


def test_every_graph_is_timed_in_prefill_and_the_ranges_and_the_head_in_decode(profile: Profile) -> None:
    reduced, full = profile.report.bundles
    prefill = [graph.name for graph in reduced.graphs if graph.phase == "prefill"]
    assert prefill == [
        "vision", "prefix", "select_1", "segment_1", "segment_1", "segment_1",
        "select_2", "suffix", "suffix", "suffix", "head", "head",
    ]  # fmt: skip
    probes = [graph.profile.partition("_")[0] for graph in reduced.graphs if graph.role == "select"]
    assert probes == ["prefill", "probe", "saliency", "prefill", "probe", "saliency", "gradient"]
    decode = {graph.name: graph.calls_per_answer for graph in reduced.graphs if graph.phase == "decode"}
    assert decode == dict.fromkeys(("prefix", "segment_1", "suffix", "head"), NEW_TOKENS - 1)
    assert [graph.name for graph in full.graphs] == ["vision", "prefix", "head", "prefix", "head"]
    assert all(graph.call_ms.count == RUNS * graph.calls_per_answer for graph in reduced.graphs)


def test_graphs_and_the_time_outside_of_them_make_up_the_first_token(profile: Profile) -> None:
    for bundle in profile.report.bundles:
        inside = sum(
            graph.call_ms.mean * graph.calls_per_answer for graph in bundle.graphs if graph.phase == "prefill"
        )
        assert inside + bundle.host_first_ms.mean == pytest.approx(bundle.ttft_ms.mean)
        assert bundle.host_first_ms.least > 0
        assert bundle.ttft_ms.mean + bundle.token_ms.mean * (NEW_TOKENS - 1) == pytest.approx(
            bundle.answer_ms.mean, rel=0.2
        )


def test_tokens_are_timed_from_a_question_without_an_image_to_the_end_of_the_caches(
    profile: Profile,
) -> None:
    for bundle in profile.report.bundles:
        manifest = open_bundle(bundle.bundle).manifest
        first, question, *_, last = bundle.decode
        assert len(bundle.decode) == 1 + measuring.POINTS
        assert first.context == first.cached_rows <= bundle.text_tokens
        assert question.context == bundle.visual_tokens + bundle.text_tokens
        end = manifest.max_visual + manifest.text_buckets[-1] + manifest.max_new_tokens
        assert last.context == end - 4  # the tokens of a round are the cache's last
        more = last.context - question.context
        assert last.cached_rows == pytest.approx(bundle.processed_tokens + bundle.text_tokens + more)
        assert all(step.ms.count == QUICK_ROUNDS for step in bundle.decode)
        assert bundle.decode_fit.interval_95 is None  # two rounds are too few
        assert bundle.decode_fit.words in profile.page
        assert f"│ {last.context} " in profile.printed


def test_contexts_are_timed_upwards_and_downwards_once_when_the_time_is_over(
    reduced_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "ROUNDS", 8)
    loaded = LoadedBundle(reduced_bundle, make_backend("onnxruntime", threads=1))
    skipped: list[int] = []
    counts: list[int] = []
    time_tokens = loaded.pipeline.time_tokens
    monkeypatch.setattr(
        Pipeline,
        "time_tokens",
        lambda _, count, *, skip=0: (
            counts.append(count),
            skipped.append(skip),
            time_tokens(count, skip=skip),
        )[-1],
    )
    question = RunQuestion(
        image=random_image(measured_sizes(loaded.pipeline)[0]), prompt=PROMPT, new_tokens=2
    )
    (timed,) = measuring.time_contexts([loaded], question, seconds=0.0)
    loaded.close()
    assert {len(one.milliseconds) for one in timed} == {2}
    assert counts[:3] == [12, 4, 12]  # after each prefill twelve are left out
    upwards, downwards = skipped[3 : 3 + measuring.POINTS], skipped[-measuring.POINTS :]
    assert all(skip >= 0 for skip in upwards[1:])
    assert downwards[0] > 0 and all(skip < 0 for skip in downwards[1:])


def test_timing_tokens_ends_an_answer_and_changes_no_later_one(reduced_bundle: Path) -> None:
    with Pipeline.from_bundle(reduced_bundle, backend="onnxruntime", threads=1) as pipeline:
        manifest, image = pipeline.manifest, random_image(measured_sizes(pipeline)[0])
        before = pipeline.generate(image, PROMPT, max_new_tokens=8)
        assert before.text is not None
        asked = pipeline.generate(image, PROMPT)
        next(iter(asked))
        room = manifest.text_buckets[-1] + manifest.max_new_tokens - asked.statistics.text_tokens
        assert len(pipeline.time_tokens(3, skip=room - 4)) == 3
        with pytest.raises(
            ShapeError, match="expected to skip at most 1 rows, the rest of the KV caches, got 2"
        ):
            pipeline.time_tokens(1, skip=2)
        pipeline.time_tokens(2, skip=-room + 3)
        with pytest.raises(ShapeError, match="another was started"):
            assert asked.text
        after = pipeline.generate(image, PROMPT, max_new_tokens=8)
        assert after.text == before.text
        assert after.token_ids == before.token_ids
        np.testing.assert_array_equal(after.first_logits, before.first_logits)


def test_rates_are_work_over_time_and_verdicts_name_a_ceiling(profile: Profile) -> None:
    for graph in profile.report.bundles[0].graphs:
        assert graph.flops_per_s == pytest.approx(1e3 * graph.flops / graph.call_ms.p50)
        assert graph.bytes_per_s == pytest.approx(1e3 * graph.moved_bytes / graph.call_ms.p50)
        assert "of bandwidth" in graph.verdict or "of the matmul rate" in graph.verdict


def test_memory_is_told_apart_by_what_it_is_for(profile: Profile, reduced_bundle: Path) -> None:
    manifest, memory = open_bundle(reduced_bundle).manifest, profile.report.bundles[0].memory
    assert memory.weights == sum(graph.weight_bytes for graph in manifest.graphs)
    assert memory.kv_allocated == manifest.kv_bytes
    assert 0 < memory.kv_used < memory.kv_allocated
    known = memory.weights + memory.kv_allocated + memory.buffers + memory.workspace
    assert memory.other == memory.peak_rss - known


def test_first_tokens_are_measured_at_every_size_of_image_most_tokens_first(profile: Profile) -> None:
    tokens = [size.visual_tokens for size in profile.report.bundles[0].sizes]
    assert len(tokens) > 1
    assert tokens == sorted(set(tokens), reverse=True)
    assert tokens[0] == profile.report.bundles[0].visual_tokens


def test_layers_are_told_apart_by_graph_phase_and_operator(profile: Profile) -> None:
    bundle = profile.report.bundles[0]
    assert {layer.graph for layer in bundle.layers} == {graph.name for graph in bundle.graphs}
    suffix = [layer for layer in bundle.layers if (layer.graph, layer.phase) == ("suffix", "decode")]
    assert len(suffix) == SLOWEST
    assert all(layer.calls_per_answer == NEW_TOKENS - 1 for layer in suffix)
    assert any(layer.shapes.startswith("float[1,") for layer in suffix)
    products = [one for one in bundle.operators if one.kind.endswith(("MatMul", "Gemm"))]
    assert {one.graph for one in products} == {graph.name for graph in bundle.graphs}


def test_comparison_has_paired_ratios_and_sizes(profile: Profile) -> None:
    (comparison,) = profile.report.comparisons
    assert comparison.reference == ODD_NAME
    assert set(comparison.ratios) == {"ttft_ms", "prefill_ms", "answer_ms", "token_ms"}
    for ratio in comparison.ratios.values():
        assert ratio.rounds == RUNS
        assert ratio.interval_95[0] <= ratio.value <= ratio.interval_95[1]
    assert comparison.sizes["kv_used"] > 1
    assert comparison.sizes["processed_tokens"] > 2


def test_the_terminal_shows_bundles_graphs_and_what_is_missing(profile: Profile) -> None:
    assert ODD_NAME in profile.printed
    for name in ("segment_1", "select_2", "decode", "memory MB", "slowest layers", "roofline"):
        assert name in profile.printed
    for line in profile.report.conditions.missing:
        assert f"not measured: {line}" in profile.printed
    assert [line for bundle in profile.report.bundles for line in bundle.advice] == [
        line.removeprefix("what to change ")
        for line in profile.printed.splitlines()
        if line.startswith("what to change ")
    ]


def test_recording_changes_neither_logits_nor_ids_nor_kept_tokens(reduced_bundle: Path) -> None:
    backend = make_backend("onnxruntime", threads=1)
    uncaptured = RecordingBackend(backend, capture=False)
    answers = []
    for wrapped in (backend, RecordingBackend(backend), uncaptured):
        with Pipeline(open_bundle(reduced_bundle), wrapped) as pipeline:
            image = random_image(measured_sizes(pipeline)[0])
            answer = pipeline.generate(image, PROMPT, max_new_tokens=8)
            assert answer.text is not None
            answers.append(answer)
    plain, *recorded = answers
    for answer in recorded:
        assert answer.token_ids == plain.token_ids
        np.testing.assert_array_equal(answer.first_logits, plain.first_logits)
        for ours, theirs in zip(answer.kept, plain.kept, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert uncaptured.recording.take()


class _Counted:
    """A launch that counts itself."""

    capturable, count = False, 0

    def enqueue(self) -> None:
        self.count += 1


def test_launches_on_the_host_run_once_and_are_timed_in_their_order() -> None:
    counted = _Counted()
    recording = Recording(LoadedGraphs(device=HostDevice(), engines={}, memory={}))
    first = recording.timed(counted, ("prefix", "decode"), capture=False)
    second = recording.timed(counted, ("head", "decode"), capture=False)
    second.enqueue()
    first.enqueue()
    calls = recording.take()
    assert [(call.graph, call.profile) for call in calls] == [("head", "decode"), ("prefix", "decode")]
    assert (counted.count, recording.take()) == (2, [])
    assert calls[0].start < calls[0].end <= calls[1].start < calls[1].end


def test_calls_are_what_the_decoders_own_timeline_says(reduced_bundle: Path) -> None:
    loaded = LoadedBundle(reduced_bundle, make_backend("onnxruntime", threads=1))
    image = random_image(measured_sizes(loaded.pipeline)[0])
    answer = loaded.answer(RunQuestion(image=image, prompt=PROMPT, new_tokens=3))
    loaded.close()
    told, inside = answer.statistics.graph_ms, dict[str, float]()
    of_probe = 0.0  # the timeline counts a probe as part of its selection
    for call in (call for call in answer.calls if call.profile != "decode"):
        if call.profile.startswith(("probe", "gradient", "saliency")):
            of_probe += call.milliseconds
        else:
            inside[call.graph], of_probe, last = call.milliseconds + of_probe, 0.0, call
    assert inside.keys() == told.keys()
    assert all(inside[graph] <= milliseconds for graph, milliseconds in told.items())
    assert sum(told.values()) <= 1e3 * (last.end - answer.calls[0].start) + 5.0
    assert len(answer.token_ids) == 3


def test_no_token_ends_an_answer_while_it_is_measured(reduced_bundle: Path) -> None:
    with Pipeline.from_bundle(reduced_bundle, backend="onnxruntime", threads=1) as pipeline:
        image = random_image(measured_sizes(pipeline)[0])
        answer = pipeline.generate(image, PROMPT, max_new_tokens=6)
        assert answer.text is not None
    loaded = LoadedBundle(reduced_bundle, make_backend("onnxruntime", threads=1))
    measured = loaded.answer(RunQuestion(image=image, prompt=PROMPT, new_tokens=6))
    loaded.close()
    assert len(measured.token_ids) == 6
    assert measured.token_ids[: len(answer.token_ids)] == answer.token_ids


def test_runs_end_when_the_time_is_over_but_not_before_there_are_a_few(
    keep_all_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "NARROW", 0.0)
    file = tmp_path / "profile.json"
    arguments = [
        str(keep_all_bundle),
        "--no-layers",
        "--seconds",
        "0.001",
        "--threads",
        "1",
        "--new-tokens",
        "1",
        "--json",
        str(file),
    ]
    assert main(arguments) == 0
    report = msgspec.json.decode(file.read_bytes(), type=ProfileReport)
    assert (report.conditions.runs, report.conditions.stopped) == (measuring.LEAST_RUNS, "0 s were over")
    assert report.bundles[0].token_ms is None
    assert (report.bundles[0].decode, report.bundles[0].decode_fit) == ((), None)
    assert report.bundles[0].layers == ()


def test_an_image_of_the_users_is_asked_about(keep_all_bundle: Path, tmp_path: Path) -> None:
    file, image = tmp_path / "profile.json", Path(__file__).parents[2] / "examples/pictures/shapes-96x96.png"
    options = ["--image", str(image), "--prompt", "w1 w2", "--runs", "1", "--no-layers", "--json", str(file)]
    assert main([str(keep_all_bundle), *options]) == 0
    conditions = json.loads(file.read_bytes())["conditions"]
    assert (conditions["image"], conditions["prompt"]) == (image.name, "w1 w2")


@pytest.mark.parametrize("option", ["--json", "--html"])
def test_an_output_that_cannot_be_written_is_told_before_anything_is_measured(
    option: str,
    keep_all_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("trio_edge.profiling.cli.measure", None)
    for path in (tmp_path, tmp_path / "none" / "file"):
        assert main([str(keep_all_bundle), option, str(path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"trio-profile: {option}: expected a file in an existing folder, got {path}")
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_no_file_is_refused_and_stays_what_it_is(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    (link := tmp_path / "link").symlink_to(pipe)
    (loop := tmp_path / "loop").symlink_to(loop)
    for path in (pipe, link, loop):
        with pytest.raises(DataError, match=r"--json: expected a regular file, got .*; choose another name"):
            check_outputs({"--json": path})
    assert pipe.is_fifo()


def test_an_output_that_is_a_link_leaves_it_one(tmp_path: Path) -> None:
    (file := tmp_path / "file").write_bytes(b"old")
    (link := tmp_path / "link").symlink_to(file)
    check_outputs({"--json": link})
    write_output("--json", link, b"new")
    assert (link.is_symlink(), file.read_bytes()) == (True, b"new")
    assert sorted(tmp_path.iterdir()) == [file, link]


def test_two_outputs_cannot_be_one_file(
    keep_all_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "file")
    assert main([str(keep_all_bundle), "--json", path, "--html", path]) == 2
    assert "--html: expected another file than --json's" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_bundle_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"trio-profile: {tmp_path}: expected trio.json, got none")


@pytest.mark.parametrize("seconds", ["nan", "inf", "0"])
def test_a_limit_that_is_no_time_is_refused(
    seconds: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path), "--seconds", seconds]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--seconds" in line


def test_more_tokens_than_a_bundle_has_room_for_are_refused_before_anything_is_measured(
    keep_all_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measuring, "open_sensors", None)
    assert main([str(keep_all_bundle), "--new-tokens", "41"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"trio-profile: --new-tokens: expected at most 40, the room of {keep_all_bundle}, got 41;"
    )


def test_an_empty_prompt_is_asked_as_it_is(keep_all_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    options = ["--prompt", "", "--runs", "1", "--no-layers", "--new-tokens", "1", "--json", str(file)]
    assert main([str(keep_all_bundle), *options]) == 0
    assert json.loads(file.read_bytes())["conditions"]["prompt"] == ""


def test_a_question_that_a_bundle_has_no_room_for_names_the_bundle(
    keep_all_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(keep_all_bundle), "--prompt", "w1 " * 100, "--no-layers"]) == 2
    error = capsys.readouterr().err
    assert f"trio-profile: {keep_all_bundle}: prompt: expected at most 64 text tokens" in error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_leaves_no_file_and_closes_the_graphs(
    number: signal.Signals,
    keep_all_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    closed = []
    monkeypatch.setattr(LoadedBundle, "answer", lambda *_: signal.raise_signal(number))
    monkeypatch.setattr(Pipeline, "close", lambda pipeline: closed.append(pipeline))
    assert main([str(keep_all_bundle), "--json", str(tmp_path / "profile.json")]) == 130
    assert capsys.readouterr().err.strip().endswith("trio-profile: interrupted")
    assert list(tmp_path.iterdir()) == []
    assert len(closed) == 1


def test_a_file_that_cannot_be_finished_leaves_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    write_output("--json", file, b"old")
    with pytest.raises(TypeError, match="bytes-like"):
        write_output("--json", file, None)  # type: ignore[arg-type]
    assert file.read_bytes() == b"old"
    shutil.rmtree(tmp_path)
    with pytest.raises(DataError, match=r"--json .*: cannot be written \(No such file or directory\)"):
        write_output("--json", file, b"new")


class _FakeEngine:
    """Gives an inspector's list, as TensorRT writes it for an engine with detailed layers; engines need a GPU."""

    LAYERS = (
        {
            "Name": "matmul",
            "LayerType": "gemm",
            "Inputs": [{"Format/Datatype": "Half", "Dimensions": [1, 8]}],
        },
        "an engine without details lists names",
    )

    def create_engine_inspector(self) -> _FakeEngine:
        return self

    def get_engine_information(self, _: object) -> str:
        return json.dumps({"Layers": self.LAYERS})


class _Context:
    profiler: Any = None


def test_tensorrts_profiler_and_inspector_become_layers(tmp_path: Path) -> None:
    times, context = EngineLayerTimes(tensorrt_rtx, _FakeEngine(), tmp_path / "suffix.json"), _Context()
    times.attach(context)
    assert isinstance(context.profiler, tensorrt_rtx.IProfiler)
    for milliseconds in (2.0, 0.25, 0.75):
        context.profiler.report_layer_time("matmul", milliseconds)
        context.profiler.report_layer_time("softmax", 1.0)
        times.end_run()
    times.write()
    runs = layer_runs(json.loads((tmp_path / "suffix.json").read_bytes()))
    found = layer_times(runs, graph="suffix", profiles=["prefill_64", "decode", "decode"], num_answers=1)
    assert [(layer.phase, layer.name, layer.kind, layer.answer_ms) for layer in found] == [
        ("prefill", "matmul", "gemm", 2.0),
        ("prefill", "softmax", "", 1.0),
        ("decode", "matmul", "gemm", 1.0),
        ("decode", "softmax", "", 2.0),
    ]
    assert found[0].shapes == "Half[1, 8]"
