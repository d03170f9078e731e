"""A manifest whose graphs are not what the runtime binds is refused before memory is planned from it."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from trio_edge.runtime.bundle.errors import ManifestError
from trio_edge.runtime.bundle.graph_io import check_tensors
from trio_edge.runtime.bundle.manifest import manifest_from_json

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Graph = dict[str, Any]
DECODER = ("prefix", "select_1", "segment_1", "select_2", "suffix", "head")


def check(bundle: Path, name: str, change: Callable[[Graph], object]) -> None:
    manifest = json.loads((bundle / "trio.json").read_bytes())
    change(next(graph for graph in manifest["graphs"] if graph["name"] == name))
    check_tensors(manifest_from_json(json.dumps(manifest).encode(), where="trio.json"), where="trio.json")


def replace(graph: Graph, *, side: str, index: int, other: dict[str, Any]) -> None:
    graph[side][index].update(other)


@pytest.mark.parametrize("side", ["inputs", "outputs"])
@pytest.mark.parametrize("name", DECODER)
def test_every_tensor_of_the_decoder_is_checked(name: str, side: str, reduced_bundle: Path) -> None:
    manifest = json.loads((reduced_bundle / "trio.json").read_bytes())
    tensors = next(graph for graph in manifest["graphs"] if graph["name"] == name)[side]
    for index, tensor in enumerate(tensors):
        dtype = "float32" if tensor["dtype"] == "int32" else "int32"
        for other in ({"name": "other"}, {"dtype": dtype}, {"shape": [*tensor["shape"], 2]}):
            with pytest.raises(
                ManifestError, match=rf"^trio.json: graph '{name}', {side}: expected {tensor['name']} "
            ):
                check(reduced_bundle, name, partial(replace, side=side, index=index, other=other))


@pytest.mark.parametrize("name", DECODER)
def test_a_missing_tensor_is_refused(name: str, reduced_bundle: Path) -> None:
    with pytest.raises(
        ManifestError, match=r"inputs: expected \d+ tensors, got \d+ tensors; export the bundle again"
    ):
        check(reduced_bundle, name, lambda graph: graph["inputs"].pop())


@pytest.mark.parametrize("name", ["vision", *DECODER])
def test_profiles_must_size_every_axis(name: str, reduced_bundle: Path) -> None:
    def empty(graph: Graph) -> None:
        graph["profiles"] = []

    def incomplete(graph: Graph) -> None:
        graph["profiles"][0]["sizes"].popitem()

    def negative(graph: Graph) -> None:
        graph["profiles"][0]["sizes"] = dict.fromkeys(graph["profiles"][0]["sizes"], -1)

    with pytest.raises(ManifestError, match=f"graph '{name}': expected profiles and outputs, got 0"):
        check(reduced_bundle, name, empty)
    with pytest.raises(
        ManifestError, match=f"graph '{name}(.\\w+)?', profile '.*': expected a size of [A-Z], got none"
    ):
        check(reduced_bundle, name, incomplete)
    with pytest.raises(ManifestError, match=r"Expected `int` >= 0 - at `\$\.graphs"):
        check(reduced_bundle, name, negative)
