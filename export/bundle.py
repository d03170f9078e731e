"""Exports a checkpoint into a bundle: traces the graphs, stores the weights, writes the manifest, renames into place.

The order is: read and check everything that can be wrong, trace all graphs (no weights in memory), copy or convert
the weights once, write graphs that point into them, manifest last. All of it happens in a folder beside the target,
which is renamed when it is complete: a bundle that was not finished is not a bundle.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from trio_edge.export.check.fit import check_fit, fit_inputs
from trio_edge.export.check.tensorrt import require_supported
from trio_edge.export.checkpoints.checkpoint import EMBEDDING_NAME, canonical_name, read_checkpoint
from trio_edge.export.checkpoints.text_files import read_text_files
from trio_edge.export.checkpoints.weights import bytes_to_write, store_constants, store_weights
from trio_edge.export.families import check_architecture, family_of
from trio_edge.export.families.clip import build_clip, read_clip, with_patches
from trio_edge.export.families.decoder_config import check_positions, max_positions
from trio_edge.export.graphs.onnx_graph import attach_weights, save
from trio_edge.export.graphs.tracing import trace_graphs
from trio_edge.export.graphs.vision.clip import KEEP_MULTIPLE
from trio_edge.export.layout import Layout, vision_profiles
from trio_edge.export.model_cost import COST_TEXT_TOKENS, cost_of
from trio_edge.export.quantize.assign import (
    check_packed,
    embedding_key,
    parts_left_alone,
    plain_tensors,
    quantization_of,
    quantize_graphs,
)
from trio_edge.export.quantize.cache import check_cache, quantize_caches
from trio_edge.export.quantize.graph import SCALE_SUFFIX
from trio_edge.export.quantize.plan import QuantizePlan
from trio_edge.export.quantize.scales import CalibratedScales
from trio_edge.export.quantize.store import quantized_bytes, store_quantized
from trio_edge.export.token_selectors import full_grid, token_selector
from trio_edge.runtime.bundle.errors import CheckpointError, ScheduleError
from trio_edge.runtime.bundle.graph_io import MAX_TEXT, MOST_TOKENS, text_buckets
from trio_edge.runtime.bundle.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    Dimensions,
    FileEntry,
    GraphSpec,
    ImageSize,
    Manifest,
    StoredTensor,
    json_from_manifest,
)
from trio_edge.runtime.bundle.reader import sha256_of
from trio_edge.runtime.files import folder_beside as locked_folder_beside
from trio_edge.trio.budgets import MAX_TOPK
from trio_edge.trio.cost.devices import find_device
from trio_edge.trio.cost.memory import Texts
from trio_edge.trio.methods import TOKEN_METHODS, token_method

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import numpy as np
    from numpy.typing import NDArray

    from trio_edge.export.checkpoints.checkpoint import Checkpoint
    from trio_edge.export.families.base import Family, FamilyModel
    from trio_edge.export.graphs.tracing import TracedGraph
    from trio_edge.runtime.bundle.manifest import FloatType
    from trio_edge.runtime.bundle.schedule import Positions, Schedule
    from trio_edge.runtime.images.interface import PictureProcessing

_LARGEST_INLINE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """What a user can choose. The fields hold the only defaults."""

    model: str
    """Alias, Hub id or checkpoint folder."""
    out: Path
    """Folder to create."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    dtype: Literal["auto", "float16", "float32"] = "auto"
    """Element type of weights and activations; "auto" is float32 for a float32 checkpoint, else float16."""
    image_sizes: tuple[tuple[int, int], ...] = ()
    """(width, height) of the pictures to come, which then have no padding; the schedule is made for the largest."""
    only_image_sizes: bool = False
    """Make no shapes for pictures of other sizes, which are then refused unless they need no more room."""
    max_visual: int | None = None
    """Visual tokens that pictures of any size are scaled down to, in families that can: Qwen2.5-VL (pixels), InternVL3 (tiles)."""
    max_text: int = MAX_TEXT
    """Largest prompt in text tokens."""
    text_buckets: tuple[int, ...] = ()
    """Sizes that prompts are padded to, up to ``max_text``; none means doublings from 32."""
    max_new_tokens: int = 256
    """Room in the KV caches for the answer."""
    encoder_keep: int | float | None = None
    """What the vision encoder keeps (the reference's encoder reduction): patches per tile or visual tokens of the
    picture, or a share of them below 1; None keeps all."""
    token_method: str | None = None
    """Selection among the picture's visual tokens before the decoder; combines with any schedule."""
    token_keep: int | float | None = None
    """Visual tokens of a picture that it passes on, or a share of them below 1."""
    clip: str | None = None
    """CLIP model (folder or Hub id) in whose space the selection before the decoder compares the question; None for the
    decoder's embeddings."""
    quantize: QuantizePlan = field(default_factory=QuantizePlan)
    """Which parts are stored in four or eight bits."""
    opset: int = 18
    """ONNX opset; TensorRT 10.3 reads up to 19. Graphs with quantized types have a higher one."""
    force: bool = False
    """Replace an existing bundle."""
    target: str | None = None
    """Device to warn about if the bundle cannot fit its memory; changes nothing in the bundle."""

    def __post_init__(self) -> None:
        if self.target is not None:
            find_device(self.target)
        for name, value, low in (("max-text", self.max_text, 8), ("max-new-tokens", self.max_new_tokens, 1)):
            if not low <= value <= MOST_TOKENS:
                raise ScheduleError(f"--{name}: expected {low}..{MOST_TOKENS}, got {value}")
        if self.opset not in (18, 19):
            raise ScheduleError(
                f"--opset: expected 18 or 19, got {self.opset}; leave it away, or choose one of these"
            )
        if any(not 8 <= bucket <= self.max_text for bucket in self.text_buckets):
            raise ScheduleError(
                f"--text-buckets: expected sizes in 8..{self.max_text} (--max-text), got {list(self.text_buckets)}"
            )
        if self.only_image_sizes and not self.image_sizes:
            raise ScheduleError(
                "--only-image-sizes: expected --image-size beside it, got none; add the camera's"
            )
        if (self.token_method is None) != (self.token_keep is None):
            raise ScheduleError(
                f"--token-method and --token-keep: expected both or none, got {self.token_method} and"
                f" {self.token_keep}; give the other one too"
            )
        takes_clip = [row.name for row in TOKEN_METHODS.values() if row.takes_clip]
        if self.token_method is not None:
            token_method(self.token_method)  # refuses an unknown one
        if self.clip is not None and self.token_method not in takes_clip:
            raise ScheduleError(
                f"--clip: expected --token-method {' or '.join(takes_clip)} beside it, got {self.token_method};"
                " leave --clip away"
            )
        for width, height in self.image_sizes:
            if not (1 <= width <= 65535 and 1 <= height <= 65535):
                raise ScheduleError(f"--image-size: expected sides of 1..65535 pixels, got {width}x{height}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Callbacks for a progress display."""

    step: Callable[[str], None] = lambda _text: None
    """Called with what is done next."""
    expect_bytes: Callable[[int], None] = lambda _count: None
    """Called once with the bytes of weights to write."""
    wrote_bytes: Callable[[int], None] = lambda _count: None
    """Called with the bytes written since the last call."""
    warn: Callable[[str], None] = lambda _text: None
    """Called with one line that the user should read; the export goes on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleInputs:
    """What a schedule depends on, known once the checkpoint is read."""

    num_layers: int
    """Decoder layers."""
    num_visual: int
    """Visual tokens of the largest picture that is exported for, as many as enter the decoder."""
    picture_tokens: int
    """Visual tokens of that picture before any reduction; an average keep is a share of them."""
    positions: tuple[Positions, ...]
    """Position rules that the family can follow; the first one is its default."""


def export_bundle(
    options: ExportOptions,
    *,
    schedule_for: Callable[[ScheduleInputs], Schedule],
    scales: CalibratedScales = CalibratedScales(),  # noqa: B008
    progress: Progress = Progress(),
) -> Manifest:
    """Write the bundle that ``options`` describe and return its manifest.

    Args:
        options: What to export, and where to.
        schedule_for: Returns the schedule.
        scales: What a calibration found for the layers that are quantized.
        progress: Callbacks for a progress display.

    Raises:
        CheckpointError: If the checkpoint cannot be exported, or the target exists or has no room.
        ScheduleError: If the model cannot follow the schedule, or an INT8 KV cache has no scales.
    """
    check_output(options.out, force=options.force)
    check_cache(options.quantize, scales)
    progress.step("reading the checkpoint")
    checkpoint = read_checkpoint(options.model, revision=options.revision, check_config=check_architecture)
    check_packed(checkpoint, options.quantize)
    family = family_of(checkpoint)
    clip = None if options.clip is None else read_clip(options.clip)
    processing = family.picture_processing(checkpoint, encoder_keep=None, max_visual=options.max_visual)
    pictures, primary = _picture_sizes(processing, options)
    picture_tokens = primary["N"]
    if options.encoder_keep is not None:
        in_encoder = _encoder_keep(options.encoder_keep, primary)
        processing = family.picture_processing(
            checkpoint, encoder_keep=in_encoder, max_visual=options.max_visual
        )
        pictures, primary = _picture_sizes(processing, options)
    token_keep = _token_keep(options, num_visual=primary["N"])
    entering = primary["N"] if token_keep is None else token_keep
    dtype = bundle_dtype(checkpoint, options.dtype)
    text = read_text_files(
        checkpoint,
        default_template=family.default_chat_template(checkpoint),
        image_marks=family.image_marks,
    )

    with FakeTensorMode(allow_non_fake_inputs=True), _default_dtype(dtype):
        selector = None
        if options.token_method is not None and token_keep is not None:
            selector = token_selector(
                options.token_method, num_keep=token_keep, clip=clip is not None, grid=full_grid(processing)
            )
        model = family.build(
            checkpoint,
            processing=processing,
            dtype=dtype,
            with_features=selector is not None and selector.needs_features,
        )
        dimensions = dimensions_of(model)
        _check_tensors(checkpoint, model)
        clip_graphs = None
        if clip is not None:
            checkpoint, clip_graphs = clip.beside(checkpoint), build_clip(clip)
            model = with_patches(model, clip_graphs, dtype=dtype)
        schedule = schedule_for(
            ScheduleInputs(
                num_layers=dimensions.num_layers,
                num_visual=entering,
                picture_tokens=picture_tokens,
                positions=family.positions,
            )
        )
        schedule.check_fits(num_layers=dimensions.num_layers, max_visual=entering)
        _check_position_rule(schedule, family)
        layout = Layout(
            vision_sizes=vision_profiles(pictures, schedule=schedule, token_keep=token_keep),
            schedule=schedule,
            token_keep=token_keep,
            text_buckets=_text_buckets(options),
            max_new_tokens=options.max_new_tokens,
            dtype=dtype,
            opset=options.opset,
            clip_texts=() if clip is None else clip.num_texts(options.max_text),
        )
        check_positions(
            model.text_config,
            num_visual=layout.visual_sizes[-1],
            max_text=options.max_text,
            max_new_tokens=options.max_new_tokens,
            schedule=schedule,
        )
        if options.target is not None:
            target = find_device(options.target)
            refusal = target.refusal(options.quantize.formats)
            if refusal is not None:
                progress.warn(refusal)
            progress.step(f"checking the fit on {target.name}")
            tower, texts = None, None
            if clip is not None and clip_graphs is not None:
                tower = clip_graphs.text
                texts = Texts(layout.clip_texts[-1], clip.spec.length, clip_graphs.projection_size)
            inputs = fit_inputs(
                model,
                dimensions,
                layout=layout,
                processing=processing,
                quantize=options.quantize,
                token_method=options.token_method,
                text_tower=tower,
                texts=texts,
            )
            warning = check_fit(inputs, target)
            if warning is not None:
                progress.warn(warning)
        traced = trace_graphs(
            model,
            checkpoint,
            layout=layout,
            dimensions=dimensions,
            selector=selector,
            clip=clip_graphs,
            step=progress.step,
        )

    traced, forms = quantize_graphs(traced, options.quantize, scales, checkpoint=checkpoint)
    for part, kind in parts_left_alone(forms, options.quantize, graphs=traced).items():
        progress.warn(
            f"--quantize: expected weights of {part} that {kind} can hold (INT4: an even number of outputs, a multiple of 16"
            f" inputs), got none; {part} stays in {dtype}"
        )
    if options.quantize.has_cache:
        traced = quantize_caches(traced, scales.cache_max)
    names, whole_files = plain_tensors(traced, forms), not forms and clip is None
    needed = bytes_to_write(checkpoint, names, dtype=dtype, whole_files=whole_files)
    needed += quantized_bytes(checkpoint, forms, dtype=dtype)
    with folder_beside(options.out, num_bytes=needed, force=options.force) as folder:
        progress.step("writing the weights")
        progress.expect_bytes(needed)
        written = store_weights(
            checkpoint, names, folder, dtype=dtype, whole_files=whole_files, on_bytes=progress.wrote_bytes
        )
        if forms:
            more = store_quantized(checkpoint, forms, folder, dtype=dtype, on_bytes=progress.wrote_bytes)
            written = written.with_more(more)
        stored = dict(written.tensors)
        constants = {
            f"{graph.spec.name}.{name}": values
            for graph in traced
            for name, values in _large_constants(graph).items()
        }
        if constants:
            stored |= store_constants(constants, folder)
        progress.step("writing the graphs")
        graphs = tuple(_write_graph(graph, stored, folder) for graph in traced)
        text.write(folder)
        if clip is not None:
            clip.write(folder)
        progress.step("hashing")
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            family=family.model_type,
            model=Path(options.model).name if Path(options.model).is_dir() else options.model,
            revision=checkpoint.revision,
            dtype=dtype,
            opset=options.opset,
            dimensions=dimensions,
            schedule=schedule,
            visual_sizes=layout.visual_sizes,
            image_sizes=_image_sizes(processing, options, layout),
            text_buckets=layout.text_buckets,
            max_new_tokens=options.max_new_tokens,
            max_position=max_positions(model.text_config),
            position_axes=3 if model.mrope_sections else 1,
            text=text.spec,
            image_processing=processing.to_dict(),
            encoder_keep=processing.encoder_keep,
            token_method=options.token_method,
            token_keep=token_keep,
            token_embedding=stored[embedding_key(options.quantize)],
            token_embedding_scales=stored.get(embedding_key(options.quantize) + SCALE_SUFFIX),
            quantization=quantization_of(forms, options.quantize, scales, graphs=traced),
            graphs=graphs,
            files=_file_entries(folder, known=written.sha256),
            model_bytes=_model_bytes(checkpoint, dtype),
            cost=cost_of(
                model.vision_dimensions,
                dimensions,
                schedule,
                vision_sizes=primary,
                picture_tokens=picture_tokens,
                num_visual_sizes=len(layout.visual_sizes),
                token_method=options.token_method,
                token_keep=token_keep,
                graphs=graphs,
                kv_dtype="int8" if options.quantize.has_cache else dtype,
                clip_text_flops=None if clip is None else clip.flops(COST_TEXT_TOKENS),
            ),
            vision=model.vision_dimensions,
            clip_text=None if clip is None else clip.spec,
            tools={
                name: version(name)
                for name in ("trio-edge", "torch", "transformers", "onnx-ir", "onnxscript")
            },
        )
        (folder / MANIFEST_NAME).write_bytes(json_from_manifest(manifest))
    return manifest


def _picture_sizes(
    processing: PictureProcessing, options: ExportOptions
) -> tuple[list[dict[str, int]], dict[str, int]]:
    """Return the sizes of all pictures to make shapes for, and of the one that schedule and cost are made for."""
    exact = [processing.sizes(width, height) for width, height in options.image_sizes]
    any_picture = [] if options.only_image_sizes else list(processing.any_picture_sizes())
    primary = max(exact or any_picture, key=lambda sizes: (sizes["N"], *sizes.values()))
    return exact + any_picture, primary


def _encoder_keep(keep: int | float, primary: Mapping[str, int]) -> int:
    """Return how much the vision encoder keeps, as a number; a share is one of the picture that decides the schedule."""
    if isinstance(keep, int):
        return keep
    if "B" not in primary:
        return int(keep * primary["N"])
    wanted = keep * primary["N"] / primary["B"]
    return max(1, round(wanted / KEEP_MULTIPLE)) * KEEP_MULTIPLE


def _token_keep(options: ExportOptions, *, num_visual: int) -> int | None:
    """Return K of the selection before the decoder, as a number."""
    keep = options.token_keep
    if keep is None:
        return None
    count = keep if isinstance(keep, int) else int(keep * num_visual)
    most = min(num_visual - 1, MAX_TOPK)
    if not 1 <= count <= most:
        raise ScheduleError(
            f"--token-keep: expected 1..{most} of the picture's {num_visual} visual tokens, got {count};"
            " choose a number in this range"
        )
    return count


def _image_sizes(
    processing: PictureProcessing, options: ExportOptions, layout: Layout
) -> tuple[ImageSize, ...]:
    result = []
    for width, height in options.image_sizes:
        num_visual = processing.sizes(width, height)["N"]
        rows = next(size for size in layout.picture_sizes if size >= num_visual)
        result.append(ImageSize(width=width, height=height, num_visual=num_visual, rows=rows))
    return tuple(result)


def _text_buckets(options: ExportOptions) -> tuple[int, ...]:
    if not options.text_buckets:
        return text_buckets(options.max_text)
    return tuple(sorted({*options.text_buckets, options.max_text}))


def _check_position_rule(schedule: Schedule, family: Family) -> None:
    if schedule.positions not in family.positions:
        raise ScheduleError(
            f"positions: expected {' or '.join(family.positions)} for {family.model_type}, got {schedule.positions};"
            " leave --positions away"
        )


def bundle_dtype(checkpoint: Checkpoint, wanted: Literal["auto", "float16", "float32"]) -> FloatType:
    """Return the element type of a bundle's graphs."""
    if wanted != "auto":
        return wanted
    return "float32" if checkpoint.tensor(EMBEDDING_NAME).dtype == "F32" else "float16"


@contextmanager
def _default_dtype(dtype: FloatType) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def dimensions_of(model: FamilyModel) -> Dimensions:
    """Return the sizes of the decoder."""
    text = model.text_config
    heads = int(text.num_attention_heads)
    return Dimensions(
        num_layers=len(model.layers),
        hidden_size=int(text.hidden_size),
        num_heads=heads,
        num_kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        head_size=int(getattr(text, "head_dim", None) or text.hidden_size // heads),
        intermediate_size=int(text.intermediate_size),
        vocab_size=int(text.vocab_size),
    )


def _check_tensors(checkpoint: Checkpoint, model: FamilyModel) -> None:
    """Raise CheckpointError unless the checkpoint has the decoder's tensors, and all tensors have the right shapes."""
    for name, parameter in model.root.named_parameters():
        wanted = canonical_name(name)
        if wanted.startswith("vision_tower.") and wanted not in checkpoint.tensors:
            continue  # no graph may use it; one that is used is missed before anything is written
        got = checkpoint.tensor(wanted).shape
        if got != tuple(parameter.shape):
            raise CheckpointError(
                f"{checkpoint.folder} tensor {wanted!r}: expected shape {list(parameter.shape)} (config.json),"
                f" got {list(got)}; configuration and weights belong to different models"
            )


def _write_graph(graph: TracedGraph, stored: dict[str, StoredTensor], folder: Path) -> GraphSpec:
    tensors = {name: stored[tensor] for name, tensor in graph.weights.items()}
    large = _large_constants(graph)
    tensors |= {name: stored[f"{graph.spec.name}.{name}"] for name in large}
    small = {name: values for name, values in graph.constants.items() if name not in large}
    weight_bytes = attach_weights(graph.model, tensors, small, bundle=folder)
    save(graph.model, folder / graph.spec.file)
    symbols = {symbol for profile in graph.spec.profiles for symbol in profile.sizes}
    require_supported(graph.model, name=graph.spec.name, symbols=symbols)
    return msgspec.structs.replace(graph.spec, weight_bytes=weight_bytes)


def _large_constants(graph: TracedGraph) -> dict[str, NDArray[np.float32]]:
    """Return the constants that go into a file of their own; the others are written into the graph."""
    return {name: values for name, values in graph.constants.items() if values.nbytes > _LARGEST_INLINE_BYTES}


def _file_entries(folder: Path, *, known: Mapping[str, str]) -> tuple[FileEntry, ...]:
    """Return all files of ``folder``; those with a ``known`` SHA-256 were hashed while they were written."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return tuple(
        FileEntry(path=name, num_bytes=path.stat().st_size, sha256=known.get(name) or sha256_of(path))
        for name, path in sorted(files.items())
    )


def _model_bytes(checkpoint: Checkpoint, dtype: FloatType) -> int:
    size = {"float32": 4, "float16": 2}[dtype]
    total = 0
    for tensor in checkpoint.tensors.values():
        count = 1
        for axis in tensor.shape:
            count *= axis
        total += count * size
    return total


# Where a bundle is written: what may be replaced, how much room it takes, and what a user is told.


_SPARE_BYTES = 64 << 20  # graphs, tokenizer and manifest beside the weights


def check_output(out: Path, *, force: bool) -> None:
    """Raise CheckpointError if ``out`` exists and may not be replaced. Only bundles and empty folders ever are."""
    if not out.exists() and not out.is_symlink():
        return
    if not force:
        raise CheckpointError(
            f"{out}: expected no such folder, it exists; choose another --out or add --force"
        )
    if not out.is_dir() or out.is_symlink():
        raise CheckpointError(
            f"{out}: expected a bundle to replace, got a file or a link; choose another --out"
        )
    if not (out / MANIFEST_NAME).exists() and any(out.iterdir()):
        raise CheckpointError(
            f"{out}: expected a bundle to replace, got a folder of other files; choose another --out"
        )


@contextmanager
def folder_beside(out: Path, *, num_bytes: int, force: bool) -> Iterator[Path]:
    """Yield a new folder beside ``out`` that becomes the bundle ``out`` when the block ends well; see the runtime's.

    Args:
        out: The target.
        num_bytes: Of the weights.
        force: Whether an existing bundle at ``out`` is replaced.

    Raises:
        CheckpointError: If the folder cannot be written, the disk is full, or ``out`` may not be replaced.
    """
    with locked_folder_beside(
        out,
        num_bytes=num_bytes + _SPARE_BYTES,
        error=CheckpointError,
        what="bundle",
        way_out="choose another --out",
        elsewhere=" or choose another --out",
        before_rename=lambda: check_output(out, force=force),  # again: the export took a while
    ) as folder:
        yield folder
