"""engines.json and open_engines: engines that do not fit are refused in one line that says what to run."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from tests.engine_bundles import GPU, HOST, bundle_with_engines, copy_bundle, engine_folder, replace_bytes
from trio_edge.runtime.bundle.errors import BackendError
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.cli import inspect as cli_inspect
from trio_edge.runtime.engines.files import open_engines, read_engine_set, target_name
from trio_edge.runtime.engines.package import load_tensorrt

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from trio_edge.runtime.devices.machine import Host
    from trio_edge.runtime.engines.files import Engines

pytest.importorskip(
    "tensorrt_rtx", reason="needs tensorrt-rtx, which has wheels for x86-64 Linux only; runs in CI"
)


@pytest.fixture(scope="module")
def built(reduced_bundle: Path) -> Path:
    return bundle_with_engines(reduced_bundle)


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    return copy_bundle(built, tmp_path / "bundle")


def opened(
    bundle: Path, *, host: Host = HOST, version: str | None = None, backend: Any = "tensorrt-rtx"
) -> Engines:
    version = load_tensorrt("tensorrt-rtx").version if version is None else version
    return open_engines(open_bundle(bundle), backend=backend, version=version, host=host)


def edit(bundle: Path, **changes: Any) -> None:
    file = engine_folder(bundle) / "engines.json"
    replace_bytes(file, json.dumps({**json.loads(file.read_bytes()), **changes}).encode())


def edit_entry(bundle: Path, **changes: Any) -> None:
    engines = json.loads((engine_folder(bundle) / "engines.json").read_bytes())["engines"]
    edit(bundle, engines=[{**engines[0], **changes}, *engines[1:]])


def test_every_graph_has_an_engine_with_the_profiles_of_the_manifest(built: Path) -> None:
    engines = opened(built)
    for spec in open_bundle(built).manifest.graphs:
        entry = engines.engine_set.entry(spec.name)
        assert entry is not None
        assert entry.profiles == spec.profiles
        assert engines.path(spec.name).stat().st_size == entry.num_bytes


def test_a_bundle_with_engines_is_still_a_bundle(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_inspect.main([str(built), "--verify", "--json"]) == 0
    (engines,) = json.loads(capsys.readouterr().out)["engines"]
    assert engines["target"] == engine_folder(built).name
    assert engines["graphs"] == [spec.name for spec in open_bundle(built).manifest.graphs]


def test_inspect_prints_the_engines(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_inspect.main([str(built)]) == 0
    assert re.search(r"^engines +tensorrt_rtx-.*-sm86: 7 graphs", capsys.readouterr().out, re.MULTILINE)


def test_another_driver_is_told_and_not_refused(copy: Path) -> None:
    edit(copy, driver="535.1 (CUDA 12.2)")
    assert opened(copy).notes == (
        "the engines were built with driver 535.1 (CUDA 12.2), this machine has 560.35 (CUDA 12.6)",
    )


def test_the_fitting_target_is_found_among_others(copy: Path) -> None:
    folder = engine_folder(copy)
    other = shutil.copytree(folder, folder.with_name("another"))
    file = other / "engines.json"
    replace_bytes(file, json.dumps({**json.loads(file.read_bytes()), "platform": "aarch64-linux"}).encode())
    assert opened(copy).folder == folder


def test_of_several_targets_the_one_that_differs_least_is_told(copy: Path) -> None:
    folder = engine_folder(copy)
    other = shutil.copytree(folder, folder.with_name("another"))
    changes = {"platform": "aarch64-linux", "compute_capabilities": [87], "tensorrt_version": "9.9.9"}
    file = other / "engines.json"
    replace_bytes(file, json.dumps({**json.loads(file.read_bytes()), **changes}).encode())
    with pytest.raises(BackendError, match=r"sm86: expected engines for compute capability 8.9"):
        opened(copy, host=dataclasses.replace(HOST, gpu=dataclasses.replace(GPU, compute_capability=89)))


HOSTS: dict[str, tuple[dict[str, Any], str]] = {
    "other_release": (
        {"version": "1.8.0.1"},
        r"expected engines of tensorrt-rtx 1\.8\.0\.1.*got 1\..*trio-build .* --force$",
    ),
    "other_backend": (
        {"backend": "tensorrt"},
        r"expected engines of tensorrt, got tensorrt-rtx; run trio-build",
    ),
    "other_gpu": (
        {"host": dataclasses.replace(HOST, gpu=dataclasses.replace(GPU, compute_capability=87))},
        r"compute capability 8\.7 \(a GPU\), got 8\.6; run trio-build",
    ),
    "other_platform": (
        {"host": dataclasses.replace(HOST, machine="aarch64")},
        r"expected engines for aarch64-linux, got x86_64-linux; run trio-build",
    ),
    "no_gpu": (
        {"host": dataclasses.replace(HOST, gpu=None)},
        r"expected an NVIDIA GPU.*got none; use --backend onnxruntime",
    ),
}


@pytest.mark.parametrize("name", list(HOSTS))
def test_engines_of_another_machine_are_refused_in_one_line(name: str, built: Path) -> None:
    arguments, expected = HOSTS[name]
    with pytest.raises(BackendError, match=expected) as caught:
        opened(built, **arguments)
    assert "\n" not in str(caught.value)


def flip_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    replace_bytes(file, bytes(content))


def link_elsewhere(bundle: Path) -> None:
    file = engine_folder(bundle) / "head.engine"
    outside = file.rename(bundle.parent / "head.engine")
    file.symlink_to(outside)


def touch_manifest(bundle: Path) -> None:
    replace_bytes(bundle / "trio.json", (bundle / "trio.json").read_bytes() + b"\n")


def drop_head(bundle: Path) -> None:
    engines = json.loads((engine_folder(bundle) / "engines.json").read_bytes())["engines"]
    edit(bundle, engines=[entry for entry in engines if entry["graph"] != "head"])


BREAKAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no_engines": (
        lambda bundle: shutil.rmtree(bundle / "engines"),
        r"expected engines, got none; run trio-build",
    ),
    "no_file": (
        lambda bundle: (engine_folder(bundle) / "head.engine").unlink(),
        r"head\.engine: expected this file",
    ),
    "changed_byte": (
        lambda bundle: flip_byte(engine_folder(bundle) / "head.engine"),
        r"head\.engine: expected SHA-256",
    ),
    "truncated": (
        lambda bundle: replace_bytes(engine_folder(bundle) / "head.engine", b"short"),
        r"head\.engine: expected \d+ bytes, got 5; run trio-build",
    ),
    "link_to_elsewhere": (link_elsewhere, r"link to elsewhere"),
    "other_export": (touch_manifest, r"expected engines of this bundle, got those of another export"),
    "one_graph_missing": (
        drop_head,
        r"expected an engine of head, got none; run trio-build .* --graphs head$",
    ),
    "other_profiles": (lambda bundle: edit_entry(bundle, profiles=[]), r"expected the bundle's profiles"),
    "path_outside": (
        lambda bundle: edit_entry(bundle, file="../trio.json"),
        r"expected a file next to engines\.json",
    ),
    "absolute_path": (
        lambda bundle: edit_entry(bundle, file="/etc/passwd"),
        r"expected a file next to engines\.json",
    ),
    "unknown_key": (lambda bundle: edit(bundle, surprise=1), r"surprise"),
    "wrong_type": (lambda bundle: edit(bundle, platform=3), r"platform"),
    "other_schema": (lambda bundle: edit(bundle, schema_version=9), r"expected schema_version 1, got 9"),
    "no_json": (
        lambda bundle: replace_bytes(engine_folder(bundle) / "engines.json", b"{"),
        r"expected a description of engines",
    ),
    "a_list": (
        lambda bundle: replace_bytes(engine_folder(bundle) / "engines.json", b"[]"),
        r"expected schema_version 1, got None",
    ),
}


@pytest.mark.parametrize("name", list(BREAKAGES))
def test_broken_engines_are_refused_in_one_line(name: str, copy: Path) -> None:
    breakage, expected = BREAKAGES[name]
    breakage(copy)
    with pytest.raises(BackendError, match=expected) as caught:
        opened(copy)
    assert "\n" not in str(caught.value)
    assert "trio-build" in str(caught.value)


def test_a_target_is_named_by_backend_release_and_gpus() -> None:
    assert (
        target_name("tensorrt-rtx", version="1.7.1.116", compute_capabilities=(86, 89))
        == "tensorrt_rtx-1.7-sm86-sm89"
    )
    assert target_name("tensorrt", version="10.3.0.30", compute_capabilities=(87,)) == "tensorrt-10.3-sm87"


def test_engines_json_has_what_was_measured(built: Path) -> None:
    for entry in read_engine_set(engine_folder(built)).engines:
        assert entry.build_seconds > 0
        assert entry.peak_memory_bytes is not None
        assert entry.peak_memory_bytes > 50 << 20
