"""``trio-check``: the packaged model's bundle answers as stored, and whatever differs, crashes or grows is told in one line."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from tests import tolerances
from tests.bundles import export
from tests.cuda_on_host import CudaOnHost, pretend_gpu, write_engines
from tests.engine_bundles import HOST, copy_bundle
from tests.schedules import schedule_for
from trio_edge.export.checkpoints.checkpoint import TINY_FOLDER
from trio_edge.profiling.check import answers, checks
from trio_edge.profiling.check.answers import close_difference, exact_difference
from trio_edge.profiling.check.checks import WorkerJob, judge_growth, run_backend, run_worker
from trio_edge.profiling.check.cli import main
from trio_edge.runtime.bundle.errors import install_command
from trio_edge.runtime.bundle.reader import sha256_of

if TYPE_CHECKING:
    from trio_edge.profiling.check.answers import AnswerRecord

WEIGHTS = Path("weights", "model.safetensors")


@pytest.fixture(scope="module")
def bundle() -> Path:
    """The packaged model as ``make wheel`` exports it."""
    schedule = schedule_for(0.111, num_layers=16, num_visual=192)  # trio-export's default
    return export("tiny", dtype="float16", schedule=schedule, max_text=64, max_new_tokens=16)


@pytest.fixture
def release(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that holds the bundle's graphs."""
    graphs = shutil.copytree(bundle, tmp_path / "graphs", ignore=shutil.ignore_patterns("weights"))
    monkeypatch.setattr(answers, "GRAPHS", graphs)
    return graphs


def test_the_packaged_bundles_weights_are_the_checkpoints_and_all_is_below_12_megabytes(bundle: Path) -> None:
    checkpoint = TINY_FOLDER / "model.safetensors"
    assert sha256_of(bundle / WEIGHTS) == sha256_of(checkpoint)
    packaged_files = [path for folder in (bundle, TINY_FOLDER) for path in folder.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in packaged_files) < 12_000_000


@pytest.mark.usefixtures("release")
def test_every_backend_that_is_here_answers_as_stored(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    statuses = {(one["backend"], one["check"]): one["status"] for one in report["checks"]}
    assert report["passed"]
    assert statuses["onnxruntime", "answers"] == statuses["onnxruntime", "load and close"] == "pass"
    assert {status for (backend, _), status in statuses.items() if backend != "onnxruntime"} <= {
        "not here",
        "pass",
    }
    assert report["versions"]["trio-edge"]
    assert {"power_mode", "available_bytes", "machine", "l4t"} <= report.keys()


@pytest.mark.usefixtures("release")
def test_another_answer_than_stored_fails_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = answers.stored_answers()
    stored[1].kept[2][0] += 1
    changed = tmp_path / "expected.json"
    changed.write_bytes(msgspec.json.encode(stored))
    monkeypatch.setattr(answers, "EXPECTED", changed)
    assert main([]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fail")]
    assert len(failed) == 1
    assert failed[0].endswith("'what color is the square ?': stage 3 keeps 3 of the 4 expected tokens")


def test_a_clone_exports_the_graphs_that_only_wheels_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(answers, "GRAPHS", tmp_path / "none")
    assert main([]) == 0
    assert "pass      onnxruntime, answers              3 questions" in capsys.readouterr().out


def test_a_clone_without_torch_says_what_to_install_before_any_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "transformers.py").write_text("raise ModuleNotFoundError(name='torch')")
    monkeypatch.setitem(answers.SAFE_ENVIRONMENT, "PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(answers, "GRAPHS", tmp_path / "none")
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"got no torch; {install_command('export')}; or name a bundle with --bundle" in captured.err


def test_a_bundle_of_the_users_is_checked_without_stored_results(
    reduced_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--bundle", str(reduced_bundle)]) == 0
    assert "pass      onnxruntime, answers              1 question;" in capsys.readouterr().out
    assert not (reduced_bundle / "engines").exists()


def test_a_process_that_is_killed_fails_its_backend_alone(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crashing = tmp_path / "python"
    crashing.write_text("#!/bin/sh\necho out of memory\nkill -9 $$\n")
    crashing.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(crashing))
    job = WorkerJob(bundle=str(bundle), backend="onnxruntime", questions=[], build=False)
    found = run_backend(job, tmp_path)
    assert [(one.check, one.status) for one in found] == [("answers", "fail")]
    assert found[0].text == "its process was ended by signal 9: out of memory"


@pytest.fixture
def on_gpu(
    reduced_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[WorkerJob, CudaOnHost]:
    """A bundle with engines and a GPU that is none (tests/cuda_on_host.py)."""
    folder = copy_bundle(reduced_bundle, tmp_path / "bundle")
    write_engines(folder, host=HOST)
    cuda = CudaOnHost()
    pretend_gpu(monkeypatch, cuda, HOST)
    monkeypatch.setattr(checks, "load_cuda", lambda: cuda)
    monkeypatch.setattr(checks, "cuda_problem", lambda: None)
    monkeypatch.setattr(checks, "find_host", lambda: HOST)
    from trio_edge.runtime.backends import tensorrt

    monkeypatch.setattr(checks, "load_tensorrt", tensorrt.load_tensorrt)
    return WorkerJob(bundle=str(folder), backend="tensorrt", questions=[], build=False, cycles=2), cuda


def test_engines_answer_with_and_without_a_cuda_graph_and_release_their_memory(
    on_gpu: tuple[WorkerJob, CudaOnHost],
) -> None:
    job, cuda = on_gpu
    replayed, texts = {}, {}
    for result in run_worker(job):
        replayed[result.check] = sum(call[0] == "cudaGraphLaunch" for call in cuda.calls)
        cuda.calls.clear()
        texts[result.check] = result.text
        assert result.status == "pass"
    assert list(texts) == ["answers", "CUDA graph", "load and close"]
    # the first token needs no step, the first step runs plainly
    assert replayed["answers"] == answers.NEW_TOKENS - 2
    assert replayed["CUDA graph"] == 0
    assert "GPU +0.0 MB" in texts["load and close"]


def test_engines_that_are_not_there_are_told(on_gpu: tuple[WorkerJob, CudaOnHost]) -> None:
    job, _ = on_gpu
    shutil.rmtree(Path(job.bundle) / "engines")
    (result,) = run_worker(job)
    assert (result.check, result.status) == ("answers", "not here")
    assert "trio-build" in result.text


def changed(record: AnswerRecord, **fields: Any) -> AnswerRecord:
    return msgspec.structs.replace(record, **fields)


def test_what_differs_is_named() -> None:
    one = answers.stored_answers()[0]
    assert exact_difference(one, one) is None
    assert "1.0" not in str(
        exact_difference(changed(one, logits=[value + 0.04 for value in one.logits]), one)
    )
    assert "a logit differs by 2" in str(
        exact_difference(changed(one, logits=[one.logits[0] + 2, *one.logits[1:]]), one)
    )
    assert "the answer is 'no'" in str(exact_difference(changed(one, ids=[1], text="no"), one))
    assert "2 stages for 3" in str(exact_difference(changed(one, kept=one.kept[:2]), one))
    assert close_difference(changed(one, ids=[1]), one) is None
    assert "nats" in str(close_difference(changed(one, logits=one.logits[::-1]), one))
    nan = changed(one, logits=[float("nan")] * len(one.logits))
    assert exact_difference(nan, one) is not None
    assert close_difference(nan, one) is not None


def test_memory_that_grows_fails() -> None:
    verdict = judge_growth({"host": 40_000_000, "GPU": 0})
    assert verdict == ("fail", "host +40.0 MB, GPU +0.0 MB after repeated loads (32 allowed)")


class Rounds:
    """Stands for ``answer``: each round takes a second of the pretended clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, changes_in: int = 0, growth: int = 0) -> None:
        self.number, self.changes_in, self.growth = -1, changes_in, growth
        monkeypatch.setattr(checks, "answer", self)
        monkeypatch.setattr(checks, "memory_in_use", lambda: {"host": 10**8 + self.growth * self.number})
        monkeypatch.setattr(checks.time, "perf_counter", lambda: float(max(self.number, 0)))

    def __call__(self, *_: object) -> list[AnswerRecord]:
        self.number += 1
        stored = answers.stored_answers()
        changed = msgspec.structs.replace(stored[0], ids=[0])
        return [changed, *stored[1:]] if self.number == self.changes_in else stored


@pytest.mark.parametrize(
    ("changes_in", "growth", "status", "told"),
    [
        (0, 0, "pass", "3000 answers, 0 changed; .*; host [+-]0.00 MB an hour"),
        (700, 0, "fail", "3000 answers, 1 changed"),
        (0, 10_000, "pass", r"host \+36.00 MB an hour"),
        (0, 40_000, "fail", r"host \+144.00 MB an hour \(32 MB in all allowed\)"),
    ],
    ids=["nothing", "an answer", "a little", "memory"],
)
def test_hours_tell_changed_answers_and_memory_that_grows(
    monkeypatch: pytest.MonkeyPatch, changes_in: int, growth: int, status: str, told: str
) -> None:
    Rounds(monkeypatch, changes_in=changes_in or -1, growth=growth)
    pipeline: Any = None
    verdict, text = checks.judge_hours(pipeline, answers.QUESTIONS, seconds=1000.0)
    assert verdict == status, text
    assert re.search(told, text), text


def test_hours_come_last_and_repeat_the_answers(bundle: Path) -> None:
    job = WorkerJob(
        bundle=str(bundle),
        backend=checks.CPU,
        questions=list(answers.QUESTIONS),
        build=False,
        cycles=1,
        seconds=0.01,
    )
    *_, last = run_worker(job)
    assert (last.check, last.status) == ("hours", "pass"), last.text
    assert "0 changed" in last.text


def test_the_tolerances_are_those_of_the_table() -> None:
    assert {"rtol": answers.LOGITS_RTOL, "atol": answers.LOGITS_ATOL} == tolerances.LOGITS_FLOAT16
