"""Exports a checkpoint into a bundle. ``export_bundle`` lists the steps; the first three are in ``plan.py``.

All files are written into a temporary folder next to the target, which is renamed when it is complete.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from trio_edge.export.check.fit import check_fit, fit_inputs
from trio_edge.export.check.tensorrt import require_supported
from trio_edge.export.checkpoints.checkpoint import EMBEDDING_NAME
from trio_edge.export.checkpoints.weights import StoredName, bytes_to_write, store_constants, store_weights
from trio_edge.export.families.base import max_positions
from trio_edge.export.graphs.assembly.onnx_graph import attach_weights, save
from trio_edge.export.graphs.assembly.pieces import join, with_pieces
from trio_edge.export.options import Progress
from trio_edge.export.plan import build, read, resolve, without_values
from trio_edge.export.quantize import assign
from trio_edge.export.quantize.cache import quantize_caches
from trio_edge.export.quantize.scales import CalibratedScales, check_calibrated
from trio_edge.export.quantize.store import quantized_bytes, store_quantized
from trio_edge.export.tracing.graphs import trace_graphs
from trio_edge.export.tracing.levels import wire
from trio_edge.runtime.bundle.errors import CheckpointError, TrioEdgeError, printable
from trio_edge.runtime.bundle.files import atomic_folder
from trio_edge.runtime.bundle.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    Cost,
    FileEntry,
    GraphSpec,
    ImageSize,
    LevelSpec,
    Manifest,
    Quantization,
    StoredTensor,
    json_from_manifest,
)
from trio_edge.runtime.bundle.reader import sha256_of
from trio_edge.runtime.bundle.schedule import Schedule
from trio_edge.trio.cost.bundle_work import input_widths
from trio_edge.trio.cost.devices import find_device
from trio_edge.trio.cost.flops import count_prefill
from trio_edge.trio.cost.selections import TokenSizes
from trio_edge.trio.cost.work import ELEMENT_BYTES, vision_work
from trio_edge.trio.methods import token_method

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from trio_edge.export.checkpoints.weights import SourceTensor, StoredWeights
    from trio_edge.export.graphs.assembly.onnx_graph import TracedGraph
    from trio_edge.export.options import ExportOptions
    from trio_edge.export.plan import ExportPlan
    from trio_edge.export.quantize.store import StoredForm
    from trio_edge.runtime.bundle.manifest import Program
    from trio_edge.trio.cost.devices import DeviceSpec

_LARGEST_INLINE_BYTES = 1 << 20  # ONNX files are read as a whole and have at most 2 GB
_SPARE_BYTES = 64 << 20
"""Free disk space required for graphs, tokenizer and manifest."""
_COST_TEXT_TOKENS = 40
"""Text tokens of the prompt that the cost is given for: LLaVA's system prompt and a short question."""


def export_bundle(
    options: ExportOptions,
    *,
    scales: CalibratedScales = CalibratedScales(),  # noqa: B008
    progress: Progress = Progress(),  # noqa: B008
) -> Manifest:
    """Write the bundle that ``options`` describe and return its manifest.

    Args:
        options: The source, the target folder and all settings.
        scales: Calibrated scales of quantized layers.
        progress: Callbacks for a progress display.

    Raises:
        CheckpointError: If the checkpoint cannot be exported, or the target exists or has no room.
        ScheduleError: If the model cannot follow the schedule, or an INT8 KV cache has no scales.
    """
    # Before the checkpoint is read, because that may download it.
    check_output(options.out, force=options.force)
    check_calibrated(options.quantize, scales)
    progress.step("reading the checkpoint")
    source = read(options)
    with source.checkpoint.guarded():
        resolved = resolve(options, source)
    if (wanted := resolved.generation.max_new_tokens or 0) > options.max_new_tokens:
        progress.warn(
            f"generation_config.json max_new_tokens: expected at most {options.max_new_tokens} (--max-new-tokens), got {wanted};"
            " answers end sooner than the checkpoint's"
        )
    with without_values(resolved.dtype):
        with source.checkpoint.guarded():
            plan = build(options, source, resolved)
        if (target := options.target) is not None:
            check_target(plan, find_device(target), progress)
        quantized = partial(assign.is_quantized, plan=options.quantize, checkpoint=source.checkpoint)
        outlines, programs = wire(plan, is_quantized=quantized)
        traced = trace_graphs(plan, outlines, step=progress.step)
    contents = quantize(plan, traced, scales, progress)
    with atomic_folder(
        options.out,
        num_bytes=contents.num_bytes + _SPARE_BYTES,
        error=CheckpointError,
        what="bundle",
        way_out="choose another --out",
        elsewhere=" or choose another --out",
        # Again, as the export takes a while.
        before_rename=lambda: check_output(options.out, force=options.force),
    ) as folder:
        graphs, weights = write(plan, contents, folder, progress)
        progress.step("hashing")
        return record(plan, contents, programs, graphs, weights, folder)


def check_target(plan: ExportPlan, target: DeviceSpec, progress: Progress) -> None:
    """Warn if the ``target`` cannot run the bundle's formats or has too little memory."""
    options = plan.options
    if (refusal := target.refusal(options.quantize.formats)) is not None:
        progress.warn(refusal)
    progress.step(f"checking the fit on {target.name}")
    most = max(plan.levels, key=lambda level: level.rows_in_all)
    inputs = fit_inputs(
        plan.model,
        plan.dimensions,
        layout=most.layout,
        processing=most.resolved.processing,
        quantize=options.quantize,
        token_method=options.token_method,
        clip=plan.clip_graphs,
    )
    if (warning := check_fit(inputs, target)) is not None:
        progress.warn(warning)


@dataclass(frozen=True, slots=True)
class BundleContents:
    """The graphs, and the form in which each tensor is stored."""

    graphs: Sequence[TracedGraph]
    forms: tuple[StoredForm, ...] = ()
    """Tensors that are not stored with the checkpoint's values."""
    embedding: StoredName = StoredName(EMBEDDING_NAME)  # noqa: RUF009  # frozen
    head_rows: StoredName | None = None
    """The head's rows, if a gradient reads them."""
    quantization: Quantization | None = None
    plain: Mapping[str, SourceTensor] = field(default_factory=dict)
    """All other tensors, in the bundle's element type."""
    whole_files: bool = True
    """Whether the checkpoint's files may be copied as they are, including tensors that no graph uses."""
    num_bytes: int = 0


def quantize(
    plan: ExportPlan, traced: Sequence[TracedGraph], scales: CalibratedScales, progress: Progress
) -> BundleContents:
    """Return the graphs with linear layers and KV caches quantized as the options say."""
    checkpoint, wanted, dtype = plan.source.checkpoint, plan.options.quantize, plan.resolved.dtype
    contents = BundleContents(traced)
    if wanted.formats or checkpoint.packed:
        contents = _quantized(plan, traced, scales, progress)
    forms = contents.forms
    plain = assign.plain_tensors(contents.graphs, checkpoint, forms)
    # Copied files would repeat tensors that are stored in another form. CLIP's files hold a vision tower that is not used,
    # and their names may be those of the model's files.
    whole_files = not forms and plan.source.clip is None
    num_bytes = bytes_to_write(plain, dtype=dtype, whole_files=whole_files)
    num_bytes += quantized_bytes(checkpoint, forms, dtype=dtype)
    return replace(contents, plain=plain, whole_files=whole_files, num_bytes=num_bytes)


def _quantized(
    plan: ExportPlan, traced: Sequence[TracedGraph], scales: CalibratedScales, progress: Progress
) -> BundleContents:
    wanted = plan.options.quantize
    graphs, forms = assign.quantize_graphs(traced, wanted, scales, checkpoint=plan.source.checkpoint)
    for part, kind in assign.unquantized_parts(forms, wanted, graphs=graphs).items():
        progress.warn(
            f"--quantize: expected weights in {part} that {kind} can store (INT4 needs an even number of outputs and a"
            f" multiple of 16 inputs), got none; {part} stays in {plan.resolved.dtype}"
        )
    if wanted.has_cache:
        graphs = quantize_caches(graphs, scales.cache_max)
    table, rows = assign.row_tables(graphs, wanted)
    quantization = assign.quantization_of(forms, wanted, scales, graphs=graphs)
    head_rows = None if rows is None else rows.stored_name
    return BundleContents(graphs, forms, table.stored_name, head_rows, quantization)


def write(
    plan: ExportPlan, contents: BundleContents, folder: Path, progress: Progress
) -> tuple[tuple[GraphSpec, ...], StoredWeights]:
    """Write all files but the manifest into ``folder``, weights first, because graphs point into them."""
    dtype, text, clip = plan.resolved.dtype, plan.resolved.text, plan.source.clip
    progress.step("writing the weights")
    progress.expect_bytes(contents.num_bytes)
    weights = store_weights(
        contents.plain, folder, dtype=dtype, whole_files=contents.whole_files, on_bytes=progress.wrote_bytes
    )
    if contents.forms:
        more = store_quantized(
            plan.source.checkpoint, contents.forms, folder, dtype=dtype, on_bytes=progress.wrote_bytes
        )
        weights = weights.with_more(more)
    constants = {
        _constant_name(graph, name): values
        for graph in contents.graphs
        for name, values in graph.constants.items()
        if values.nbytes > _LARGEST_INLINE_BYTES
    }
    if constants:
        weights = weights.with_more(store_constants(constants, folder))
    texts = {text.spec.tokenizer: text.tokenizer, text.spec.chat_template: text.chat_template}
    texts[text.decisions.template] = text.decision_template
    if clip is not None:
        texts[clip.spec.tokenizer] = clip.tokenizer
    for name, content in texts.items():
        (folder / name).write_text(content, encoding="utf-8")
    progress.step("writing the graphs")
    return tuple(_write_graphs(contents.graphs, weights.tensors, folder)), weights


def _write_graphs(
    graphs: Sequence[TracedGraph], stored: Mapping[StoredName, StoredTensor], folder: Path
) -> Iterator[GraphSpec]:
    """Write all graphs, pieces alone and joined, and yield the description of each whole graph."""
    for _, group in itertools.groupby(graphs, key=lambda graph: graph.spec.name):
        pieces = list(group)
        if pieces[0].piece is None:
            yield write_graph(pieces[0], stored, folder)
            continue
        whole = join(pieces)  # a copy, so before weights are attached
        written = [write_graph(piece, stored, folder) for piece in pieces]
        yield with_pieces(write_graph(whole, stored, folder), pieces, written)


def write_graph(graph: TracedGraph, stored: Mapping[StoredName, StoredTensor], folder: Path) -> GraphSpec:
    """Write one graph that points into the weight files, and return its description with its weights' bytes.

    Raises:
        CheckpointError: If TensorRT cannot read the graph. Pieces are not checked, as the whole graph is.
    """
    tensors = {name: stored[stored_name] for name, stored_name in graph.weights.items()}
    small = {}
    for name, values in graph.constants.items():
        if (place := stored.get(_constant_name(graph, name))) is None:
            small[name] = values
        else:
            tensors[name] = place
    spec = graph.spec
    weight_bytes = attach_weights(graph.model, tensors, small, bundle=folder)
    save(graph.model, folder / spec.file)
    if graph.piece is None:
        symbols = {symbol for profile in spec.profiles for symbol in profile.sizes}
        require_supported(graph.model, name=spec.name, symbols=symbols)
    return msgspec.structs.replace(spec, weight_bytes=weight_bytes)


def _constant_name(graph: TracedGraph, name: str) -> StoredName:
    own_name = name.rpartition("/")[2]  # joined graphs add the piece's name before
    return StoredName(f"{graph.spec.name}.{own_name}")


def record(
    plan: ExportPlan,
    contents: BundleContents,
    programs: Sequence[tuple[Program, ...]],
    graphs: tuple[GraphSpec, ...],
    weights: StoredWeights,
    folder: Path,
) -> Manifest:
    """Write and return the manifest, a bundle's last file; ``programs`` are each level's."""
    options, resolved, layout, model = plan.options, plan.resolved, plan.layout, plan.model
    image_sizes, files = _image_sizes(plan), _file_entries(folder, known=weights.sha256)
    path, stored, clip = Path(options.model), weights.tensors, plan.source.clip
    embedding, rows = contents.embedding, contents.head_rows
    num_values = sum(parameter.numel() for parameter in model.root.parameters())
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        family=plan.source.family.model_type,
        model=printable(path.resolve().name if path.is_dir() else options.model)[-200:] or "model",
        revision=plan.source.checkpoint.revision,
        dtype=resolved.dtype,
        opset=options.opset,
        dimensions=plan.dimensions,
        schedule=layout.schedule,
        visual_sizes=layout.visual_sizes,
        image_sizes=image_sizes,
        text_buckets=layout.text_buckets,
        max_new_tokens=options.max_new_tokens,
        max_position=max_positions(model.text_config),
        position_axes=model.position_axes,
        text=resolved.text.spec,
        decisions=resolved.text.decisions,
        generation=resolved.generation,
        image_processing=resolved.processing.to_dict(),
        max_images=options.num_units,
        video_processing=resolved.video_processing,
        encoder_keep=resolved.processing.encoder_keep,
        token_method=options.token_method,
        token_keep=resolved.token_keep,
        token_embedding=stored[embedding],
        token_embedding_scales=stored.get(embedding.scales),
        head_rows=None if rows is None else stored[rows],
        head_row_scales=None if rows is None else stored.get(rows.scales),
        quantization=contents.quantization,
        graphs=graphs,
        programs=programs[0],
        level=plan.level,
        levels=tuple(_level(other, graphs, program) for other, program in zip(plan.others, programs[1:])),
        files=files,
        model_bytes=np.dtype(resolved.dtype).itemsize * num_values,
        cost=_cost(plan, graphs),
        vision=model.vision_dimensions,
        clip_text=None if clip is None else clip.spec,
        num_deepstack=model.vision.num_deepstack,
        tools={
            name: version(name) for name in ("trio-edge", "torch", "transformers", "onnx-ir", "onnxscript")
        },
    )
    (folder / MANIFEST_NAME).write_bytes(json_from_manifest(manifest))
    return manifest


def _level(plan: ExportPlan, graphs: tuple[GraphSpec, ...], programs: tuple[Program, ...]) -> LevelSpec:
    return LevelSpec(
        name=plan.level,
        schedule=plan.layout.schedule,
        visual_sizes=plan.layout.visual_sizes,
        image_sizes=_image_sizes(plan),
        image_processing=plan.resolved.processing.to_dict(),
        video_processing=plan.resolved.video_processing,
        cost=_cost(plan, graphs),
        programs=programs,
    )


def _cost(plan: ExportPlan, graphs: Sequence[GraphSpec]) -> Cost:
    """Return the cost of the plan's largest prompt with ``_COST_TEXT_TOKENS`` text tokens; ``graphs`` are the bundle's."""
    resolved, clip = plan.resolved, plan.source.clip
    images, tower, whole = resolved.images, plan.model.vision_dimensions, resolved.image_tokens
    num_visual = images.num_images * images.largest["N"]
    counted = partial(
        count_prefill,
        plan.dimensions,
        num_text=_COST_TEXT_TOKENS,
        one_size=len(plan.layout.visual_sizes) == 1,
        bytes_per_cached=ELEMENT_BYTES["int8" if plan.options.quantize.has_cache else resolved.dtype],
    )
    full = counted(Schedule(), num_visual=images.num_images * whole)
    cost = counted(plan.layout.schedule, num_visual=min(resolved.entering, num_visual))
    reduced = {
        "vision": round(images.num_images * vision_work(tower, images.largest).flops),
        "decoder": round(cost.decoder_flops),
        "select": round(cost.select_flops),
    }
    if clip is not None:
        reduced["clip_text"] = round(clip.flops(_COST_TEXT_TOKENS))
    if (method := plan.options.token_method) is not None and resolved.token_keep is not None:
        (graph,) = (graph for graph in graphs if graph.role == "reduce")
        sizes = TokenSizes(images.largest["N"], resolved.token_keep, _COST_TEXT_TOKENS, input_widths(graph))
        reduced["reduce"] = round(images.num_images * token_method(method).cost(sizes).flops)
    # Without reduction the encoder merges no tokens either.
    unmerged = msgspec.structs.replace(tower, merged_weights=0)
    return Cost(
        num_visual=num_visual,
        num_images=images.num_images,
        num_text=_COST_TEXT_TOKENS,
        full_flops={
            "vision": round(images.num_images * vision_work(unmerged, images.largest).flops),
            "decoder": round(full.decoder_flops),
        },
        reduced_flops=reduced,
        full_kv_bytes=full.kv_bytes,
        reduced_kv_bytes=cost.kv_bytes,
        image_tokens=None if whole == images.largest["N"] else images.num_images * whole,
    )


def _image_sizes(plan: ExportPlan) -> tuple[ImageSize, ...]:
    rows = plan.layout.visual_sizes if plan.resolved.token_keep is None else plan.layout.vision_rows
    sides = plan.options.image_sizes
    counts = [plan.resolved.processing.sizes(width, height)["N"] for width, height in sides]
    return tuple(
        ImageSize(width=width, height=height, num_visual=count, rows=min(row for row in rows if row >= count))
        for (width, height), count in zip(sides, counts)
    )


def _file_entries(folder: Path, *, known: Mapping[str, str]) -> tuple[FileEntry, ...]:
    """Return all files of ``folder``; ``known`` has the SHA-256 of those that were hashed while they were written."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return tuple(
        FileEntry(path=name, num_bytes=path.stat().st_size, sha256=known.get(name) or sha256_of(path))
        for name, path in sorted(files.items())
    )


def check_output(
    out: Path,
    *,
    force: bool,
    what: str = "bundle",
    marker: str = MANIFEST_NAME,
    error: type[TrioEdgeError] = CheckpointError,
) -> None:
    """Raise ``error`` if ``out`` exists; with ``force`` it may be an empty folder or one that holds ``marker``."""
    if not out.exists() and not out.is_symlink():
        return
    if not force:
        raise error(f"{out}: expected no such folder, it exists; choose another --out or add --force")
    if not out.is_dir() or out.is_symlink():
        raise error(f"{out}: expected a {what} to replace, got a file or a link; choose another --out")
    if not (out / marker).exists() and any(out.iterdir()):
        raise error(f"{out}: expected a {what} to replace, got a folder of other files; choose another --out")
