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
    SLOT_STATES,
    SLOTS,
    STATES,
    ZEROS,
    HostFunction,
    Manifest,
    shape_at,
    stack_of,
    stacks_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from trio_edge.runtime.bundle.manifest import GraphSpec, Launch, Program, ProgramName, StoredTensor

Array: TypeAlias = "tuple[str, tuple[int, ...]]"
"""Dtype and shape."""
_HostRow: TypeAlias = "tuple[str, str, str]"
"""Place, dtype and axes. What stands in braces counts the places: planes, layer ranges, or stages from 0 or from 1."""
_NUMBER = re.compile(r"[0-9]{1,4}")
_FOLLOW_UPS = ("question", "branch")
_OPTIONAL = (*_FOLLOW_UPS, "batch")
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
        _check_files(manifest)
        _check_tables(manifest)
        for name in manifest.level_names:
            level = manifest.at_level(name)
            for check in (_check_sizes, _check_graphs, _check_programs):
                check(level)
        _check_levels(manifest)
    except (msgspec.ValidationError, ManifestError, ScheduleError) as error:
        raise ManifestError(f"{where}: {error}; export the bundle again") from None
    return manifest


def _require(is_right: object, where: str, expected: str, got: object) -> None:
    if not is_right:
        raise ManifestError(f"{where}: expected {expected}, got {got}")


def _check_levels(manifest: Manifest) -> None:
    """Raise ManifestError unless the levels' names differ, and several together run every graph at every profile."""
    names = manifest.level_names
    _require(len(names) == len(manifest.levels) + 1, "levels", "different names", ", ".join(names))
    launches = [launch for program in manifest.all_programs for launch in program.launches]
    for spec in manifest.graphs if manifest.levels else ():
        used = {name for launch in launches if launch.runs == spec.name for name in launch.profiles}
        unused = sorted({profile.name for profile in spec.profiles} - used)
        _require(not unused, f"graph {spec.name!r}", "a level for each profile", next(iter(unused), ""))


def _check_sizes(manifest: Manifest) -> None:
    """Raise ManifestError for impossible sizes that no type refuses."""
    dims = manifest.dimensions
    for name, sizes in (("text_buckets", manifest.text_buckets), ("visual_sizes", manifest.visual_sizes)):
        _require(sizes and list(sizes) == sorted(set(sizes)), name, "ascending sizes", sizes)
    most = manifest.visual_sizes[-1]
    manifest.schedule.check_fits(num_layers=dims.num_layers, max_visual=most)
    flops, needed = sum(manifest.cost.reduced_flops.values()), manifest.cost.reduced_kv_bytes
    is_positive = min(dims.num_layers, manifest.model_bytes, needed, flops) > 0
    _require(is_positive, "dimensions, model_bytes, cost", "numbers above 0", 0)
    method, keep = manifest.token_method, manifest.token_keep
    wanted = "a number if there is a token_method, and none otherwise"
    _require((method is None) == (keep is None), "token_keep", wanted, f"{keep} with {method!r}")
    launches = [launch for program in manifest.programs for launch in program.launches]
    drops_tokens = any("kept.vision" in launch.outputs.values() for launch in launches)
    wanted, keep = (
        "a number if the vision graph returns the kept tokens, and none otherwise",
        manifest.encoder_keep,
    )
    _require((keep is not None) == drops_tokens, "encoder_keep", wanted, keep)
    is_possible = manifest.max_images <= most and dims.num_heads % dims.num_kv_heads == 0
    wanted = f"at most {most} (visual tokens) and a divisor of {dims.num_heads}"
    got = f"{manifest.max_images} and {dims.num_kv_heads}"
    _require(is_possible, "max_images, num_kv_heads", wanted, got)


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
        is_outside = pure.is_absolute() or ".." in pure.parts or path in (".", MANIFEST_NAME)
        _require(not (is_odd or is_outside), "files", "a path inside the bundle", repr(path))
    _require(len(known) == len(manifest.files), "files", "each file once", "one twice")
    missing = sorted(used - known)
    _require(not missing, "files", f"an entry for {next(iter(missing), '')!r}", "none")


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
        is_known = tensor.dtype in (("int8",) if is_int8 else ("float32", "float16"))
        rows = " rows, or int8 rows with scales" if len(shape) > 1 else ""
        _require(is_known, name, f"float32 or float16{rows}", tensor.dtype)
        end = tensor.offset + tensor.num_bytes
        is_inside, got = end <= sizes[tensor.file], f"{list(tensor.shape)} up to byte {end}"
        _require(is_inside and tensor.shape == shape, name, f"{list(shape)} inside {tensor.file}", got)


def _check_graphs(manifest: Manifest) -> None:
    roles = [spec.role for spec in manifest.graphs if spec.role != "probe"]
    num_stages, num_later = len(manifest.schedule.stages), len(manifest.ranges) - 1
    # Without stages, the layer ranges of levels with stages follow each other directly.
    _require(num_stages in (0, num_later), "graphs", f"{num_stages + 1} layer ranges", num_later + 1)
    expected = ["vision", *([] if manifest.clip_text is None else ["clip_text"])]
    expected += [*([] if manifest.token_method is None else ["reduce"]), "prefix"]
    for index in range(num_later):
        expected += ["select"] * (num_stages > 0) + ["suffix" if index == num_later - 1 else "segment"]
    expected.append("head")
    _require(roles == expected, "graphs", f"roles {expected}", roles)
    # KV rows are appended range by range, so a gap or an overlap would silently give wrong answers.
    next_layer = 0
    for spec in (spec for spec in manifest.graphs if spec.role in ("prefix", "segment", "suffix")):
        is_next = spec.first_layer == next_layer and spec.num_layers > 0
        _require(is_next, f"graph {spec.name!r}", f"to start at layer {next_layer}", spec.first_layer)
        next_layer += spec.num_layers
    num_layers = manifest.dimensions.num_layers
    _require(next_layer == num_layers, "graphs", f"{num_layers} decoder layers", next_layer)
    found: set[str] = set()
    for spec in manifest.graphs:
        # Files are named after graphs, so a name must follow from the role.
        name, role = spec.name, spec.role
        is_numbered = role in ("probe", "select", "segment") and _NUMBER.fullmatch(
            name.removeprefix(f"{role}_")
        )
        is_known = name == role or is_numbered or (role, name) == ("probe", "gradient")
        wanted = f"a unique name that follows from the role {role}"
        _require(is_known and name not in found, "graphs", wanted, repr(name))
        found.add(name)
        _check_graph(spec)


def _check_graph(spec: GraphSpec) -> None:
    """Raise ManifestError unless the profiles have all sizes, and each tensor and profile belongs to one piece."""
    where, got = f"graph {spec.name!r}", f"{len(spec.profiles)} and {len(spec.outputs)}"
    _require(spec.profiles and spec.outputs, where, "profiles and outputs", got)
    for field_name in ("inputs", "outputs", "profiles") if spec.pieces else ():
        whole = sorted(entry.name for entry in getattr(spec, field_name))
        of_pieces = sorted(name for piece in spec.pieces for name in getattr(piece, field_name))
        wanted = "each input, output and profile in one of its pieces"
        _require(of_pieces == whole, where, wanted, "others")
    for part in spec.split():
        symbols = {axis for tensor in part.tensors for axis in tensor.shape if isinstance(axis, str)}
        for profile in part.profiles:
            place = f"graph {part.name!r}, profile {profile.name!r}"
            missing = sorted(symbols - profile.sizes.keys())
            _require(not missing, place, f"a size of {next(iter(missing), '')}", "none")
            for tensor in part.tensors:
                shape = shape_at(tensor.shape, profile)
                fits = math.prod(shape) * DTYPE_BYTES[tensor.dtype] <= MOST_TENSOR_BYTES
                got = f"{tensor.name} {_text((tensor.dtype, shape))}"
                _require(fits, place, f"tensors of at most {MOST_TENSOR_BYTES >> 40} TiB", got)


# What the host sends to programs and reads from them

_PROMPT = (
    ("rows.embeds", "model", "1 S width"),  # put together on the device from text and visual tokens
    ("rows.deepstack.{plane}", "model", "1 S width"),
    ("prompt.position_ids", "int32", "axes S"),
    ("prompt.visual_rows", "int32", "N"),
    ("prompt.visual_images", "int32", "N"),
    ("prompt.is_visual", "int32", "S"),
    ("prompt.length", "int32", "1"),
    ("prompt.last_row", "int32", "1"),
    ("prompt.length.{stage}", "int32", "1"),
    ("prompt.num_rows.{range}", "int32", "1"),
    ("prompt.num_visual.{stage}", "int32", "1"),
    ("prompt.probe_rows.{stage}", "int32", "probes"),
    ("entering.hidden_states", "model", "1 probes width"),
    ("entering.rows", "int32", "probes"),
    ("likeliest.logits", "float32", "probes top"),
    ("likeliest.rows", "model", "probes top width"),
)
SENT_BY_HOST: dict[ProgramName, tuple[_HostRow, ...]] = {
    "prefill": _PROMPT,
    "exact": _PROMPT,
    "question": (
        ("question.embeds", "model", "1 T width"),
        ("question.position_ids", "int32", "axes T"),
        ("question.past_length", "int32", "1"),
        ("question.num_rows", "int32", "1"),
    ),
    "branch": (
        ("branch.embeds", "model", "1 T width"),
        ("branch.last_row", "int32", "1"),
        ("branch.num_rows", "int32", "1"),
        ("branch.position_ids.{range}", "int32", "axes T"),
        ("branch.past_length.{range}", "int32", "1"),
    ),
    "decode": (
        ("step.embeds", "model", "1 T width"),
        ("step.rows", "int32", "T"),
        ("step.num_rows", "int32", "1"),
        ("step.position_ids.{range}", "int32", "axes T"),
        ("step.past_length.{range}", "int32", "1"),
    ),
    "batch": (
        ("batch.embeds", "model", "B 1 width"),
        ("batch.rows", "int32", "B"),
        ("batch.num_rows", "int32", "B"),
        ("batch.position_ids.{range}", "int32", "axes B"),
        ("batch.past_length.{range}", "int32", "B"),
    ),
}
"""Places that the host writes before a program runs, or between its launches, except the images.

``S`` is N + T; ``keep`` are the tokens that a stage keeps of those ``entering`` it.
"""
_RESULTS = (
    ("results.logits", "float32", "1 vocab"),
    ("results.top_logits", "float32", "1 top"),
    ("results.top_ids", "int32", "1 top"),
)
READ_BY_HOST: dict[ProgramName, tuple[_HostRow, ...]] = {
    "vision": (
        (f"vision.{graph_io.VISUAL_TOKENS}", "model", "N width"),
        (f"vision.{graph_io.DEEPSTACK_TOKENS}{{plane}}", "model", "N width"),
    ),
    "reduce": (
        (f"reduce.{graph_io.REDUCED_TOKENS}", "model", "K width"),
        (f"reduce.{graph_io.REDUCED_DEEPSTACK}{{plane}}", "model", "K width"),
        ("kept.reduce", "int32", "K"),
    ),
    "branch": _RESULTS,
    "prefill": (
        *_RESULTS,
        ("results.kept_indices.{stage}", "int32", "keep"),
        ("results.scores.{stage}", "float32", "entering"),
        ("results.unsettled.{stage}", "int32", "1"),
        (f"select_{{number}}.{graph_io.KEPT_VISUAL_ROWS}", "int32", "keep"),
        (f"select_{{share}}.{graph_io.KEPT_VISUAL_IMAGES}", "int32", "keep"),
    ),
    "decode": (
        ("logits.logits", "float32", "T vocab"),
        ("top.top_logits", "float32", "T top"),
        ("top.top_ids", "int32", "T top"),
    ),
    "batch": (
        ("logits.logits", "float32", "B vocab"),
        ("top.top_logits", "float32", "B top"),
        ("top.top_ids", "int32", "B top"),
    ),
}
"""Places that the host reads after a program has run, or writes in place of a select graph."""


def _on_host(rows: Sequence[_HostRow], manifest: Manifest, sizes: Mapping[str, int]) -> dict[str, Array]:
    """Return the arrays of a table's places at the ``sizes`` of a program."""
    dims, schedule, planes = manifest.dimensions, manifest.schedule, manifest.num_deepstack
    keeps = [stage.keep for stage in schedule.stages]
    entering, stages = [sizes.get("N", 0), *keeps], len(keeps)
    counts = {"{plane}": planes, "{range}": len(manifest.ranges), "{stage}": stages, "{number}": stages}
    counts["{share}"] = stages if schedule.budget == "image" else 0
    known = {"width": dims.hidden_size, "vocab": dims.vocab_size, "axes": manifest.position_axes}
    known |= {"probes": schedule.num_probe_rows, "top": graph_io.num_candidates(dims), "1": 1, **sizes}
    known |= {"S": sum(sizes.values()), "K": manifest.token_keep or 0}
    found = {}
    for place, kind, shape in rows:
        for index in range(next((count for name, count in counts.items() if name in place), 1)):
            if index < stages:
                known |= {"keep": keeps[index], "entering": entering[index]}
            name = place.format(plane=index, range=index, stage=index, number=index + 1, share=index + 1)
            dtype = manifest.dtype if kind == "model" else kind
            found[name] = dtype, tuple(known.get(axis, 0) for axis in shape.split())
    return found


# Programs


def _check_programs(manifest: Manifest) -> None:
    names = [program.name for program in manifest.programs]
    wanted = ["vision", *([] if manifest.token_method is None else ["reduce"]), "prefill", "decode"]
    if manifest.schedule.stages:
        wanted.append("exact")
    optional = [name for name in names if name in _OPTIONAL]
    needed = [name for name in names if name not in optional]
    _require(needed == wanted and len(set(optional)) == len(optional), "programs", str(wanted), names)
    used = {launch.runs for program in manifest.programs for launch in program.launches}
    for spec in manifest.graphs:
        _require(spec.name in used, f"graph {spec.name!r}", "a program that runs it", "none")
    _check_states(manifest)
    earlier: dict[str, set[Array]] = defaultdict(set)
    kv = manifest.kv_dtype, manifest.kv_capacities
    for program in manifest.programs:
        runs = [_Run(manifest, kv, program, index, earlier) for index in range(len(program.sizes))]
        if not program.launches:
            runs[0].refuse("launches", "none")
        sizes = _sizes_of(manifest, program)
        _require(sizes == program.sizes, f"program {program.name!r}", f"the sizes {sizes}", program.sizes)
        for run in runs:
            run.check()
        for run in runs:
            for place, array in run.written.items():
                earlier[place].add(array)


def _check_states(manifest: Manifest) -> None:
    """Raise ManifestError unless the states that launches read are those that launches replace."""
    launches = [launch for program in manifest.programs for launch in program.launches]
    stacks = (stack_of(place) for launch in launches for place in launch.inputs.values())
    read = {found[0] for found in stacks if found is not None and found[0].startswith((STATES, SLOT_STATES))}
    replaced = {kept for launch in launches for kept in launch.states.values()}
    _require(read == replaced, "programs", f"new states for {sorted(read)}", sorted(replaced))


def _sizes_of(manifest: Manifest, program: Program) -> tuple[dict[str, int], ...]:
    """Return the sizes at which the runtime will ask for ``program``."""
    if program.name in ("vision", "reduce"):
        (spec,) = (spec for spec in manifest.graphs if spec.name == program.name)
        return tuple(profile.sizes for profile in spec.profiles)
    if program.name in (*_FOLLOW_UPS, "decode"):
        is_step = program.name == "decode"
        needed, most = (1, graph_io.STEP_ROWS[-1]) if is_step else (manifest.text_buckets[-1],) * 2
        others = {rows for size in program.sizes if 0 < (rows := size.get("T", 0)) <= most}
        return tuple({"T": rows} for rows in sorted({needed, *others}))
    if program.name == "batch":
        found = {count for size in program.sizes if 1 < (count := size.get("B", 0)) <= graph_io.STEP_ROWS[-1]}
        return ({"B": min(found, default=graph_io.STEP_ROWS[1])},)
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
        self.sent = _on_host(SENT_BY_HOST.get(self.program.name, ()), self.manifest, sizes)
        for launch in self.program.launches:
            self.launch = launch
            if launch.profiles:
                self._check_graph(launch)
            else:
                self._check_function(launch)
        self.launch = None
        read = _on_host(READ_BY_HOST.get(self.program.name, ()), self.manifest, sizes)
        for place, array in read.items():
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
        if place.startswith((STATES, SLOT_STATES)):
            if array not in self._states:
                self.refuse(f"the shape of a state for {name}", _text(array))
            return
        if place.startswith(self._cache):  # none or all rows of a KV cache
            wanted = [self._kv_rows(rows) for rows in (0, *self.kv[1][stage : stage + 1])]
            if array not in wanted:
                self.refuse(f"{name} {_text(wanted[-1])} from a KV cache", _text(array))
            return
        known = self.written.get(place) or self.sent.get(place)
        sources = self.earlier.get(place, ()) if known is None else (known,)
        if not any(_is_same(array, source) for source in sources):
            self.refuse(f"{name} {_text(array)} from {place}", _text(known))

    def _kv_rows(self, rows: int) -> Array:
        """Return dtype and shape of the keys, or values, of ``rows`` rows of a layer."""
        dims, count = self.manifest.dimensions, self.program.sizes[self.index].get("B", 1)
        return self.kv[0], (count, dims.num_kv_heads, rows, dims.head_size)

    @property
    def _states(self) -> list[Array]:
        """Dtypes and shapes of a layer's states."""
        if (linear := self.manifest.dimensions.linear) is None:
            return []
        conv, *delta = linear.shapes(self.program.sizes[self.index].get("B", 1)).values()
        return [(self.manifest.dtype, conv), *(("float32", shape) for shape in delta)]

    @property
    def _cache(self) -> str:
        """Places of the KV caches."""
        return SLOTS if self.program.name == "batch" else CACHE

    def _check_stacks(self, spec: GraphSpec, launch: Launch, shapes: Mapping[str, Array]) -> None:
        """Raise unless each stack holds equal tensors, in the graph's order and without gaps, and new rows fit their cache."""
        stacks: dict[str, list[str]] = {}
        for places, tensors in ((launch.inputs, spec.inputs), (launch.outputs, spec.outputs)):
            known = {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}
            for stack, names in stacks_of(places).items():
                found = {
                    name: at[1] for name in known if (at := stack_of(places.get(name, ""))) and at[0] == stack
                }
                if [*found] != names or [*found.values()] != [*range(len(found))]:
                    self.refuse("stacks in the graph's order", stack)
                if len({known[name] for name in names}) > 1:
                    self.refuse("equal tensors in a stack", ", ".join(names))
                stacks[stack] = names
        for new, kept in launch.states.items():
            made, read = stacks.pop(new, []), stacks.pop(kept, None)
            is_state = made and shapes[made[0]] in self._states and kept.startswith((STATES, SLOT_STATES))
            if not is_state or (read is not None and len(read) != len(made)):
                self.refuse(f"as many new states as {kept} has", f"{len(made)} in {new}")
        if launch.cache is None:
            if stacks or launch.states:
                self.refuse("a KV cache for new rows", "none")
            return
        rows = stacks.pop(launch.cache, []) if launch.cache.startswith(self._cache) else []
        counts = [len(names) for names in stacks.values()]
        if counts != [len(rows)] * bool(rows) or not (rows or launch.states):
            self.refuse(f"as many new keys and values as inputs from {launch.cache}", str([*stacks]))
        wanted = self._kv_rows(self._new_rows(launch.stage))
        for names in stacks.values():
            if shapes[names[0]] != wanted:
                self.refuse(f"new rows {_text(wanted)}", _text(shapes[names[0]]))

    def _new_rows(self, stage: int) -> int:
        """Return the rows that a layer range writes after ``stage`` selections."""
        sizes, stages = self.program.sizes[self.index], self.manifest.schedule.stages
        if self.program.name != "prefill" or stage > len(stages):
            return sizes.get("T", 1)
        return sizes["T"] + (stages[stage - 1].keep if stage else sizes["N"])

    def _check_function(self, launch: Launch) -> None:
        if launch.runs not in get_args(HostFunction):
            self.refuse(f"a graph with profiles, or one of {', '.join(get_args(HostFunction))}", launch.runs)
        if launch.runs == "exact_nms":  # it writes the places of its stage's select graph, which it replaces
            (prefill,) = (program for program in self.manifest.programs if program.name == "prefill")
            selects = {spec.name for spec in self.manifest.selects}
            stages = [other for other in prefill.launches if other.runs in selects]
            replaced = launch.stage, launch.inputs, launch.outputs
            if replaced not in [(other.stage, other.inputs, other.outputs) for other in stages]:
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


def _is_same(one: Array, other: Array) -> bool:
    """Return whether both have the same elements: axes of one may be missing, or elsewhere."""
    (kind, shape), (other_kind, other_shape) = one, other
    return kind == other_kind and [n for n in shape if n != 1] == [n for n in other_shape if n != 1]


def _text(array: Array | None) -> str:
    return "none" if array is None else f"{array[0]} [{', '.join(map(str, array[1]))}]"
