"""Reads a manifest and checks that its files, graphs and programs fit each other, before memory is planned from them."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, NoReturn, TypeAlias, final, get_args

import msgspec

from trio_edge.runtime.bundle import graph_io
from trio_edge.runtime.bundle.errors import ManifestError, ScheduleError
from trio_edge.runtime.bundle.limits import MOST_TENSOR_BYTES, typed
from trio_edge.runtime.bundle.manifest import (
    CACHE,
    DTYPE_BYTES,
    MANIFEST_NAME,
    SCHEMA_VERSION,
    SENT,
    ZEROS,
    HostFunction,
    Manifest,
    shape_at,
    stack_of,
    stacks_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from trio_edge.runtime.bundle.manifest import GraphSpec, Launch, Program, StoredTensor

Array: TypeAlias = "tuple[str, tuple[int, ...]]"
"""Dtype and shape."""
_NUMBER = re.compile(r"[0-9]{1,4}")
_FOLLOW_UPS = ("question", "branch")
_TENSORS_ON_HOST = {
    "enter_head": ({graph_io.PROBE_OUTPUT}, {graph_io.HIDDEN, graph_io.LAST_ROW}),
    "likeliest_rows": (
        {graph_io.TOP_LOGITS, graph_io.TOP_IDS},
        {graph_io.CANDIDATE_LOGITS, graph_io.CANDIDATE_ROWS},
    ),
}
"""Inputs and outputs of functions on the host."""


def manifest_from_json(text: bytes, *, where: str) -> Manifest:
    """Return the manifest in ``text``, the bytes of ``trio.json``, if the runtime can obey it.

    Every file lies in the bundle; every graph has its role, its layers and profiles with all sizes; every tensor has a place,
    or no elements; every input has a source of its dtype and shape at each profile; the programs write what the host reads.

    Raises:
        ManifestError: If any of this is not so, if ``text`` is not JSON, has unknown or missing keys, wrong types or another
            schema version. The message begins with ``where``.
    """
    try:
        head = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ManifestError(
            f"{where}: expected JSON, got something else ({error}); export the bundle again"
        ) from None
    version = head.get("schema_version") if isinstance(head, dict) else None
    if version != SCHEMA_VERSION:
        raise ManifestError(
            f"{where}: manifest has schema_version {version!r}, this release reads {SCHEMA_VERSION};"
            " export the bundle again"
        )
    try:
        manifest = typed(head, Manifest)
        for check in (_check_sizes, _check_files, _check_tables, _check_graphs):
            check(manifest)
        _check_programs(manifest)
    except (msgspec.ValidationError, ManifestError, ScheduleError) as error:
        raise ManifestError(f"{where}: {error}; export the bundle again") from None
    return manifest


def _check_sizes(manifest: Manifest) -> None:
    """Raise ManifestError for impossible sizes that no type refuses."""
    dims = manifest.dimensions
    for name, sizes in (("text_buckets", manifest.text_buckets), ("visual_sizes", manifest.visual_sizes)):
        if not sizes or list(sizes) != sorted(set(sizes)):
            raise ManifestError(f"{name}: expected ascending sizes, got {sizes}")
    most = manifest.visual_sizes[-1]
    manifest.schedule.check_fits(num_layers=dims.num_layers, max_visual=most)
    flops = sum(manifest.cost.reduced_flops.values())
    if min(dims.num_layers, manifest.model_bytes, manifest.cost.reduced_kv_bytes, flops) < 1:
        raise ManifestError("dimensions, model_bytes, cost: expected numbers above 0, got 0")
    if (manifest.token_method is None) != (manifest.token_keep is None):
        raise ManifestError(
            f"token_keep: expected a number if there is a token_method, and none otherwise, got {manifest.token_keep}"
            f" with {manifest.token_method!r}"
        )
    kept = {
        place for program in manifest.programs for one in program.launches for place in one.outputs.values()
    }
    if (manifest.encoder_keep is not None) != ("kept.vision" in kept):
        raise ManifestError(
            "encoder_keep: expected a number if the vision graph returns the kept tokens, and none otherwise, got"
            f" {manifest.encoder_keep}"
        )
    if manifest.max_images > most or dims.num_heads % dims.num_kv_heads:
        raise ManifestError(
            f"max_images, num_kv_heads: expected at most {most} (visual tokens) and a divisor of {dims.num_heads}, got"
            f" {manifest.max_images} and {dims.num_kv_heads}"
        )


def _check_files(manifest: Manifest) -> None:
    known = {entry.path for entry in manifest.files}
    used = graph_files(manifest) | {manifest.text.tokenizer, manifest.text.chat_template}
    used |= {tensor.file for _, tensor, *_ in _tables(manifest)}
    if manifest.clip_text is not None:
        used.add(manifest.clip_text.tokenizer)
    if manifest.decisions is not None:
        used.add(manifest.decisions.template)
    for path in sorted(known | used):
        # A downloaded bundle must not name files outside of its folder.
        pure = PurePosixPath(path)
        is_odd = re.search(r"[\\:\x00-\x1f\x7f]", path) is not None or pure.as_posix() != path
        if pure.is_absolute() or ".." in pure.parts or is_odd or path in (".", MANIFEST_NAME):
            raise ManifestError(f"files: expected a path inside the bundle, got {path!r}")
    if len(known) != len(manifest.files):
        raise ManifestError("files: expected each file once, got one twice")
    if missing := sorted(used - known):
        raise ManifestError(f"files: expected an entry for {missing[0]!r}, got none")


def graph_files(manifest: Manifest) -> set[str]:
    """Return the ONNX files of all graphs and pieces."""
    return {file for spec in manifest.graphs for file in (spec.file, *(piece.file for piece in spec.pieces))}


def _tables(manifest: Manifest) -> Iterator[tuple[str, StoredTensor, tuple[int, ...], bool]]:
    """Yield the tables that the host reads: name, tensor, shape, and whether the elements are INT8."""
    shape = manifest.dimensions.vocab_size, manifest.dimensions.hidden_size
    for name, rows, scales in (
        ("token_embedding", manifest.token_embedding, manifest.token_embedding_scales),
        ("head_rows", manifest.head_rows, manifest.head_row_scales),
    ):
        if rows is not None:
            yield name, rows, shape, scales is not None
            if scales is not None:
                yield f"scales of {name}", scales, shape[:1], False


def _check_tables(manifest: Manifest) -> None:
    sizes = {entry.path: entry.num_bytes for entry in manifest.files}
    for name, tensor, shape, is_int8 in _tables(manifest):
        if tensor.dtype not in (("int8",) if is_int8 else ("float32", "float16")):
            rows = " rows, or int8 rows with scales" if len(shape) > 1 else ""
            raise ManifestError(f"{name}: expected float32 or float16{rows}, got {tensor.dtype}")
        end = tensor.offset + tensor.num_bytes
        if tensor.shape != shape or end > sizes[tensor.file]:
            raise ManifestError(
                f"{name}: expected {list(shape)} inside {tensor.file}, got {list(tensor.shape)} up to byte {end}"
            )


def _check_graphs(manifest: Manifest) -> None:
    roles = [spec.role for spec in manifest.graphs if spec.role != "probe"]
    num_stages = len(manifest.schedule.stages)
    expected = ["vision", *([] if manifest.clip_text is None else ["clip_text"])]
    expected += [*([] if manifest.token_method is None else ["reduce"]), "prefix"]
    for stage in range(num_stages):
        expected += ["select", "suffix" if stage == num_stages - 1 else "segment"]
    if roles != [*expected, "head"]:
        raise ManifestError(f"graphs: expected roles {[*expected, 'head']}, got {roles}")
    # KV rows are appended range by range, so a gap or an overlap would silently give wrong answers.
    next_layer = 0
    for spec in (spec for spec in manifest.graphs if spec.role in ("prefix", "segment", "suffix")):
        if spec.first_layer != next_layer or spec.num_layers < 1:
            raise ManifestError(
                f"graph {spec.name!r}: expected to start at layer {next_layer}, got {spec.first_layer}"
            )
        next_layer += spec.num_layers
    if next_layer != manifest.dimensions.num_layers:
        raise ManifestError(
            f"graphs: expected {manifest.dimensions.num_layers} decoder layers, got {next_layer}"
        )
    found: set[str] = set()
    for spec in manifest.graphs:
        # Files are named after graphs, so a name must follow from the role.
        name, role = spec.name, spec.role
        is_numbered = role in ("probe", "select", "segment") and _NUMBER.fullmatch(
            name.removeprefix(f"{role}_")
        )
        is_known = name == role or is_numbered or (role, name) == ("probe", "gradient")
        if not is_known or name in found:
            raise ManifestError(
                f"graphs: expected a unique name that follows from the role {role}, got {name!r}"
            )
        found.add(name)
        _check_graph(spec)


def _check_graph(spec: GraphSpec) -> None:
    """Raise ManifestError unless the profiles have all sizes, and each tensor and profile belongs to one piece."""
    if not spec.profiles or not spec.outputs:
        raise ManifestError(
            f"graph {spec.name!r}: expected profiles and outputs, got {len(spec.profiles)} and {len(spec.outputs)}"
        )
    for field_name in ("inputs", "outputs", "profiles"):
        whole = sorted(entry.name for entry in getattr(spec, field_name))
        if spec.pieces and sorted(n for piece in spec.pieces for n in getattr(piece, field_name)) != whole:
            raise ManifestError(
                f"graph {spec.name!r}: expected each input, output and profile in one of its pieces, got others"
            )
    for part in spec.split():
        symbols = {axis for tensor in part.tensors for axis in tensor.shape if isinstance(axis, str)}
        for profile in part.profiles:
            place = f"graph {part.name!r}, profile {profile.name!r}"
            if missing := sorted(symbols - profile.sizes.keys()):
                raise ManifestError(f"{place}: expected a size of {missing[0]}, got none")
            for tensor in part.tensors:
                shape = shape_at(tensor.shape, profile)
                if math.prod(shape) * DTYPE_BYTES[tensor.dtype] > MOST_TENSOR_BYTES:
                    raise ManifestError(
                        f"{place}: expected tensors of at most {MOST_TENSOR_BYTES >> 40} TiB, got {tensor.name}"
                        f" {_text((tensor.dtype, shape))}"
                    )


# What the host sends to programs and reads from them


def sent_by_host(manifest: Manifest, program: str, sizes: Mapping[str, int]) -> dict[str, Array]:
    """Return what the host sends before ``program`` runs at ``sizes``, or between its launches, except the images.

    ``rows`` are put together on the device from text and visual tokens.
    """
    width, dtype, axes = manifest.dimensions.hidden_size, manifest.dtype, manifest.position_axes
    if program in ("decode", "branch"):
        rows = sizes.get("T", 1)
        found: dict[str, Array] = {"branch.last_row": ("int32", (1,))} if program == "branch" else {}
        space, embeds = ("branch", "embeds") if program == "branch" else ("step", "embedding")
        found[f"{space}.{embeds}"] = dtype, (1, rows, width)
        for index in range(len(manifest.schedule.stages) + 1):
            found[f"{space}.position_ids.{index}"] = "int32", (axes, rows)
            found[f"{space}.past_length.{index}"] = "int32", (1,)
        return found
    if program == "question":
        rows = sizes["T"]
        return {
            "question.embeds": (dtype, (1, rows, width)),
            "question.position_ids": ("int32", (axes, rows)),
            "question.past_length": ("int32", (1,)),
        }
    if program not in ("prefill", "exact"):
        return {}
    visual, rows, num_probes = sizes["N"], sizes["N"] + sizes["T"], manifest.schedule.num_probe_rows
    count = graph_io.num_candidates(manifest.dimensions)
    found = {
        "rows.embeds": (dtype, (1, rows, width)),
        "prompt.position_ids": ("int32", (axes, rows)),
        "prompt.visual_rows": ("int32", (visual,)),
        "prompt.visual_images": ("int32", (visual,)),
        "prompt.is_visual": ("int32", (rows,)),
        "prompt.length": ("int32", (1,)),
        "prompt.last_row": ("int32", (1,)),
        "entering.hidden_states": (dtype, (1, num_probes, width)),
        "entering.rows": ("int32", (num_probes,)),
        "likeliest.logits": ("float32", (num_probes, count)),
        "likeliest.rows": (dtype, (num_probes, count, width)),
    }
    for layer in range(manifest.num_deepstack):
        found[f"rows.deepstack.{layer}"] = dtype, (1, rows, width)
    for stage in range(len(manifest.schedule.stages)):
        found[f"prompt.length.{stage}"] = found[f"prompt.num_visual.{stage}"] = "int32", (1,)
        found[f"prompt.probe_rows.{stage}"] = "int32", (num_probes,)
    return found


def read_by_host(manifest: Manifest, program: str, sizes: Mapping[str, int]) -> dict[str, Array]:
    """Return what the host reads after ``program`` has run at ``sizes``, or writes in place of a select graph."""
    stages, rows = manifest.schedule.stages, (manifest.dtype, manifest.dimensions.hidden_size)
    best = graph_io.num_candidates(manifest.dimensions)
    head = next(spec for spec in manifest.graphs if spec.role == "head")
    top = (1, best) if graph_io.is_shared(head) else (best,)
    if program in ("vision", "reduce"):
        count = sizes["N"] if program == "vision" else manifest.token_keep or 0
        names = graph_io.token_outputs(program, manifest.num_deepstack)
        found: dict[str, Array] = {f"{program}.{name}": (rows[0], (count, rows[1])) for name in names}
        return found if program == "vision" else found | {"kept.reduce": ("int32", (count,))}
    if program not in ("prefill", "branch", "decode"):
        return {}
    space, top_space = ("logits", "top") if program == "decode" else ("results", "results")
    found = {
        f"{space}.logits": ("float32", (1, manifest.dimensions.vocab_size)),
        f"{top_space}.top_logits": ("float32", top),
        f"{top_space}.top_ids": ("int32", top),
    }
    if program != "prefill":
        return found
    entering = sizes["N"]
    for index, stage in enumerate(stages):
        found[f"results.kept_indices.{index}"] = "int32", (stage.keep,)
        found[f"results.scores.{index}"] = "float32", (entering,)
        found[f"results.unsettled.{index}"] = "int32", (1,)
        found[f"select_{index + 1}.{graph_io.KEPT_VISUAL_ROWS}"] = "int32", (stage.keep,)
        if manifest.schedule.budget == "image":
            found[f"select_{index + 1}.{graph_io.KEPT_VISUAL_IMAGES}"] = "int32", (stage.keep,)
        entering = stage.keep
    return found


# Programs


def _check_programs(manifest: Manifest) -> None:
    names = [program.name for program in manifest.programs]
    wanted = ["vision", *([] if manifest.token_method is None else ["reduce"]), "prefill", "decode"]
    if manifest.schedule.stages:
        wanted.append("exact")
    optional = [name for name in names if name in _FOLLOW_UPS]
    if [name for name in names if name not in optional] != wanted or len(set(optional)) < len(optional):
        raise ManifestError(f"programs: expected {wanted}, got {names}")
    used = {launch.runs for program in manifest.programs for launch in program.launches}
    if unused := [spec.name for spec in manifest.graphs if spec.name not in used]:
        raise ManifestError(f"graph {unused[0]!r}: expected a program that runs it, got none")
    earlier: dict[str, set[Array]] = defaultdict(set)
    kv = manifest.kv_dtype, manifest.kv_capacities
    for program in manifest.programs:
        runs = [_Run(manifest, kv, program, index, earlier) for index in range(len(program.sizes))]
        if not program.launches:
            runs[0].refuse("launches", "none")
        if (sizes := _sizes_of(manifest, program)) != program.sizes:
            raise ManifestError(f"program {program.name!r}: expected the sizes {sizes}, got {program.sizes}")
        for run in runs:
            run.check()
        for run in runs:
            for place, array in run.written.items():
                earlier[place].add(array)


def _sizes_of(manifest: Manifest, program: Program) -> tuple[dict[str, int], ...]:
    """Return the sizes at which the runtime will ask for ``program``."""
    if program.name in ("vision", "reduce"):
        (spec,) = (spec for spec in manifest.graphs if spec.name == program.name)
        return tuple(profile.sizes for profile in spec.profiles)
    if program.name in _FOLLOW_UPS:
        smaller = {size.get("T", 0) for size in program.sizes} & set(range(1, manifest.text_buckets[-1]))
        return tuple({"T": rows} for rows in (*sorted(smaller), manifest.text_buckets[-1]))
    if program.name == "decode":
        return ({},)
    return tuple({"N": rows, "T": text} for rows in manifest.visual_sizes for text in manifest.text_buckets)


@final
@dataclass(slots=True)
class _Run:
    """Follows a program at one of its sizes and remembers what it has written."""

    manifest: Manifest
    kv: tuple[str, tuple[int, ...]]
    """Element type of the KV caches, and the rows of each layer range's."""
    program: Program
    index: int
    """Index of the size."""
    earlier: Mapping[str, set[Array]]
    """The arrays that earlier programs wrote, by place."""
    sent: dict[str, Array] = field(default_factory=dict)
    written: dict[str, Array] = field(default_factory=dict)
    launch: Launch | None = None

    def check(self) -> None:
        sizes = self.program.sizes[self.index]
        self.sent = sent_by_host(self.manifest, self.program.name, sizes)
        for launch in self.program.launches:
            self.launch = launch
            if launch.profiles:
                self._check_graph(launch)
            else:
                self._check_function(launch)
        self.launch = None
        for place, array in read_by_host(self.manifest, self.program.name, sizes).items():
            if (got := self.written.get(place)) != array:
                self.refuse(f"to write {place} {_text(array)}", _text(got))

    def refuse(self, expected: str, got: str) -> NoReturn:
        launch = "" if self.launch is None else f", {self.launch.runs}"
        raise ManifestError(f"program {self.program.name!r}{launch}: expected {expected}, got {got}")

    def _check_graph(self, launch: Launch) -> None:
        spec = next((spec for spec in self.manifest.graphs if spec.name == launch.runs), None)
        if spec is None:
            self.refuse("a graph of the bundle", launch.runs)
        name = launch.profiles[self.index] if self.index < len(launch.profiles) else None
        profile = next((profile for profile in spec.profiles if profile.name == name), None)
        if profile is None:
            self.refuse("a profile of the graph for each of the program's sizes", repr(name))
        shapes = {tensor.name: (tensor.dtype, shape_at(tensor.shape, profile)) for tensor in spec.tensors}
        for side, tensors, places in (
            ("inputs", spec.inputs, launch.inputs),
            ("outputs", spec.outputs, launch.outputs),
        ):
            if unknown := sorted(places.keys() - {tensor.name for tensor in tensors}):
                self.refuse(f"{side} of the graph", unknown[0])
            for tensor in tensors:
                place, array = places.get(tensor.name), shapes[tensor.name]
                if place is None:
                    if math.prod(array[1]):
                        self.refuse(f"a place of {tensor.name} {_text(array)}", "none")
                elif side == "inputs":
                    self._check_source(tensor.name, place, array, stage=launch.stage)
                elif place in self.sent or place.partition(".")[0] in SENT:
                    self.refuse(f"a place that the host does not write for {tensor.name}", place)
                else:
                    self.written[place] = array
        if len(set(launch.outputs.values())) != len(launch.outputs):
            self.refuse("a place of its own for each output", "one twice")
        self._check_stacks(spec, launch, shapes)

    def _check_source(self, name: str, place: str, array: Array, *, stage: int) -> None:
        is_image = place.startswith("image.") and self.program.name in ("vision", "reduce")
        if place.startswith(ZEROS) or is_image:
            return
        if place.startswith(CACHE):  # none or all rows of a KV cache
            wanted = [self._kv_rows(rows) for rows in (0, *self.kv[1][stage : stage + 1])]
            if array not in wanted:
                self.refuse(f"{name} {_text(wanted[-1])} from a KV cache", _text(array))
            return
        known = self.written.get(place) or self.sent.get(place)
        if known != array and (known is not None or array not in self.earlier.get(place, ())):
            self.refuse(f"{name} {_text(array)} from {place}", _text(known))

    def _kv_rows(self, rows: int) -> Array:
        """Return dtype and shape of the keys, or values, of ``rows`` rows of a layer."""
        dims = self.manifest.dimensions
        return self.kv[0], (1, dims.num_kv_heads, rows, dims.head_size)

    def _check_stacks(self, spec: GraphSpec, launch: Launch, shapes: Mapping[str, Array]) -> None:
        """Raise unless each stack holds equal tensors, in the graph's order and without gaps, and new rows fit their cache."""
        stacks: dict[str, list[str]] = {}
        for places, tensors in ((launch.inputs, spec.inputs), (launch.outputs, spec.outputs)):
            known = {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}
            order = [tensor.name for tensor in tensors if stack_of(places.get(tensor.name, ""))]
            side = stacks_of(places)
            indices = sorted(found[1] for place in places.values() if (found := stack_of(place)) is not None)
            is_whole = len(side) < 2 and [name for names in side.values() for name in names] == order
            if not is_whole or indices != list(range(len(indices))):
                self.refuse("one stack in the graph's order", str(sorted(side)))
            if len({known[name] for name in order}) > 1:
                self.refuse("equal tensors in a stack", ", ".join(order))
            stacks |= side
        if launch.cache is None:
            if stacks:
                self.refuse("a KV cache for new rows", "none")
            return
        read = stacks.pop(launch.cache, [])
        if not read or [len(names) for names in stacks.values()] != [len(read)]:
            self.refuse(f"as many new keys and values as inputs from {launch.cache}", str([*stacks]))
        wanted, (new,) = self._kv_rows(self._new_rows(launch.stage)), stacks.values()
        if shapes[new[0]] != wanted:
            self.refuse(f"new rows {_text(wanted)}", _text(shapes[new[0]]))

    def _new_rows(self, stage: int) -> int:
        """Return the rows that a layer range writes after ``stage`` selections."""
        if self.program.name == "decode":
            return 1
        sizes, stages = self.program.sizes[self.index], self.manifest.schedule.stages
        if self.program.name != "prefill" or stage > len(stages):
            return sizes["T"]
        return sizes["T"] + (stages[stage - 1].keep if stage else sizes["N"])

    def _check_function(self, launch: Launch) -> None:
        if launch.runs not in get_args(HostFunction):
            self.refuse(f"a graph with profiles, or one of {', '.join(get_args(HostFunction))}", launch.runs)
        if launch.runs == "exact_nms":  # it writes the places of its stage's select graph, which it replaces
            (prefill,) = (program for program in self.manifest.programs if program.name == "prefill")
            runs, replaced = f"select_{launch.stage + 1}", (launch.inputs, launch.outputs)
            if not any(
                other.runs == runs and (other.inputs, other.outputs) == replaced for other in prefill.launches
            ):
                self.refuse(f"the places of stage {launch.stage} in the prefill", "others")
            return
        if launch.runs == "likeliest_rows" and self.manifest.head_rows is None:
            self.refuse("head_rows in the manifest", "none")
        inputs, outputs = _TENSORS_ON_HOST[launch.runs]
        if launch.inputs.keys() != inputs or launch.outputs.keys() != outputs:
            self.refuse(
                ", ".join(sorted(inputs | outputs)), ", ".join(sorted(launch.inputs | launch.outputs))
            )
        if unwritten := sorted(set(launch.inputs.values()) - self.written.keys()):
            self.refuse("a place that an earlier launch writes", unwritten[0])
        if unsent := sorted(set(launch.outputs.values()) - self.sent.keys()):
            self.refuse("a place that the host sends", unsent[0])


def _text(array: Array | None) -> str:
    return "none" if array is None else f"{array[0]} [{', '.join(map(str, array[1]))}]"
