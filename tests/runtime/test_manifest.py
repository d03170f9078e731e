"""The manifest: read back as written, and strict."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from trio_edge.runtime.bundle.errors import ManifestError
from trio_edge.runtime.bundle.graph_io import check_tensors
from trio_edge.runtime.bundle.manifest import json_from_manifest, manifest_from_json
from trio_edge.runtime.bundle.reader import open_bundle

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
    "name", ["../../suffix", "suffix.onnx", "head", "segment_1", "suffix_1", "", "select_x"]
)
def test_graphs_are_called_after_their_roles(name: str, reduced_bundle: Path) -> None:
    manifest = json.loads((reduced_bundle / "trio.json").read_bytes())
    (graph,) = (one for one in manifest["graphs"] if one["name"] == "suffix")
    graph["name"] = name
    with pytest.raises(ManifestError, match="expected a name of its own after the role suffix"):
        manifest_from_json(json.dumps(manifest).encode(), where="trio.json")


def test_a_probe_of_no_layer_is_refused_in_one_line(reduced_bundle: Path) -> None:
    manifest = json.loads((reduced_bundle / "trio.json").read_bytes())
    (select,) = (one for one in manifest["graphs"] if one["name"] == "select_1")
    manifest["graphs"].append(select | {"name": "probe_7", "role": "probe", "first_layer": -7})
    opened = manifest_from_json(json.dumps(manifest).encode(), where="trio.json")
    assert opened.format_of(opened.graphs[-1]) is None
    with pytest.raises(ManifestError, match="graph 'probe_7', inputs: expected"):
        check_tensors(opened, where="trio.json")
