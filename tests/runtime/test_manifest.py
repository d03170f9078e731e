"""The manifest: read back as written, and strict."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from trio_edge.runtime.bundle.checks import manifest_from_json
from trio_edge.runtime.bundle.errors import BackendError, ManifestError
from trio_edge.runtime.bundle.manifest import json_from_manifest
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.devices.host import HostDevice
from trio_edge.runtime.devices.memory import check_memory
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from pathlib import Path


def test_a_manifest_reads_back_as_it_was_written(reduced_bundle: Path) -> None:
    manifest = open_bundle(reduced_bundle).manifest
    assert manifest_from_json(json_from_manifest(manifest), where="test") == manifest


def test_layer_ranges_must_cover_every_layer(reduced_bundle: Path) -> None:
    content = json.loads((reduced_bundle / "trio.json").read_text())
    content["dimensions"]["num_layers"] = 4
    with pytest.raises(ManifestError, match="expected 4 decoder layers, got 3"):
        manifest_from_json(json.dumps(content).encode(), where="trio.json")


def test_graphs_must_come_in_order(reduced_bundle: Path) -> None:
    content = json.loads((reduced_bundle / "trio.json").read_text())
    content["graphs"].reverse()
    with pytest.raises(ManifestError, match="expected roles"):
        manifest_from_json(json.dumps(content).encode(), where="trio.json")


def test_no_graph_file_holds_weights(reduced_bundle: Path) -> None:
    manifest = open_bundle(reduced_bundle).manifest
    sizes = {entry.path: entry.num_bytes for entry in manifest.files}
    weights = sum(size for path, size in sizes.items() if path.startswith("weights/"))
    graphs = {path: size for path, size in sizes.items() if path.endswith(".onnx")}
    assert max(graphs.values()) < 100_000
    assert weights < 1.02 * manifest.model_bytes + 20_000  # headers of a very small model


def test_a_reduction_adds_no_weights_on_the_device(keep_all_bundle: Path, reduced_bundle: Path) -> None:
    keep_all, reduced = (open_bundle(folder).manifest for folder in (keep_all_bundle, reduced_bundle))
    assert keep_all.device_weight_ratio == reduced.device_weight_ratio < 1.0


@pytest.mark.parametrize(
    "name", ["../../suffix", "suffix.onnx", "head", "segment_1", "suffix_1", " ", "select_x"]
)
def test_graphs_are_called_after_their_roles(name: str, reduced_bundle: Path) -> None:
    manifest = json.loads((reduced_bundle / "trio.json").read_bytes())
    (graph,) = (one for one in manifest["graphs"] if one["name"] == "suffix")
    graph["name"] = name
    with pytest.raises(ManifestError, match="expected a unique name that follows from the role suffix"):
        manifest_from_json(json.dumps(manifest).encode(), where="trio.json")


def test_a_probe_of_no_layer_is_refused_in_one_line(reduced_bundle: Path) -> None:
    manifest = json.loads((reduced_bundle / "trio.json").read_bytes())
    (select,) = (one for one in manifest["graphs"] if one["name"] == "select_1")
    manifest["graphs"].append(select | {"name": "probe_7", "role": "probe", "first_layer": 7})
    with pytest.raises(ManifestError, match="graph 'probe_7': expected a program that runs it, got none"):
        manifest_from_json(json.dumps(manifest).encode(), where="trio.json")


def _set(manifest: dict[str, Any], keys: tuple[str | int, ...], value: object) -> None:
    *parents, last = keys
    place: Any = manifest
    for key in parents:
        place = place[key]
    place[last] = value


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("text_buckets",), [32, 10**9]),
        (("text_buckets",), [-5, 64]),
        (("max_new_tokens",), 10**12),
        (("max_new_tokens",), 10**30),
        (("visual_sizes",), [10**9]),
        (("token_keep",), 10**9),
        (("max_images",), 10**9),
        (("dimensions", "hidden_size"), 10**9),
        (("dimensions", "num_kv_heads"), 0),
        (("schedule", "stages", 0, "keep"), 10**9),
        (("graphs", 0, "profiles", 0, "sizes", "N"), 10**12),
        (("graphs", 0, "profiles", 0, "sizes", "N"), -1),
        (("graphs", 1, "profiles", 0, "sizes", "S"), 10**12),
        (("graphs", 0, "inputs", 0, "shape"), ["B", 3, 10**9, 10**9]),
        (("graphs", 0, "name"), "vision2"),
        (("graphs", 0, "weight_bytes"), -1),
        (("token_embedding", "shape"), [1, 1]),
        (("token_embedding", "offset"), -1),
        (("token_embedding", "offset"), 10**12),
        (("model_bytes",), 0),
        (("cost", "reduced_kv_bytes"), 0),
        (("files", 0, "sha256"), "0"),
        (("files", 0, "path"), "trio.json"),
    ],
)
def test_sizes_that_no_bundle_has_are_refused_in_one_line(
    keys: tuple[str | int, ...], value: object, reduced_bundle: Path
) -> None:
    manifest = json.loads((reduced_bundle / "trio.json").read_bytes())
    _set(manifest, keys, value)
    with pytest.raises(ManifestError) as caught:
        manifest_from_json(json.dumps(manifest).encode(), where="trio.json")
    assert "\n" not in str(caught.value)
    assert "export the bundle again" in str(caught.value)


def test_sizes_that_the_machine_has_no_memory_for_are_refused_before_anything_is_allocated(
    reduced_bundle: Path, tmp_path: Path
) -> None:
    bundle = shutil.copytree(reduced_bundle, tmp_path / "bundle")
    manifest = json.loads((bundle / "trio.json").read_bytes())
    for sizes in (manifest["graphs"][0]["profiles"][0]["sizes"], manifest["programs"][0]["sizes"][0]):
        sizes["B"] = 1 << 25
    (bundle / "trio.json").write_text(json.dumps(manifest))
    found = manifest_from_json((bundle / "trio.json").read_bytes(), where="trio.json")
    with pytest.raises(BackendError, match=r"CPU memory: expected .* GB in all .*, got|memory: expected"):
        check_memory(HostDevice(), found, found.graphs, weight_bytes=0)
    with pytest.raises(
        ManifestError, match="expected profiles with B <= 5, the most of an image, got 33554432"
    ):
        Pipeline.from_bundle(bundle, backend="onnxruntime")
