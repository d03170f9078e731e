"""Graphs prepared for the CPU, the accuracy of INT4 products there, and what a command line imports."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest

from tests.bundles import export
from tests.pictures import random_picture
from tests.tolerances import LOGITS_FLOAT32
from trio_edge.export.quantize.plan import parse_plan
from trio_edge.runtime.bundle.errors import BackendError
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.runtime.cli import build as cli_build
from trio_edge.runtime.engines import cpu
from trio_edge.runtime.engines.cpu import CPU_TARGET, onnxruntime_version, open_prepared, prepare_graphs
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

STAGES = Schedule(stages=(Stage(layer=1, keep=14), Stage(layer=2, keep=6)))
PICTURE, PROMPT = random_picture(48, 48), "w1 w2 w3"


@pytest.fixture
def bundle(reduced_bundle: Path, tmp_path: Path) -> Path:
    """A bundle with prepared graphs that a test may break."""
    copy = shutil.copytree(reduced_bundle, tmp_path / "bundle")
    prepare_graphs(open_bundle(copy))
    return copy


@pytest.fixture(scope="module")
def int4_bundle(checkpoint: Path) -> Path:
    """The shared checkpoint with everything in INT4. No test may change it."""
    return export(checkpoint, schedule=STAGES, quantize=parse_plan("all=int4"))


def _answer(folder: Path, **settings: Any) -> tuple[tuple[int, ...], NDArray[np.float32], tuple[str, ...]]:
    """Return the answer's tokens, its first logits, and the notes."""
    with Pipeline.from_bundle(folder, backend="onnxruntime", **settings) as pipeline:
        answer = pipeline.generate(PICTURE, PROMPT, max_new_tokens=8)
        assert answer.text  # runs it
        return tuple(answer.token_ids), answer.first_logits, tuple(pipeline.notes)


def _graphs_json(bundle: Path) -> Path:
    return bundle / "engines" / CPU_TARGET / "graphs.json"


def _changed(bundle: Path, **values: Any) -> None:
    file = _graphs_json(bundle)
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_prepared_graphs_give_the_same_answer(bundle: Path, reduced_bundle: Path) -> None:
    tokens, logits, notes = _answer(bundle)
    expected_tokens, expected_logits, _ = _answer(reduced_bundle)
    assert tokens == expected_tokens
    np.testing.assert_allclose(logits, expected_logits, **LOGITS_FLOAT32)
    assert notes == ()


def test_prepared_int4_graphs_give_the_same_answer(int4_bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(int4_bundle, tmp_path / "bundle")
    prepare_graphs(open_bundle(copy))
    tokens, logits, notes = _answer(copy)
    expected_tokens, expected_logits, _ = _answer(int4_bundle)
    assert (tokens, notes) == (expected_tokens, ())
    np.testing.assert_allclose(logits, expected_logits, **LOGITS_FLOAT32)


def test_all_graphs_but_selections_and_probes_are_prepared_and_read_from_there(bundle: Path) -> None:
    opened = open_bundle(bundle)
    prepared = open_prepared(opened, accuracy="auto")
    assert prepared.files.keys() == {
        "vision", "prefix", "segment_1.layers", "suffix.layers", "head.logits",
    }  # fmt: skip
    assert all(file.is_relative_to(bundle / "engines" / CPU_TARGET) for file in prepared.files.values())
    prepared.files["head.logits"].unlink()
    with pytest.raises(BackendError, match=r"head\.logits\.onnx: expected this file"):
        Pipeline.from_bundle(bundle, backend="onnxruntime")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"onnxruntime_version": "1.0.0"}, "expected onnxruntime_version"),
        ({"processor": "abacus"}, "expected processor"),
        ({"manifest_sha256": "0"}, "expected manifest_sha256"),
        ({"schema_version": 99}, "expected schema_version"),
        ({"cpu_accuracy": "int8"}, "expected cpu_accuracy"),
        ({"graphs": 7}, "Expected"),
        ({"more": 7}, "unknown field"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_prepared_graphs_that_do_not_fit_are_left_alone_with_a_note(
    bundle: Path, reduced_bundle: Path, values: dict[str, Any], reason: str
) -> None:
    _changed(bundle, **values)
    tokens, _, (note,) = _answer(bundle)
    assert tokens == _answer(reduced_bundle)[0]
    assert note.startswith("prepared graphs are not used")
    assert reason in note
    assert ("trio-build" in note) == ("cpu_accuracy" not in values)


def test_a_changed_file_is_refused(bundle: Path) -> None:
    file = bundle / "engines" / CPU_TARGET / "prefix.onnx"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(BackendError, match=r"prefix\.onnx: expected SHA-256"):
        Pipeline.from_bundle(bundle, backend="onnxruntime")


def test_a_file_outside_the_folder_is_refused(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.onnx").write_bytes(b"x")
    graphs = json.loads(_graphs_json(bundle).read_text())["graphs"]
    graphs["prefix"][0]["file"] = "../../../elsewhere.onnx"
    _changed(bundle, graphs=graphs)
    with pytest.raises(BackendError, match="inside the bundle"):
        Pipeline.from_bundle(bundle, backend="onnxruntime")


@pytest.mark.skipif(
    tuple(map(int, ort.__version__.split(".")[:2])) < (1, 24),
    reason="onnxruntime 1.23, the last one for Python 3.10, follows such paths; runs on Python 3.11 and later",
)
def test_weights_outside_the_folder_are_refused(bundle: Path, tmp_path: Path) -> None:
    folder = bundle / "engines" / CPU_TARGET
    shutil.copy(folder / "prefix.data", tmp_path / "elsewhere.data")
    model = onnx.load(folder / "prefix.onnx", load_external_data=False)
    for initializer in model.graph.initializer:
        for entry in initializer.external_data:
            if entry.key == "location":
                entry.value = "../../../elsewhere.data"
    onnx.save(model, folder / "prefix.onnx")
    graphs = json.loads(_graphs_json(bundle).read_text())["graphs"]
    written = (folder / "prefix.onnx").read_bytes()
    graphs["prefix"][0] |= {"num_bytes": len(written), "sha256": hashlib.sha256(written).hexdigest()}
    _changed(bundle, graphs=graphs)
    with pytest.raises(BackendError, match=r"prefix\.onnx: expected a graph that onnxruntime"):
        Pipeline.from_bundle(bundle, backend="onnxruntime")


@pytest.mark.parametrize(
    "files", [[], [{"file": "a\0b", "num_bytes": 1, "sha256": ""}]], ids=["none", "odd name"]
)
def test_a_graph_with_other_files_is_refused(bundle: Path, files: list[dict[str, Any]]) -> None:
    graphs = json.loads(_graphs_json(bundle).read_text())["graphs"]
    _changed(bundle, graphs={**graphs, "prefix": files})
    with pytest.raises(BackendError, match=r"expected prefix\.onnx and its data inside the bundle"):
        Pipeline.from_bundle(bundle, backend="onnxruntime")


def test_an_interrupted_preparation_leaves_nothing(
    reduced_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(reduced_bundle, tmp_path / "bundle")
    opened = open_bundle(copy)

    def interrupt(spec: Any) -> None:
        if spec.name == "suffix.layers":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_graphs(opened, started=interrupt)
    assert not (copy / "engines").exists()


def test_trio_build_prepares_once_and_again_with_force(
    reduced_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = str(shutil.copytree(reduced_bundle, tmp_path / "bundle"))
    command = [copy, "--backend", "onnxruntime"]
    assert cli_build.main(command) == 0
    captured = capsys.readouterr()
    assert "graphs for this CPU" in captured.out
    assert "suffix.layers: " in captured.err
    assert cli_build.main(command) == 2
    assert "add --force" in capsys.readouterr().err
    assert cli_build.main([*command, "--force", "--quiet"]) == 0


@pytest.mark.parametrize("option", [["--dry-run"], ["--split-lm-head", "4"], ["--graphs", "head"]], ids=str)
def test_options_of_tensorrt_are_refused_for_the_cpu(
    option: list[str], reduced_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli_build.main([str(reduced_bundle), "--backend", "onnxruntime", *option]) == 2
    assert f"{option[0]}: expected --backend tensorrt or tensorrt-rtx" in capsys.readouterr().err


def test_small_graphs_are_computed_in_float32_and_rounded_inputs_change_little(int4_bundle: Path) -> None:
    logits = {accuracy: _answer(int4_bundle, cpu_accuracy=accuracy)[1] for accuracy in ("auto", "float32")}
    np.testing.assert_array_equal(logits["auto"], logits["float32"])
    rounded = _answer(int4_bundle, cpu_accuracy="int8")[1]
    assert np.abs(rounded - logits["float32"]).max() < 0.1 * np.abs(logits["float32"]).max()


def test_large_graphs_round_their_inputs(int4_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "LARGE_GRAPH_BYTES", 0)
    automatic, rounded = (_answer(int4_bundle, cpu_accuracy=accuracy)[1] for accuracy in ("auto", "int8"))
    np.testing.assert_array_equal(automatic, rounded)
    assert (rounded != _answer(int4_bundle, cpu_accuracy="float32")[1]).any()


@pytest.mark.skipif(
    onnxruntime_version() < (1, 24),
    reason="onnxruntime 1.23, the last one for Python 3.10, cannot run pieces without elements; runs on 3.11 and later",
)
def test_a_large_quantized_layer_and_its_probe_are_one_session(
    int4_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two would each pack the layer's weights."""
    opened = open_bundle(int4_bundle)
    segment = opened.manifest.graph("segment_1")
    assert len(cpu.sessions_of(opened, segment)) == 2
    pieces = _answer(int4_bundle, cpu_accuracy="float32")
    monkeypatch.setattr(cpu, "LARGE_GRAPH_BYTES", 0)
    assert cpu.sessions_of(opened, segment) == (segment,)
    whole = _answer(int4_bundle, cpu_accuracy="float32")
    assert whole[0] == pieces[0]
    np.testing.assert_allclose(whole[1], pieces[1], **LOGITS_FLOAT32)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_large_graphs_need_no_copies_of_their_weights(
    dtype: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prepared, those in float16 are in float32 once; the answer is that of graphs with packed weights."""
    copy = export(checkpoint, tmp_path / "bundle", schedule=STAGES, dtype=dtype)
    packed = _answer(copy)
    monkeypatch.setattr(cpu, "LARGE_GRAPH_BYTES", 0)
    opened = open_bundle(copy)
    folder = prepare_graphs(opened)
    tokens, logits, notes = _answer(copy)
    assert (tokens, notes) == (packed[0], ())
    np.testing.assert_allclose(logits, packed[1], **LOGITS_FLOAT32)
    written = sum(file.stat().st_size for file in folder.glob("suffix.layers.data"))
    assert written < 2.2 * opened.manifest.graph("suffix").weight_bytes
    assert (written > 0) == (dtype == "float16")


@pytest.mark.parametrize(("release", "spins"), [((1, 25), "0"), ((1, 26), "1")], ids=str)
def test_threads_spin_only_where_a_release_limits_it(
    release: tuple[int, int], spins: str, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, real = [], ort.SessionOptions
    monkeypatch.setattr(ort, "SessionOptions", lambda: made.append(real()) or made[-1])
    monkeypatch.setattr(cpu, "onnxruntime_version", lambda: release)
    with Pipeline.from_bundle(bundle, backend="onnxruntime", threads=1):
        assert made
    for options in made:
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == spins
        assert int(options.get_session_config_entry("session.intra_op.spin_duration_us")) > 0


def test_an_unknown_accuracy_is_refused(reduced_bundle: Path) -> None:
    with pytest.raises(BackendError, match="cpu_accuracy: expected one of auto, float32, int8"):
        Pipeline.from_bundle(reduced_bundle, cpu_accuracy="int2")  # type: ignore[arg-type]


def test_the_manifest_of_prepared_graphs_is_strict_json(bundle: Path) -> None:
    found = msgspec.json.decode(_graphs_json(bundle).read_bytes(), type=cpu.PreparedGraphs)
    assert found.processor == cpu.processor_key()


def test_help_imports_neither_numpy_nor_jinja() -> None:
    code = (
        "import sys; from trio_edge.runtime.cli import run; import trio_edge.runtime as r; dir(r)\n"
        "slow = {'numpy', 'jinja2', 'PIL', 'tokenizers', 'onnxruntime'} & set(sys.modules)\n"
        "sys.exit(f'imported {sorted(slow)}' if slow else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
