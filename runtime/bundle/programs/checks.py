"""Checks that a manifest's graphs and programs fit each other, before memory is planned from them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn, final, get_args

from trio_edge.runtime.bundle.errors import ManifestError
from trio_edge.runtime.bundle.graph_io import (
    CANDIDATE_LOGITS,
    CANDIDATE_ROWS,
    HIDDEN,
    LAST_ROW,
    PROBE_OUTPUT,
    TOP_IDS,
    TOP_LOGITS,
)
from trio_edge.runtime.bundle.limits import MOST_TENSOR_BYTES
from trio_edge.runtime.bundle.manifest import DTYPE_BYTES, shape_at
from trio_edge.runtime.bundle.programs.host import read_by_host, sent_by_host
from trio_edge.runtime.bundle.programs.program import CACHE, SENT, ZEROS, HostFunction, stack_of, stacks_of

if TYPE_CHECKING:
    from trio_edge.runtime.bundle.manifest import GraphSpec, Manifest, Profile
    from trio_edge.runtime.bundle.programs.host import Array
    from trio_edge.runtime.bundle.programs.program import Launch, Program

_TENSORS_ON_HOST = {
    "enter_head": ({PROBE_OUTPUT}, {HIDDEN, LAST_ROW}),
    "likeliest_rows": ({TOP_LOGITS, TOP_IDS}, {CANDIDATE_LOGITS, CANDIDATE_ROWS}),
}
"""Inputs and outputs of functions on the host."""


def check_programs(manifest: Manifest, *, where: str) -> None:
    """Raise ManifestError, with a message that begins with ``where``, unless the runtime can obey the programs.

    Every graph has profiles with all sizes; every tensor has a place, or no elements; every input has a source of its dtype
    and shape at each profile; and the programs write what the host reads.
    """
    for spec in manifest.graphs:
        if not spec.profiles or not spec.outputs:
            raise ManifestError(
                f"{where}: graph {spec.name!r}: expected profiles and outputs, got {len(spec.profiles)} and"
                f" {len(spec.outputs)}; export the bundle again"
            )
        _check_pieces(spec, where=where)
        for piece in spec.split():
            _check_profiles(piece, where=where)
    names = [program.name for program in manifest.programs]
    wanted = ["vision", *([] if manifest.token_method is None else ["reduce"]), "prefill", "decode"]
    if manifest.schedule.stages:
        wanted.append("exact")
    if [name for name in names if name != "question"] != wanted or names.count("question") > 1:
        raise ManifestError(f"{where}: programs: expected {wanted}, got {names}; export the bundle again")
    run = {launch.runs for program in manifest.programs for launch in program.launches}
    if unused := [spec.name for spec in manifest.graphs if spec.name not in run]:
        raise ManifestError(
            f"{where}: graph {unused[0]!r}: expected a program that runs it, got none; export the bundle again"
        )
    checker = _Checker(manifest, where)
    for program in manifest.programs:
        checker.check(program)


@final
@dataclass(slots=True)
class _Checker:
    """Follows the programs and remembers what they have written."""

    manifest: Manifest
    where: str
    earlier: dict[str, set[Array]] = field(default_factory=dict)
    """What earlier programs wrote to each place."""
    program: str = ""
    launch: str = ""

    def check(self, program: Program) -> None:
        self.program, self.launch = program.name, ""
        if not program.launches:
            self._refuse("launches", "none")
        if (wanted := self._sizes_of(program)) != program.sizes:
            self._refuse(f"the sizes {wanted}", str(program.sizes))
        found: dict[str, set[Array]] = {}
        for index, sizes in enumerate(program.sizes):
            try:
                sent = sent_by_host(self.manifest, program.name, sizes)
                read = read_by_host(self.manifest, program.name, sizes)
            except KeyError as error:
                self._refuse(f"a size of {error.args[0]}", "none")
            written: dict[str, Array] = {}
            for launch in program.launches:
                self.launch = launch.runs
                if launch.profiles:
                    self._check_graph(launch, index, sent=sent, written=written)
                    self._check_cache(launch, index, program)
                else:
                    self._check_function(launch, sent=sent, written=written)
            self.launch = ""
            for place, array in read.items():
                if (got := written.get(place)) != array:
                    self._refuse(f"to write {place} {_text(array)}", _text(got))
            for place, array in written.items():
                found.setdefault(place, set()).add(array)
        for place, arrays in found.items():
            self.earlier.setdefault(place, set()).update(arrays)

    def _sizes_of(self, program: Program) -> tuple[dict[str, int], ...]:
        """Return the sizes at which the runtime will ask for ``program``."""
        manifest = self.manifest
        if program.name in ("vision", "reduce"):
            return tuple(profile.sizes for profile in manifest.graph(program.name).profiles)
        if program.name == "question":
            return tuple({"T": bucket} for bucket in manifest.text_buckets)
        if program.name == "decode":
            return ({},)
        return tuple(
            {"N": rows, "T": bucket} for rows in manifest.visual_sizes for bucket in manifest.text_buckets
        )

    def _check_graph(
        self, launch: Launch, index: int, *, sent: dict[str, Array], written: dict[str, Array]
    ) -> None:
        spec, profile = self._graph_at(launch, index)
        for side, tensors, places in (
            ("inputs", spec.inputs, launch.inputs),
            ("outputs", spec.outputs, launch.outputs),
        ):
            if unknown := sorted(places.keys() - {tensor.name for tensor in tensors}):
                self._refuse(f"{side} of the graph", unknown[0])
            for tensor in tensors:
                shape = shape_at(tensor.shape, profile)
                place, array = places.get(tensor.name), (tensor.dtype, shape)
                if place is None:
                    if math.prod(shape):
                        self._refuse(f"a place of {tensor.name} {_text(array)}", "none")
                elif side == "inputs":
                    self._check_source(
                        tensor.name, place, array, stage=launch.stage, sent=sent, written=written
                    )
                else:
                    self._check_target(tensor.name, place, sent=sent)
                    written[place] = array
        if len(set(launch.outputs.values())) != len(launch.outputs):
            self._refuse("a place of its own for each output", "one twice")
        self._check_stacks(spec, launch)

    def _graph_at(self, launch: Launch, index: int) -> tuple[GraphSpec, Profile]:
        spec = next((graph for graph in self.manifest.graphs if graph.name == launch.runs), None)
        if spec is None:
            self._refuse("a graph of the bundle", launch.runs)
        name = launch.profiles[index] if index < len(launch.profiles) else None
        profile = next((profile for profile in spec.profiles if profile.name == name), None)
        if profile is None:
            self._refuse("a profile of the graph for each of the program's sizes", repr(name))
        return spec, profile

    def _check_source(
        self,
        name: str,
        place: str,
        array: Array,
        *,
        stage: int,
        sent: dict[str, Array],
        written: dict[str, Array],
    ) -> None:
        if place.startswith(ZEROS):
            return
        if place.startswith(CACHE):
            self._check_cached(name, array, stage=stage)
            return
        if place.startswith("image.") and self.program in ("vision", "reduce"):
            return
        known = written.get(place) or sent.get(place)
        if known is None and array in self.earlier.get(place, ()):
            return
        if known != array:
            self._refuse(f"{name} {_text(array)} from {place}", _text(known))

    def _check_cached(self, name: str, array: Array, *, stage: int) -> None:
        """Raise unless an input has none or all rows of a KV cache."""
        dims, capacities = self.manifest.dimensions, self.manifest.kv_capacities
        sizes = (0, *capacities[stage : stage + 1])
        wanted = [(self.manifest.kv_dtype, (1, dims.num_kv_heads, rows, dims.head_size)) for rows in sizes]
        if array not in wanted:
            self._refuse(f"{name} {_text(wanted[-1])} from a KV cache", _text(array))

    def _check_target(self, name: str, place: str, *, sent: dict[str, Array]) -> None:
        if place in sent or place.partition(".")[0] in SENT:
            self._refuse(f"a place that the host does not write for {name}", place)

    def _check_stacks(self, spec: GraphSpec, launch: Launch) -> None:
        """Raise unless each stack holds equal tensors, in the graph's order and without gaps."""
        for places, tensors in ((launch.inputs, spec.inputs), (launch.outputs, spec.outputs)):
            known = {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}
            order = [tensor.name for tensor in tensors if stack_of(places.get(tensor.name, ""))]
            stacks = stacks_of(places)
            indices = [found[1] for place in places.values() if (found := stack_of(place)) is not None]
            is_whole = len(stacks) < 2 and [name for names in stacks.values() for name in names] == order
            if not is_whole or sorted(indices) != list(range(len(indices))):
                self._refuse("one stack in the graph's order", str(sorted(stacks)))
            if len({known[name] for name in order}) > 1:
                self._refuse("equal tensors in a stack", ", ".join(order))

    def _check_cache(self, launch: Launch, index: int, program: Program) -> None:
        """Raise unless new rows fit the cache that they are appended to."""
        read, new = stacks_of(launch.inputs), stacks_of(launch.outputs)
        if launch.cache is None:
            if read or new:
                self._refuse("a KV cache for new rows", "none")
            return
        if [*read] != [launch.cache] or [len(names) for names in new.values()] != [len(read[launch.cache])]:
            self._refuse(f"as many new keys and values as inputs from {launch.cache}", str([*read]))
        spec, profile = self._graph_at(launch, index)
        tensor = next(tensor for tensor in spec.outputs if tensor.name == next(iter(new.values()))[0])
        rows = [stage.keep for stage in self.manifest.schedule.stages]
        sizes = program.sizes[index]
        expected = 1 if self.program == "decode" else sizes["T"]
        if self.program == "prefill":
            expected += [sizes["N"], *rows, *(0 for _ in range(launch.stage))][launch.stage]
        dtype, shape = tensor.dtype, shape_at(tensor.shape, profile)
        dims = self.manifest.dimensions
        wanted = self.manifest.kv_dtype, (1, dims.num_kv_heads, expected, dims.head_size)
        if (dtype, shape) != wanted:
            self._refuse(f"new rows {_text(wanted)}", _text((dtype, shape)))

    def _check_function(self, launch: Launch, *, sent: dict[str, Array], written: dict[str, Array]) -> None:
        if launch.runs not in get_args(HostFunction):
            self._refuse(f"a graph with profiles, or one of {', '.join(get_args(HostFunction))}", launch.runs)
        if launch.runs == "exact_nms":
            self._check_exact(launch)
            return
        if launch.runs == "likeliest_rows" and self.manifest.head_rows is None:
            self._refuse("head_rows in the manifest", "none")
        inputs, outputs = _TENSORS_ON_HOST[launch.runs]
        if launch.inputs.keys() != inputs or launch.outputs.keys() != outputs:
            self._refuse(", ".join(sorted(inputs | outputs)), ", ".join(sorted(launch.places)))
        for place in launch.inputs.values():
            if place not in written:
                self._refuse("a place that an earlier launch writes", place)
        for place in launch.outputs.values():
            if place not in sent:
                self._refuse("a place that the host sends", place)

    def _check_exact(self, launch: Launch) -> None:
        """Raise unless the launch has the places of its stage's select graph, which it replaces."""
        prefill = self.manifest.program("prefill")
        replaced = next(
            (
                other
                for other in prefill.launches
                if other.stage == launch.stage and other.runs == f"select_{launch.stage + 1}"
            ),
            None,
        )
        if replaced is None or replaced.places != launch.places:
            self._refuse(f"the places of stage {launch.stage} in the prefill", "others")

    def _refuse(self, expected: str, got: str) -> NoReturn:
        launch = f", {self.launch}" if self.launch else ""
        raise ManifestError(
            f"{self.where}: program {self.program!r}{launch}: expected {expected}, got {got}; export the bundle again"
        )


def _check_pieces(spec: GraphSpec, *, where: str) -> None:
    """Raise ManifestError unless every input, output and profile of a graph with pieces belongs to one piece."""
    if not spec.pieces:
        return
    for whole, parts in (
        (spec.input_names, [piece.inputs for piece in spec.pieces]),
        (tuple(tensor.name for tensor in spec.outputs), [piece.outputs for piece in spec.pieces]),
        (tuple(profile.name for profile in spec.profiles), [piece.profiles for piece in spec.pieces]),
    ):
        if sorted(name for part in parts for name in part) != sorted(whole):
            raise ManifestError(
                f"{where}: graph {spec.name!r}: expected each input, output and profile in one of its pieces, got others;"
                " export the bundle again"
            )


def _check_profiles(spec: GraphSpec, *, where: str) -> None:
    symbols = {axis for tensor in spec.tensors for axis in tensor.shape if isinstance(axis, str)}
    for profile in spec.profiles:
        if missing := sorted(symbols - profile.sizes.keys()):
            raise ManifestError(
                f"{where}: graph {spec.name!r}, profile {profile.name!r}: expected a size of {missing[0]}, got none;"
                " export the bundle again"
            )
        for tensor in spec.tensors:
            shape = shape_at(tensor.shape, profile)
            if math.prod(shape) * DTYPE_BYTES[tensor.dtype] > MOST_TENSOR_BYTES:
                raise ManifestError(
                    f"{where}: graph {spec.name!r}, profile {profile.name!r}: expected tensors of at most"
                    f" {MOST_TENSOR_BYTES >> 40} TiB, got {tensor.name} {_text((tensor.dtype, shape))}; export the bundle"
                    " again"
                )


def _text(array: Array | None) -> str:
    return "none" if array is None else f"{array[0]} [{', '.join(map(str, array[1]))}]"
