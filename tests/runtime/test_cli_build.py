"""trio-build: what it builds with tensorrt-rtx, without a GPU, and one line for everything that can go wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tests.bundles import export
from tests.checkpoints import save_checkpoint
from tests.engine_bundles import HOST, bundle_with_engines, copy_bundle, engine_folder, replace_bytes
from tests.lfm2_checkpoints import save_lfm2_vl_checkpoint
from tests.qwen_checkpoints import save_qwen3_5_checkpoint
from trio_edge.export.quantize.plan import parse_plan
from trio_edge.runtime.bundle.errors import BackendError
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.bundle.schedule import Schedule
from trio_edge.runtime.cli import build as cli_build
from trio_edge.runtime.devices import machine as engine_host
from trio_edge.runtime.devices.machine import Host, find_gpu
from trio_edge.runtime.engines import build as engine_build
from trio_edge.runtime.engines import child as engine_child
from trio_edge.runtime.engines.build import BuildOptions, BuildProgress, build_engines, plan_build
from trio_edge.runtime.engines.child import (
    optimization_profile,
    read_timing_cache,
    set_flags,
    write_engine,
    write_timing_cache,
)
from trio_edge.runtime.engines.files import read_engine_set
from trio_edge.runtime.engines.package import TensorRT, choose_backend, load_tensorrt
from trio_edge.runtime.engines.passes import (
    Network,
    block_sizes,
    separate_products,
    split_lm_head,
    split_sliced_products,
)

trt: Any = pytest.importorskip(
    "tensorrt_rtx", reason="needs tensorrt-rtx, which has wheels for x86-64 Linux only; runs in CI"
)
AHEAD = ["--backend", "tensorrt-rtx", "--compute-capability", "86", "--quiet"]
COMMAND = "import sys; from trio_edge.runtime.cli.build import main; sys.exit(main())"


@pytest.fixture(scope="module")
def built(reduced_bundle: Path) -> Path:
    return bundle_with_engines(reduced_bundle)


@pytest.fixture
def copy(reduced_bundle: Path, tmp_path: Path) -> Path:
    """A bundle without engines."""
    return copy_bundle(reduced_bundle, tmp_path / "bundle")


@pytest.fixture
def built_copy(built: Path, tmp_path: Path) -> Path:
    """A bundle with engines."""
    return copy_bundle(built, tmp_path / "bundle")


def refused(arguments: list[Any], capsys: pytest.CaptureFixture[str]) -> str:
    """Run the command, which must fail, and return its only line on standard error."""
    assert cli_build.main([str(argument) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


# ------------------------------------------------------------------------------------------------ what is built


def test_all_graphs_are_built_for_the_gpus_asked_for(built: Path) -> None:
    engines = read_engine_set(engine_folder(built))
    assert engine_folder(built).name.endswith("-sm86")
    assert engines.compute_capabilities == (86,)
    assert [entry.graph for entry in engines.engines] == [
        spec.name for spec in open_bundle(built).manifest.graphs
    ]


def test_nothing_but_engines_and_their_description_is_left(built: Path) -> None:
    names = {path.name for path in engine_folder(built).iterdir()}
    assert names == {"engines.json", *(f"{spec.name}.engine" for spec in open_bundle(built).manifest.graphs)}


def test_a_chosen_graph_is_built_for_several_gpus(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(copy), "--graphs", "head", "--compute-capability", "8.9,86", "--verbose-layers"]
    assert cli_build.main(arguments) == 0
    captured = capsys.readouterr()
    assert "-sm86-sm89: 1 engine, " in captured.out
    assert "needs about" in captured.err
    engines = read_engine_set(engine_folder(copy))
    assert engines.detailed_layers
    assert engines.compute_capabilities == (86, 89)


def test_dry_run_prints_the_needs_and_builds_nothing(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_build.main([str(copy), "--dry-run", *AHEAD]) == 0
    output = capsys.readouterr().out
    assert all(spec.name in output for spec in open_bundle(copy).manifest.graphs)
    assert "tensorrt_rtx-1." in output
    assert "peak about" in output
    assert "decode(S=1" in output
    assert not (copy / "engines").exists()


def test_adding_a_graph_keeps_the_engines_that_are_there(copy: Path) -> None:
    assert cli_build.main([str(copy), *AHEAD, "--graphs", "head"]) == 0
    head = (engine_folder(copy) / "head.engine").stat()
    assert cli_build.main([str(copy), *AHEAD, "--graphs", "prefix"]) == 0
    assert (engine_folder(copy) / "head.engine").stat().st_ino == head.st_ino
    assert [entry.graph for entry in read_engine_set(engine_folder(copy)).engines] == ["prefix", "head"]


def test_separate_builds_an_engine_of_each_piece_and_joined_ones_replace_them(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = open_bundle(copy)
    (graph,) = [graph.name for graph in bundle.manifest.graphs if graph.name == "segment_1"]
    parts = [part.name for part in bundle.manifest.graph(graph).split()]
    assert len(parts) > 1
    assert cli_build.main([str(copy), *AHEAD, "--graphs", graph, "--separate", "--dry-run"]) == 0
    assert f"{parts[1]} " in capsys.readouterr().out
    assert cli_build.main([str(copy), *AHEAD, "--graphs", graph, "--separate"]) == 0
    engines = read_engine_set(engine_folder(copy))
    assert [entry.graph for entry in engines.engines] == parts
    assert [part.name for part in engines.parts_of(bundle.manifest.graph(graph))] == parts
    assert cli_build.main([str(copy), *AHEAD, "--graphs", f"{graph},head", "--force"]) == 0
    assert [entry.graph for entry in read_engine_set(engine_folder(copy)).engines] == [graph, "head"]


def test_force_replaces_one_graph_and_keeps_the_others(built_copy: Path) -> None:
    folder = engine_folder(built_copy)
    before = {path.name: path.stat().st_ino for path in folder.iterdir()}
    assert cli_build.main([str(built_copy), *AHEAD, "--graphs", "head", "--force"]) == 0
    after = {path.name: path.stat().st_ino for path in folder.iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"head.engine", "engines.json"}


def test_an_engine_that_is_gone_is_not_listed_and_is_built_again_without_force(built_copy: Path) -> None:
    folder = engine_folder(built_copy)
    (folder / "prefix.engine").unlink()
    replace_bytes(folder / "suffix.engine", b"short")
    assert cli_build.main([str(built_copy), *AHEAD, "--graphs", "head", "--force"]) == 0
    names = {entry.graph for entry in read_engine_set(folder).engines}
    assert {spec.name for spec in open_bundle(built_copy).manifest.graphs} - names == {"prefix", "suffix"}
    assert cli_build.main([str(built_copy), *AHEAD, "--graphs", "prefix , prefix"]) == 0
    assert read_engine_set(folder).entry("prefix") is not None


def test_engines_that_another_build_made_meanwhile_are_not_lost(copy: Path) -> None:
    def build_another(_graph: Any) -> None:
        assert cli_build.main([str(copy), *AHEAD, "--graphs", "head"]) == 0

    plan = plan_build(open_bundle(copy), BuildOptions(compute_capabilities=(86,), graphs=("prefix",)))
    with pytest.raises(BackendError, match=r"-sm86: expected the engines from the start of the build"):
        build_engines(plan, progress=BuildProgress(graph=build_another))
    assert [entry.graph for entry in read_engine_set(engine_folder(copy)).engines] == ["head"]


def test_a_timing_cache_that_cannot_be_read_is_left_out(built_copy: Path) -> None:
    (engine_folder(built_copy) / "timing.cache").mkdir()
    assert cli_build.main([str(built_copy), *AHEAD, "--graphs", "head", "--force"]) == 0
    assert not (engine_folder(built_copy) / "timing.cache").exists()


def test_force_with_another_setting_keeps_no_engine_built_without_it(built_copy: Path) -> None:
    assert (
        cli_build.main([str(built_copy), *AHEAD, "--graphs", "head", "--force", "--split-lm-head", "2"]) == 0
    )
    engines = read_engine_set(engine_folder(built_copy))
    assert engines.split_lm_head == 2
    assert [path.name for path in sorted(engine_folder(built_copy).iterdir())] == [
        "engines.json",
        "head.engine",
    ]


def test_a_layer_as_wide_as_a_7b_holds_its_weights_once_for_prefill_and_decode(tmp_path: Path) -> None:
    """With a shorter MLP, to save time; without ``separate_products`` the engine has 1.7 times the weights."""
    wide = {
        "hidden_size": 4096,
        "intermediate_size": 2816,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    }
    checkpoint = save_checkpoint(tmp_path / "wide", num_layers=1, dtype=torch.float16, text_settings=wide)
    bundle = export(checkpoint, max_text=32, max_new_tokens=32)
    folder = copy_bundle(bundle, tmp_path / "bundle")
    assert cli_build.main([str(folder), *AHEAD, "--graphs", "prefix"]) == 0
    spec = open_bundle(folder).manifest.graph("prefix")
    entry = read_engine_set(engine_folder(folder)).entry("prefix")
    assert entry is not None
    assert spec.weight_bytes > 200e6
    assert spec.weight_bytes < entry.num_bytes < 1.05 * spec.weight_bytes


# --------------------------------------------------------------------------------------------- what is refused

REQUESTS: dict[str, tuple[list[str], str]] = {
    "unknown_backend": (["--backend", "abacus"], "--backend: expected one of auto, tensorrt, tensorrt-rtx"),
    "capability_87": (["--compute-capability", "87"], "build on the Jetson Orin itself"),
    "capability_90": (["--compute-capability", "86,90"], "got 90; choose among them"),
    "capability_is_a_word": (["--compute-capability", "orin"], "for instance 86,89"),
    "capability_is_empty": (["--compute-capability", ""], "for instance 86,89"),
    "no_capability": ([], "expected some, as no GPU was found here"),
    "unknown_graph": (["--graphs", "head,tail"], "expected some of vision, prefix"),
    "no_blocks": (
        ["--compute-capability", "86", "--split-lm-head", "0"],
        "--split-lm-head: expected 1 or more",
    ),
    "blocks_are_a_word": (["--split-lm-head", "many"], "--split-lm-head: expected a number, got 'many'"),
    "empty_graph": (["--graphs", ""], "got ''; choose among them"),
    "split_without_head": (["--split-lm-head", "2", "--graphs", "prefix"], "expected head or gradient"),
    "unknown_option": (["--turbo"], "--turbo: expected an option of trio-build, got another"),
}


@pytest.mark.skipif(find_gpu() is not None, reason="for a machine without a GPU")
@pytest.mark.parametrize("name", list(REQUESTS))
def test_bad_request_gives_one_line(name: str, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, expected = REQUESTS[name]
    assert expected in refused([copy, *arguments], capsys)
    assert not (copy / "engines").exists()


def test_a_folder_that_is_no_bundle_gives_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "expected trio.json" in refused([tmp_path, *AHEAD], capsys)
    assert "expected a bundle folder" in refused([tmp_path / "none", *AHEAD], capsys)


def test_existing_engines_are_kept_without_force(
    built_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(built_copy)
    assert "add --force" in refused([built_copy, *AHEAD], capsys)
    assert "add --force" in refused([built_copy, *AHEAD, "--graphs", "head"], capsys)
    assert contents(built_copy) == before


def test_a_folder_of_other_files_is_not_replaced(
    built_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = engine_folder(built_copy)
    (folder / "engines.json").unlink()
    assert "got something else; move it away" in refused([built_copy, *AHEAD, "--force"], capsys)
    assert (folder / "head.engine").exists()


def test_a_place_that_cannot_be_written_gives_one_line(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "engines").write_text("a file")
    assert "expected a folder, got a link or a file" in refused([copy, *AHEAD, "--graphs", "head"], capsys)


@pytest.mark.skipif(
    sys.platform == "win32" or os.geteuid() != 0, reason="gives root's rights away in a process"
)
def test_a_bundle_of_somebody_else_gives_one_line(copy: Path) -> None:
    code = (
        "import os, sys, tensorrt_rtx; from trio_edge.runtime.cli.build import main;"
        " os.setgid(65534); os.setuid(65534); sys.exit(main())"
    )
    outside = Path(tempfile.gettempdir()).resolve()
    for path in itertools.takewhile(lambda parent: parent != outside, copy.resolve().parents):
        path.chmod(0o755)
    result = subprocess.run(
        [sys.executable, "-c", code, str(copy), *AHEAD, "--graphs", "head"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, len(result.stderr.strip().splitlines())) == (2, 1), result.stderr
    assert "make the bundle's folder writable" in result.stderr


def test_a_graph_that_tensorrt_refuses_is_named_and_other_targets_stay(
    built_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = built_copy / "segment_1.onnx"
    replace_bytes(file, file.read_bytes().replace(b"Softmax", b"Hardmux"))
    manifest = json.loads((built_copy / "trio.json").read_bytes())
    for entry in manifest["files"]:
        if entry["path"] == file.name:
            entry["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    replace_bytes(built_copy / "trio.json", json.dumps(manifest).encode())
    before = contents(built_copy)
    arguments = [built_copy, "--compute-capability", "89", "--quiet", "--graphs", "segment_1"]
    line = refused(arguments, capsys)
    assert line.startswith("trio-build: segment_1: expected tensorrt-rtx to build this graph, got: ")
    assert "Hardmux" in line
    assert contents(built_copy) == before


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
def test_a_full_disk_gives_one_line_and_leaves_nothing(copy: Path) -> None:
    code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000000, 1000000)); {COMMAND}"
    command = [sys.executable, "-c", code, str(copy), *AHEAD, "--graphs", "head"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, len(result.stderr.strip().splitlines())) == (2, 1), result.stderr
    assert "cannot write head.engine (File too large)" in result.stderr
    assert not (copy / "engines").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda this: this.name)
def test_ctrl_c_kill_and_a_closed_terminal_are_one_line_and_leave_nothing(
    number: signal.Signals, copy: Path
) -> None:
    # A test run under nohup ignores SIGHUP, and so would the command.
    answered = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL); "
    command = [sys.executable, "-c", answered + COMMAND, str(copy), *AHEAD[:-1]]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr is not None
        first = process.stderr.readline()
        assert first.startswith("vision: ")
        os.killpg(process.pid, number)
        rest = process.stderr.read()
    assert process.returncode == 130
    assert rest.strip().splitlines()[-1] == "trio-build: interrupted"
    assert not (copy / "engines").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_killed_build_process_is_told_as_memory_that_ran_out(copy: Path) -> None:
    def kill(_report: dict[str, Any]) -> None:
        for child in multiprocessing.active_children():
            child.kill()

    plan = plan_build(open_bundle(copy), BuildOptions(compute_capabilities=(86,), graphs=("suffix",)))
    with pytest.raises(
        BackendError,
        match=r"^suffix: .*killed, most likely because memory ran out \(it needs about 0\.4 GB\)",
    ):
        build_engines(plan, progress=BuildProgress(report=kill))
    assert not (copy / "engines").exists()


def test_a_build_process_that_ends_before_it_writes_a_log_is_told(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a script without ``if __name__ == "__main__"``, which a new process runs again."""
    monkeypatch.setattr(engine_build, "run_job", sys.exit)
    plan = plan_build(open_bundle(copy), BuildOptions(compute_capabilities=(86,), graphs=("head",)))
    with pytest.raises(BackendError, match=r"^head: .* its process ended with code 1: it printed nothing"):
        build_engines(plan)


def test_a_machine_without_scores_for_the_oom_killer_builds_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_child, "_OOM_SCORE", tmp_path / "none" / "oom_score_adj")
    engine_child.go_first_when_memory_runs_out()


@pytest.mark.skipif(sys.platform == "win32", reason="folders have no locks there")
def test_what_a_killed_build_left_is_deleted_by_the_next(copy: Path) -> None:
    name = "tensorrt_rtx-" + ".".join(trt.__version__.split(".")[:2]) + "-sm86"
    left = copy / "engines" / f".{name}.partial-abcd1234"
    left.mkdir(parents=True)
    assert cli_build.main([str(copy), *AHEAD, "--graphs", "head"]) == 0
    assert [path.name for path in (copy / "engines").iterdir()] == [name]


# ------------------------------------------------------------------------------------ TensorRT and the machine


def test_tensorrt_on_a_machine_without_a_gpu_is_refused(copy: Path) -> None:
    no_gpu = dataclasses.replace(HOST, gpu=None)
    with pytest.raises(BackendError, match=r"it is not; (on a Jetson it comes with JetPack|.*)"):
        plan_build(open_bundle(copy), BuildOptions(backend="tensorrt"), host=no_gpu)


def test_rtx_builds_for_the_gpu_of_this_machine_by_default(copy: Path) -> None:
    assert plan_build(open_bundle(copy), BuildOptions(), host=HOST).compute_capabilities == (86,)


def test_a_tensorrt_outside_of_the_environment_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As JetPack's lies outside of a virtual environment; this package has what is asked of a module."""
    package = tmp_path / "tensorrt"
    package.mkdir()
    (package / "inner.py").write_text("VERSION = '10.3.0.30'\n")
    (package / "__init__.py").write_text("from tensorrt.inner import VERSION as __version__\n")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.delitem(sys.modules, "tensorrt")
    assert load_tensorrt("tensorrt", folders=[tmp_path]).version == "10.3.0.30"


def test_a_package_for_another_python_gives_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "tensorrt"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('wrong ABI')\n")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.delitem(sys.modules, "tensorrt")
    with pytest.raises(
        BackendError, match=r"that python 3\.\d+ imports, got: wrong ABI; install the release"
    ):
        load_tensorrt("tensorrt", folders=[tmp_path])


def test_auto_takes_rtx_for_other_gpus_and_where_there_is_no_tensorrt() -> None:
    assert choose_backend("auto", host=HOST, ahead_of_time=True) == "tensorrt-rtx"
    assert (
        choose_backend("auto", host=dataclasses.replace(HOST, gpu=None), ahead_of_time=False)
        == "tensorrt-rtx"
    )


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_the_driver_tells_the_gpu(tmp_path: Path) -> None:
    source, library = tmp_path / "cuda.c", tmp_path / "libcuda.so"
    source.write_text(
        "#include <string.h>\n#include <stddef.h>\n"
        "int cuInit(unsigned f) { return 0; }\n"
        "int cuDeviceGet(int *d, int n) { *d = 5; return n; }\n"
        "int cuDeviceGetAttribute(int *v, int a, int d) { *v = a == 75 ? 8 : 7; return d != 5; }\n"
        'int cuDeviceGetName(char *s, int n, int d) { strncpy(s, "Orin", n); return d != 5; }\n'
        "int cuDeviceTotalMem_v2(size_t *m, int d) { *m = (size_t)15 << 30; return d != 5; }\n"
        "int cuDriverGetVersion(int *v) { *v = 12060; return 0; }\n"
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    gpu = find_gpu(str(library))
    assert gpu is not None
    assert (gpu.name, gpu.compute_capability, gpu.memory_bytes) == ("Orin", 87, 15 << 30)
    assert "CUDA 12.6" in gpu.driver


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVIDIA UNIX x86_64 Kernel Module  560.35.03  Fri Aug 16 21:39:15 UTC 2024", "560.35.03"),
        ("NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build  (builder)", "550.54.15"),
        ("NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build  (builder)", "540.4.0"),
    ],
    ids=["closed", "open", "jetson"],
)
def test_the_drivers_version_is_read_from_every_kernel_module(
    text: str, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "version"
    file.write_text(f"NVRM version: {text}\nGCC version:  gcc version 12.3.0 (Ubuntu)\n")
    monkeypatch.setattr(engine_host, "_DRIVER", file)
    assert engine_host._kernel_driver() == version


def test_a_machine_without_driver_has_no_gpu() -> None:
    assert find_gpu("libno-such-driver.so") is None


def test_platform_is_machine_and_system() -> None:
    assert Host(machine="aarch64", system="Linux", gpu=None).platform == "aarch64-linux"


# ------------------------------------------------------------------------------- passes and the timing cache


def parsed(bundle: Path, graph: str) -> tuple[Any, Network]:
    """Return what must outlive the network, and the network."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    definition = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(definition, logger)
    assert parser.parse_from_file(str(bundle / f"{graph}.onnx"))
    tensorrt = TensorRT(backend="tensorrt-rtx", module=trt, version=trt.__version__)
    return (logger, builder, parser), Network(tensorrt, definition)


def test_a_split_head_has_the_same_weight_in_blocks(reduced_bundle: Path) -> None:
    """The weight's three products are logits, and a probe's way to the head and back."""
    sizes, num_replaced = open_bundle(reduced_bundle).manifest.dimensions, 3
    alive, network = parsed(reduced_bundle, "head")
    (whole, *_) = [
        network.values(product.weight)
        for product in network.weight_products()
        if tuple(product.weight.shape) == (sizes.vocab_size, sizes.hidden_size)
    ]
    outputs = [network.definition.get_output(index).name for index in range(network.definition.num_outputs)]
    count = split_lm_head(network, vocab_size=sizes.vocab_size, hidden_size=sizes.hidden_size, num_blocks=3)
    assert count == num_replaced
    after = Network(TensorRT(backend="tensorrt-rtx", module=trt, version=""), network.definition)
    blocks = [
        product
        for product in after.weight_products()
        if tuple(product.weight.shape) in ((40, sizes.hidden_size), (20, sizes.hidden_size))
    ]
    for first in range(0, len(blocks), 3):
        joined = np.concatenate([after.values(product.weight) for product in blocks[first : first + 3]])
        np.testing.assert_array_equal(joined, whole)
    assert len(blocks) == 3 * num_replaced
    assert len({product.layer.get_input(0).name for product in blocks}) == len(blocks)
    renamed = [network.definition.get_output(index).name for index in range(network.definition.num_outputs)]
    assert sorted(renamed) == sorted(outputs)
    assert alive


def test_products_after_a_zero_centred_norm_get_an_input_of_their_own(tmp_path: Path) -> None:
    """Qwen3.5's norms multiply by 1 + their weight. An engine of four layers, 4096 wide, had 1.7 times the weights."""
    checkpoint = save_qwen3_5_checkpoint(tmp_path / "model", num_layers=4)
    bundle = export(checkpoint, schedule=Schedule(stages=(), positions="preserved"), max_text=64)
    alive, network = parsed(bundle, "prefix")
    num_parsed, before = network.definition.num_layers, network.weight_products()
    gate, up = (product.layer.get_input(0).name for product in before[5:7])
    assert gate == up
    assert separate_products(network) == 3 * (3 + 1) + 2 + 1  # qkv, z, b, a or q, k, v; gate, up
    names = [product.layer.get_input(0).name for product in network.weight_products()]
    assert len(set(names)) == len(names)
    after = Network(TensorRT(backend="tensorrt-rtx", module=trt, version=""), network.definition)
    added = {
        after.values(after.maker(layer.get_output(0))).tobytes()
        for layer in after.layers()[num_parsed:]
        if layer.type == trt.LayerType.CONSTANT
    }
    weights = load_file(checkpoint / "model.safetensors")
    norms = [
        1 + weights[f"model.language_model.layers.{layer}.{norm}_layernorm.weight"]
        for layer in range(4)
        for norm in ("input", "post_attention")
    ]
    assert added == {norm.tobytes() for norm in norms}
    assert alive


def test_each_slice_of_a_product_gets_a_product_of_its_own(tmp_path: Path) -> None:
    """LFM2's convolutions read three slices of one product. Otherwise an engine has these weights twice."""
    checkpoint = save_lfm2_vl_checkpoint(tmp_path / "model")
    bundle = export(checkpoint, schedule=Schedule(stages=()), max_text=128)
    alive, network = parsed(bundle, "prefix")
    before = {product.layer.name for product in network.weight_products()}
    name = "model.language_model.layers.{}.conv.in_proj.weight"
    weights = load_file(checkpoint / "model.safetensors")
    wanted = [weights[name.format(layer)] for layer in range(6) if name.format(layer) in weights]
    assert split_sliced_products(network) == len(wanted) > 1
    after = Network(TensorRT(backend="tensorrt-rtx", module=trt, version=""), network.definition)
    shape = (wanted[0].shape[0] // 3, wanted[0].shape[1])
    added = [product for product in after.weight_products() if product.layer.name not in before]
    assert [tuple(product.weight.shape) for product in added] == [shape] * 3 * len(wanted)
    for first, weight in zip(range(0, len(added), 3), wanted):
        joined = np.concatenate([after.values(product.weight) for product in added[first : first + 3]])
        np.testing.assert_array_equal(joined, weight)
    assert len({product.layer.get_input(0).name for product in added}) == len(added)
    assert alive


@pytest.mark.skipif(
    not trt.__version__.startswith("1.7."),
    reason="only tensorrt-rtx 1.7 is known to fail there; runs with 1.7",
)
def test_linear_attention_in_int8_without_rounded_inputs_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = save_qwen3_5_checkpoint(tmp_path / "model", num_layers=4)
    schedule = Schedule(stages=(), positions="preserved")
    bundle = export(checkpoint, schedule=schedule, max_text=64, quantize=parse_plan("int8"))
    capsys.readouterr()  # progress of the checkpoint
    message = refused([copy_bundle(bundle, tmp_path / "bundle"), *AHEAD, "--graphs", "prefix"], capsys)
    assert "prefix: expected tensorrt-rtx to build this graph, got: " in message
    assert message.endswith("export with scales of trio-calibrate, or in INT4")


@pytest.mark.parametrize(("graph", "in_probe"), [("prefix", 0), ("suffix", 11)])
def test_key_value_and_up_products_get_an_input_of_their_own(
    graph: str, in_probe: int, reduced_bundle: Path
) -> None:
    alive, network = parsed(reduced_bundle, graph)
    assert open_bundle(reduced_bundle).manifest.graph(graph).num_layers == 1
    assert separate_products(network) == 3
    names = [product.layer.get_input(0).name for product in network.weight_products()]
    assert len(names) == 7 + in_probe
    assert len(set(names)) == len(names)
    assert alive


def test_blocks_are_multiples_of_eight_but_for_the_last() -> None:
    assert block_sizes(101, 3) == [40, 40, 21]
    assert block_sizes(32064, 4) == [8016, 8016, 8016, 8016]
    assert block_sizes(16, 8) == [8, 8]


def test_a_graph_without_head_cannot_be_split(reduced_bundle: Path) -> None:
    alive, network = parsed(reduced_bundle, "suffix")
    with pytest.raises(
        BackendError, match=r"--split-lm-head: expected a product with an lm_head of \[7, 64\], got none"
    ):
        split_lm_head(network, vocab_size=7, hidden_size=64, num_blocks=2)
    assert alive


def test_a_release_that_cannot_stream_engines_writes_the_same_file(
    reduced_bundle: Path, tmp_path: Path
) -> None:
    """TensorRT 10.3 has no build_serialized_network_to_stream."""
    spec = open_bundle(reduced_bundle).manifest.graph("prefix")
    files, without = [], TensorRT(backend="tensorrt-rtx", module=SimpleNamespace(Builder=object), version="")
    for tensorrt in (load_tensorrt("tensorrt-rtx"), without):
        (_, builder, _), network = alive = parsed(reduced_bundle, "prefix")
        config = builder.create_builder_config()
        for profile in spec.profiles:
            config.add_optimization_profile(optimization_profile(builder, spec, profile))
        file = tmp_path / f"{len(files)}.engine"
        size, digest = write_engine(tensorrt, builder, network.definition, config, file)
        assert size == file.stat().st_size > 100_000
        assert digest == hashlib.sha256(file.read_bytes()).hexdigest()
        files.append(size)
        assert alive
    assert files[0] == files[1]


@pytest.mark.parametrize(("dtype", "has_tf32"), [("float32", False), ("float16", True)])
def test_float32_bundles_are_not_rounded_and_rtx_engines_can_be_captured(dtype: str, has_tf32: bool) -> None:
    config = trt.Builder(trt.Logger(trt.Logger.ERROR)).create_builder_config()
    set_flags(config, trt, dtype=dtype)
    assert config.get_flag(trt.BuilderFlag.TF32) is has_tf32
    assert config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)


def test_the_timing_cache_is_written_and_read_again(tmp_path: Path) -> None:
    """tensorrt-rtx has the calls but times nothing; with ``tensorrt`` the file holds the timings."""
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    config, file = builder.create_builder_config(), tmp_path / "timing.cache"
    read_timing_cache(config, file)
    write_timing_cache(config, file)
    again = builder.create_builder_config()
    read_timing_cache(again, file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert again.get_timing_cache() is not None
