"""A manifest whose programs the runtime cannot obey is refused before memory is planned from it."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from trio_edge.runtime.bundle.checks import manifest_from_json
from trio_edge.runtime.bundle.errors import ManifestError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Json = dict[str, Any]
DECODER = ("prefix", "select_1", "segment_1", "select_2", "suffix", "head")


def check(bundle: Path, change: Callable[[Json], object]) -> None:
    manifest = json.loads((bundle / "trio.json").read_bytes())
    change(manifest)
    manifest_from_json(json.dumps(manifest).encode(), where="trio.json")


def graph(manifest: Json, name: str) -> Json:
    found: Json = next(entry for entry in manifest["graphs"] if entry["name"] == name)
    return found


def launches(manifest: Json, program: str = "prefill") -> list[Json]:
    found: list[Json] = next(entry for entry in manifest["programs"] if entry["name"] == program)["launches"]
    return found


def change_tensor(manifest: Json, *, name: str, side: str, index: int, other: Json) -> None:
    graph(manifest, name)[side][index].update(other)


@pytest.mark.parametrize("side", ["inputs", "outputs"])
@pytest.mark.parametrize("name", DECODER)
def test_every_tensor_of_the_decoder_is_checked(name: str, side: str, reduced_bundle: Path) -> None:
    manifest = json.loads((reduced_bundle / "trio.json").read_bytes())
    for index, tensor in enumerate(graph(manifest, name)[side]):
        dtype = "float32" if tensor["dtype"] == "int32" else "int32"
        for other in ({"name": "other"}, {"dtype": dtype}, {"shape": [*tensor["shape"], 2]}):
            with pytest.raises(ManifestError, match=r"^trio.json: .*; export the bundle again$"):
                check(reduced_bundle, partial(change_tensor, name=name, side=side, index=index, other=other))


@pytest.mark.parametrize("program", ["vision", "prefill", "decode", "exact"])
def test_every_place_is_checked(program: str, reduced_bundle: Path) -> None:
    manifest = json.loads((reduced_bundle / "trio.json").read_bytes())
    for number, launch in enumerate(launches(manifest, program)):
        for side in ("inputs", "outputs"):
            for tensor, place in launch[side].items():
                if place.startswith(("zeros.", "image.")):  # the graph reads what is there
                    continue

                def forget(
                    changed: Json, number: int = number, side: str = side, tensor: str = tensor
                ) -> None:
                    del launches(changed, program)[number][side][tensor]

                def misname(
                    changed: Json, number: int = number, side: str = side, tensor: str = tensor
                ) -> None:
                    places = launches(changed, program)[number][side]
                    places[tensor] = "rows.other" if side == "outputs" else "other.place"

                with pytest.raises(ManifestError, match=rf"program '{program}'.*; export the bundle again$"):
                    check(reduced_bundle, forget)
                with pytest.raises(ManifestError, match=r"program '\w+'.*; export the bundle again$"):
                    check(reduced_bundle, misname)


def test_launches_must_come_in_an_order_in_which_sources_exist(reduced_bundle: Path) -> None:
    def swap(manifest: Json) -> None:
        found = launches(manifest)
        found[0], found[1] = found[1], found[0]

    with pytest.raises(ManifestError, match=r"from prefix\.hidden_states_out, got none"):
        check(reduced_bundle, swap)


def test_keys_and_values_of_two_layers_cannot_be_swapped(reduced_bundle: Path) -> None:
    def swap(manifest: Json) -> None:
        inputs = launches(manifest, "decode")[0]["inputs"]
        first, second, *_ = (name for name in inputs if name.startswith("past_key_values."))
        inputs[first], inputs[second] = inputs[second], inputs[first]

    with pytest.raises(ManifestError, match="expected stacks in the graph's order"):
        check(reduced_bundle, swap)


def test_programs_run_at_the_sizes_that_the_runtime_asks_for(reduced_bundle: Path) -> None:
    def one_less(manifest: Json) -> None:
        next(entry for entry in manifest["programs"] if entry["name"] == "prefill")["sizes"].pop()

    with pytest.raises(ManifestError, match="program 'prefill': expected the sizes"):
        check(reduced_bundle, one_less)


@pytest.mark.parametrize("program", ["vision", "prefill", "decode", "exact"])
def test_no_program_may_be_missing(program: str, reduced_bundle: Path) -> None:
    def remove(manifest: Json) -> None:
        manifest["programs"] = [entry for entry in manifest["programs"] if entry["name"] != program]

    with pytest.raises(ManifestError, match="programs: expected"):
        check(reduced_bundle, remove)


def test_a_function_that_the_runtime_does_not_have_is_refused(reduced_bundle: Path) -> None:
    def rename(manifest: Json) -> None:
        launches(manifest, "exact")[0]["runs"] = "os.system"

    with pytest.raises(ManifestError, match=r"one of enter_head, likeliest_rows, exact_nms, got os\.system"):
        check(reduced_bundle, rename)


@pytest.mark.parametrize("place", ["../weights", "a b", "prompt.length[1", "x" * 300, ""])
def test_a_place_has_a_name(place: str, reduced_bundle: Path) -> None:
    def rename(manifest: Json) -> None:
        launches(manifest)[0]["inputs"]["inputs_embeds"] = place

    with pytest.raises(ManifestError, match="export the bundle again"):
        check(reduced_bundle, rename)


@pytest.mark.parametrize("name", ["vision", *DECODER])
def test_profiles_must_size_every_axis(name: str, reduced_bundle: Path) -> None:
    def empty(manifest: Json) -> None:
        graph(manifest, name)["profiles"] = []

    def incomplete(manifest: Json) -> None:
        graph(manifest, name)["profiles"][0]["sizes"].popitem()

    def negative(manifest: Json) -> None:
        first = graph(manifest, name)["profiles"][0]
        first["sizes"] = dict.fromkeys(first["sizes"], -1)

    with pytest.raises(ManifestError, match=f"graph '{name}': expected profiles and outputs, got 0"):
        check(reduced_bundle, empty)
    with pytest.raises(
        ManifestError, match=f"graph '{name}(.\\w+)?', profile '.*': expected a size of [A-Z], got none"
    ):
        check(reduced_bundle, incomplete)
    with pytest.raises(ManifestError, match=r"Expected `int` >= 0 - at `\$\.graphs"):
        check(reduced_bundle, negative)
