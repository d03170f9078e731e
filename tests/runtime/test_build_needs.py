"""trio-build --dry-run: all that a build needs, next to what the machine has, and a remedy for what is missing."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from tests.engine_bundles import GPU, HOST, copy_bundle
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.cli import build as cli_build
from trio_edge.runtime.devices import machine as engine_host
from trio_edge.runtime.devices.machine import find_gpu, l4t_release
from trio_edge.runtime.engines import needs as module
from trio_edge.runtime.engines.build import BuildOptions
from trio_edge.runtime.engines.needs import build_needs

trt: Any = pytest.importorskip(
    "tensorrt_rtx", reason="needs tensorrt-rtx, which has wheels for x86-64 Linux only; runs in CI"
)
without_gpu = pytest.mark.skipif(find_gpu() is not None, reason="for a machine without a GPU")


def needs_of(bundle: Path, *, host: Any = HOST, **options: Any) -> dict[str, Any]:
    return build_needs(open_bundle(bundle), BuildOptions(**options), host=host)


def dry_run(arguments: list[Any], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = cli_build.main(["--dry-run", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_machine_with_all_that_is_needed_is_ready(reduced_bundle: Path) -> None:
    needs = needs_of(reduced_bundle)
    assert needs["problems"] == needs["warnings"] == []
    assert needs["tensorrt"] == {"tensorrt-rtx": trt.__version__}
    assert needs["backend"] == "tensorrt-rtx"
    assert needs["compute_capabilities"] == [GPU.compute_capability]


def test_sizes_are_those_of_all_graphs_and_the_peak_that_of_the_largest(reduced_bundle: Path) -> None:
    needs, manifest = needs_of(reduced_bundle), open_bundle(reduced_bundle).manifest
    weights = sum(spec.weight_bytes for spec in manifest.graphs)
    assert needs["run_bytes"]["weights"] == weights < needs["disk_bytes"]
    assert needs["run_bytes"]["KV caches"] == manifest.kv_bytes
    assert needs["run_bytes"]["buffers"] > 0
    assert needs["mapped_bytes"] == max(spec.weight_bytes for spec in manifest.graphs)
    assert needs["peak_bytes"] > 2 * needs["mapped_bytes"]


def test_the_command_repeats_the_options_and_quotes_the_folder(reduced_bundle: Path, tmp_path: Path) -> None:
    bundle = copy_bundle(reduced_bundle, tmp_path / "my bundle")
    options: dict[str, Any] = {"graphs": ("head", "prefix"), "compute_capabilities": (86, 89), "force": True}
    command = needs_of(bundle, split_lm_head=4, detailed_layers=True, **options)["command"]
    assert command == (
        f"trio-build '{bundle}' --compute-capability 86,89 --graphs head,prefix --split-lm-head 4 --verbose-layers --force"
    )


def test_too_little_disk_is_a_problem_that_says_how_much_to_free(
    reduced_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage(0, 0, 1_000_000))
    (problem,) = needs_of(reduced_bundle)["problems"]
    assert "got 0.00 GB; free 0." in problem
    assert shutil.disk_usage(reduced_bundle).free == 1_000_000


def test_a_place_that_cannot_be_written_is_a_problem(reduced_bundle: Path, tmp_path: Path) -> None:
    bundle = copy_bundle(reduced_bundle, tmp_path / "bundle")
    (bundle / "engines").write_text("a file")
    (problem,) = needs_of(bundle)["problems"]
    assert "expected a folder, got a link or a file; move it away" in problem


def test_what_cannot_run_on_the_gpu_is_a_warning(reduced_bundle: Path) -> None:
    small = dataclasses.replace(HOST, gpu=dataclasses.replace(GPU, memory_bytes=1000))
    needs = needs_of(reduced_bundle, host=small)
    assert needs["problems"] == []
    assert "a GPU has 0.0 GB; export with" in needs["warnings"][0]
    assert needs_of(reduced_bundle, host=small, compute_capabilities=(89,))["warnings"] == []


def test_without_a_gpu_the_problem_says_what_to_build_for(reduced_bundle: Path) -> None:
    needs = needs_of(reduced_bundle, host=dataclasses.replace(HOST, gpu=None))
    assert needs["backend"] is None
    assert "choose among" in needs["problems"][0]
    assert needs["tensorrt"]["tensorrt-rtx"] == trt.__version__
    assert needs["peak_bytes"] > 0


@without_gpu
def test_dry_run_ends_with_the_command_to_run(
    reduced_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = dry_run([reduced_bundle, "--compute-capability", "86"], capsys)
    assert (code, err) == (0, "")
    assert (
        out.splitlines()[-1]
        == f"verdict       ready; run trio-build {reduced_bundle} --compute-capability 86"
    )
    assert "GPU           none" in out


@without_gpu
def test_dry_run_of_what_cannot_be_built_reports_and_exits_with_2(
    reduced_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = dry_run([reduced_bundle], capsys)
    assert code == 2
    assert out.splitlines()[-1].endswith("cannot be built here: 1 problem, below")
    assert len(err.splitlines()) == 1
    assert "time          about" in out


@without_gpu
def test_json_has_the_same_report(reduced_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = dry_run([reduced_bundle, "--json", "--compute-capability", "86"], capsys)
    report = json.loads(out)
    assert code == 0
    assert report["ready"]
    assert report["gpu"] is None
    assert report["compute_capabilities"] == [86]
    graphs = {graph["name"]: graph for graph in report["graphs"]}
    assert graphs.keys() == {spec.name for spec in open_bundle(reduced_bundle).manifest.graphs}
    assert report["peak_bytes"] == max(graph["peak_bytes"] for graph in graphs.values())
    assert report["run_bytes"]["weights"] == sum(graph["weight_bytes"] for graph in graphs.values())


def test_json_is_for_dry_runs(reduced_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_build.main([str(reduced_bundle), "--json"]) == 2
    assert "--json: expected --dry-run as well" in capsys.readouterr().err


def test_a_jetson_tells_its_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = tmp_path / "nv_tegra_release"
    monkeypatch.setattr(engine_host, "_TEGRA", release)
    assert l4t_release() is None
    release.write_text("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n")
    assert l4t_release() == "36.4.3"
