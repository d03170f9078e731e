"""The decisions of an export before any graph is traced or file is written: ``read``, ``resolve``, ``build``.

Nearly all errors in options and checkpoints are found here.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.modeling_utils import local_torch_dtype

from trio_edge.export.checkpoints.checkpoint import EMBEDDING_NAME, read_checkpoint
from trio_edge.export.checkpoints.text_files import read_generation, read_text_files
from trio_edge.export.families import family_of
from trio_edge.export.families.base import check_positions
from trio_edge.export.families.clip import build_clip, read_clip, with_patches
from trio_edge.export.graphs.state_layers import is_linear
from trio_edge.export.graphs.vision.clip import KEEP_MULTIPLE
from trio_edge.export.options import LevelRequest
from trio_edge.export.quantize.plan import check_packed
from trio_edge.runtime.bundle.errors import ScheduleError
from trio_edge.runtime.bundle.graph_io import text_buckets
from trio_edge.runtime.bundle.manifest import Dimensions, LinearAttention
from trio_edge.runtime.images.interface import at_form
from trio_edge.runtime.images.llava import LlavaImages
from trio_edge.runtime.images.qwen import Qwen3Images, QwenImages
from trio_edge.trio.budgets import MAX_TOPK, ScheduleRequest, check_stage_layers
from trio_edge.trio.methods import StageMethod, all_methods, stage_method, token_method

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from trio_edge.export.checkpoints.checkpoint import Checkpoint
    from trio_edge.export.checkpoints.text_files import TextFiles
    from trio_edge.export.families.base import Family, FamilyModel
    from trio_edge.export.families.clip import Clip, ClipGraphs
    from trio_edge.export.options import ExportOptions
    from trio_edge.runtime.bundle.generation import GenerationSettings
    from trio_edge.runtime.bundle.manifest import FloatType
    from trio_edge.runtime.bundle.schedule import Schedule
    from trio_edge.runtime.images.interface import ImageProcessing
    from trio_edge.runtime.videos.qwen import VideoProcessing
    from trio_edge.trio.selectors.interface import TokenSelector


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportSource:
    """The checkpoint, and the CLIP checkpoint if the options name one."""

    checkpoint: Checkpoint
    """Has the model's tensors, and those of CLIP that graphs may use."""
    family: Family
    clip: Clip | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageProfiles:
    """The image sizes that get shapes."""

    sizes: tuple[Mapping[str, int], ...]
    """Sizes of the vision graph's axes, for each image size."""
    largest: Mapping[str, int]
    """Sizes of an image in the prompt with the most visual tokens; schedule and cost are made for this prompt."""
    num_images: int = 1
    most_of_several: int = 0
    """Most visual tokens of an image in a prompt with several images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedOptions:
    """The options with all shares and "auto" replaced by this checkpoint's numbers."""

    processing: ImageProcessing
    video_processing: dict[str, Any] | None
    """The constants for videos; None if the model takes no videos."""
    images: ImageProfiles
    image_tokens: int
    """Visual tokens of the image before any reduction."""
    token_keep: int | None
    """K of the selector before the decoder, per image."""
    dtype: FloatType
    text: TextFiles
    generation: GenerationSettings

    @property
    def entering(self) -> int:
        """Visual tokens that enter the decoder, in the prompt with the most."""
        one = self.images.largest["N"] if self.token_keep is None else self.token_keep
        return self.images.num_images * one


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The sizes that determine the shapes of all graphs."""

    vision_sizes: tuple[Mapping[str, int], ...]
    """Sizes of the vision graph's profiles, including N."""
    schedule: Schedule
    token_keep: int | None
    """K of the selector before the decoder, or None."""
    text_buckets: tuple[int, ...]
    max_new_tokens: int
    dtype: FloatType
    clip_texts: tuple[int, ...] = ()
    """Every M of CLIP's text tower, ascending; empty without one."""
    max_images: int = 1
    most_of_several: int = 0
    """Most visual tokens of an image in a prompt with several images."""

    @property
    def vision_rows(self) -> tuple[int, ...]:
        """Every N of the vision graph, ascending."""
        return tuple(sorted({sizes["N"] for sizes in self.vision_sizes}))

    @property
    def visual_sizes(self) -> tuple[int, ...]:
        """Every N of the prefix graph, ascending: of one image, and of all, half, a quarter, … of the most images."""
        sizes = {*self.vision_rows} if self.token_keep is None else {self.token_keep}
        of_several = self.most_of_several if self.token_keep is None else self.token_keep
        count = self.max_images
        while count > 1:
            sizes.add(count * of_several)
            count = (count + 1) // 2
        least = self.schedule.stages[0].keep if self.schedule.stages else 1
        return tuple(sorted({max(size, least) for size in sizes}))


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """All inputs of a bundle's graphs, weights and manifest."""

    options: ExportOptions
    source: ExportSource
    resolved: ResolvedOptions
    model: FamilyModel
    dimensions: Dimensions
    selector: TokenSelector | None
    clip_graphs: ClipGraphs | None
    layout: Layout
    level: str = "default"
    others: tuple[ExportPlan, ...] = ()
    """The other levels' plans; ``resolved``, ``layout`` and ``level`` differ."""

    @property
    def levels(self) -> tuple[ExportPlan, ...]:
        """The plans of all levels; the first is the default."""
        return (self, *self.others)

    @property
    def rows_in_all(self) -> int:
        """Visual rows of the largest prompt, summed over the decoder's layers."""
        schedule, most = self.layout.schedule, self.layout.visual_sizes[-1]
        return sum(schedule.tokens_per_layer(num_layers=self.dimensions.num_layers, num_visual=most))


def read(options: ExportOptions) -> ExportSource:
    """Return the checkpoints that ``options`` name, downloaded if necessary.

    Raises:
        CheckpointError: If one cannot be exported.
    """
    checkpoint = read_checkpoint(options.model, revision=options.revision, check_config=family_of)
    check_packed(checkpoint, options.quantize)
    family = family_of(checkpoint.folder, checkpoint.config)
    clip = None if options.clip is None else read_clip(options.clip)
    if clip is not None:
        checkpoint = clip.merged_with(checkpoint)
    return ExportSource(checkpoint=checkpoint, family=family, clip=clip)


def resolve(
    options: ExportOptions, source: ExportSource, *, image_form: str | None = None
) -> ResolvedOptions:
    """Return ``options`` with this checkpoint's numbers, for images in ``image_form``.

    Raises:
        CheckpointError: If the checkpoint's image processor or tokenizer is not supported.
        ScheduleError: If the family does not support an option, or its number is out of range.
    """
    checkpoint, family = source.checkpoint, source.family
    processing, videos, profiles = _processing(options, source, encoder_keep=None, image_form=image_form)
    image_tokens, default_template = profiles.largest["N"], family.default_chat_template(checkpoint)
    if options.encoder_keep is not None:
        keep = _encoder_keep(options.encoder_keep, profiles.largest)
        processing, videos, profiles = _processing(options, source, encoder_keep=keep, image_form=image_form)
    return ResolvedOptions(
        processing=processing,
        video_processing=None if videos is None else videos.sampling.to_dict(),
        images=profiles,
        image_tokens=image_tokens,
        token_keep=None if options.token_keep is None else _kept(options.token_keep, profiles.largest["N"]),
        dtype=bundle_dtype(checkpoint, options.dtype),
        generation=read_generation(checkpoint),
        text=read_text_files(checkpoint, default_template=default_template, image_marks=family.image_marks),
    )


def _processing(
    options: ExportOptions, source: ExportSource, *, encoder_keep: int | None, image_form: str | None
) -> tuple[ImageProcessing, VideoProcessing | None, ImageProfiles]:
    """Return the processing of images, that of videos if the model takes any, and the sizes that get shapes."""
    family = source.family
    images = family.image_processing(
        source.checkpoint, encoder_keep=encoder_keep, max_visual=options.max_visual
    )
    if options.pad_images:
        if not isinstance(images, LlavaImages) or images.kind != "single":
            raise ScheduleError(
                f"--pad-images: expected a model that takes one tile of an image (LLaVA-1.5), got {family.model_type}; leave it out"
            )
        images = msgspec.structs.replace(images, do_pad=True)
    if (least := options.min_visual) is not None:
        if not isinstance(images, (QwenImages, Qwen3Images)):
            raise ScheduleError(
                f"--min-visual: expected a Qwen-VL model, got {family.model_type}; leave it out"
            )
        most = images.max_pixels // images.token_size**2
        if not 1 <= least <= most:
            raise ScheduleError(
                f"--min-visual: expected 1..{most} (--max-visual), got {least}; choose such a number"
            )
        images = msgspec.structs.replace(images, min_pixels=least * images.token_size**2)
    if image_form is not None:
        images = at_form(images, image_form)
    videos = family.video_processing(source.checkpoint, images)
    if videos is None and options.max_frames is not None:
        raise ScheduleError(
            f"--max-frames: expected a model that takes videos, got {family.model_type}; use --max-images and give"
            " frames as images"
        )
    return images, videos, _image_profiles(images, videos, options)


@contextmanager
def without_values(dtype: FloatType) -> Iterator[None]:
    """Let torch build and trace modules of type ``dtype`` whose tensors have shapes but no values."""
    with FakeTensorMode(allow_non_fake_inputs=True), local_torch_dtype(getattr(torch, dtype)):
        yield


def build(options: ExportOptions, source: ExportSource, resolved: ResolvedOptions) -> ExportPlan:
    """Return the plan with the model's modules, the schedule and all shapes of each level; called under ``without_values``.

    Raises:
        CheckpointError: If configuration and weights belong to different models, or the model is not supported.
        ScheduleError: If the model cannot follow the schedule, or the longest sequence does not fit the model.
    """
    method, keep, has_clip = options.token_method, resolved.token_keep, source.clip is not None
    selector = None
    if method is not None and keep is not None:
        selector = token_selector(method, num_keep=keep, clip=has_clip, grid=_full_grid(resolved.processing))
    model, clip_graphs = _model(options, source, resolved)
    dimensions = dimensions_of(model)
    levels = options.levels or (LevelRequest("default", options.schedule),)
    sizes = [
        resolved if level.image_form is None else resolve(options, source, image_form=level.image_form)
        for level in levels
    ]
    plans = []
    for level, own, schedule in zip(levels, sizes, _schedules(levels, sizes, source, dimensions)):
        schedule.check_fits(num_layers=dimensions.num_layers, max_visual=own.entering)
        _check_schedule(schedule, source.family, dimensions, max_images=options.num_units)
        layout = _layout(options, source, own, schedule)
        check_positions(
            model.text_config,
            num_visual=layout.visual_sizes[-1],
            max_text=options.max_text,
            max_new_tokens=options.max_new_tokens,
            schedule=schedule,
        )
        parts = model, dimensions, selector, clip_graphs
        plans.append(ExportPlan(options, source, own, *parts, layout, level.name))
    return replace(plans[0], others=tuple(plans[1:]))


def _schedules(
    levels: Sequence[LevelRequest],
    sizes: Sequence[ResolvedOptions],
    source: ExportSource,
    dimensions: Dimensions,
) -> list[Schedule]:
    """Return the levels' schedules, with stages at the same layers in all that have any."""

    def schedules(layers: tuple[int, ...] | None = None) -> list[Schedule]:
        found = []
        for level, own in zip(levels, sizes):
            wanted = level.schedule
            if isinstance(wanted, ScheduleRequest):
                if layers and wanted.average is not None:
                    wanted = replace(wanted, layers=layers)
                wanted = wanted.schedule(
                    num_layers=dimensions.num_layers,
                    num_visual=own.entering,
                    linear_layers=dimensions.linear_layers,
                    image_tokens=own.images.num_images * own.image_tokens,
                    positions=source.family.positions,
                )
            found.append(wanted)
        return found

    found = schedules()
    # Small budgets need early stages, and large ones can follow them.
    if len(places := {schedule.layers for schedule in found if schedule.stages}) > 1:
        found = schedules(min(places))
        places = {schedule.layers for schedule in found if schedule.stages}
    if len(places) > 1:
        raise ScheduleError(
            "--level: expected stages at the same layers in all levels, got"
            f" {' and '.join(str(list(layers)) for layers in sorted(places))}; give closer budgets, or stages"
        )
    return found


def _image_profiles(
    processing: ImageProcessing, videos: VideoProcessing | None, options: ExportOptions
) -> ImageProfiles:
    sizes, largest = _sizes(processing, options)
    profiles = ImageProfiles(sizes=sizes, largest=largest)
    return profiles if options.num_units == 1 else _with_several(profiles, processing, videos, options)


def _with_several(
    profiles: ImageProfiles,
    processing: ImageProcessing,
    videos: VideoProcessing | None,
    options: ExportOptions,
) -> ImageProfiles:
    """Return the profiles of one image together with those of images or pairs of frames in a prompt with several."""
    sizes, largest = others, several = profiles.sizes, profiles.largest
    if options.max_images > 1 and (of_several := processing.of_several()) != processing:
        others, several = _sizes(of_several, options)
    units = []  # pairs of frames, for each image size, in a video of the most frames
    if videos is not None and options.max_frames is not None:
        units = [videos.sizes(options.max_frames, *size) for size in options.image_sizes]
    most_of_several = max((several, *units), key=lambda found: found["N"])
    one_has_most = largest["N"] >= options.num_units * most_of_several["N"]
    return ImageProfiles(
        sizes=(*units, *(() if others is sizes else others), *sizes),
        largest=largest if one_has_most else most_of_several,
        num_images=1 if one_has_most else options.num_units,
        most_of_several=most_of_several["N"],
    )


def _sizes(
    processing: ImageProcessing, options: ExportOptions
) -> tuple[tuple[Mapping[str, int], ...], Mapping[str, int]]:
    """Return the sizes of all images that get shapes, and the largest."""
    exact = [processing.sizes(width, height) for width, height in options.image_sizes]
    any_image = [] if options.only_image_sizes else list(processing.any_image_sizes())
    largest = max(exact or any_image, key=lambda sizes: (sizes["N"], *sizes.values()))
    return (*exact, *any_image), largest


def _encoder_keep(keep: int | float, largest: Mapping[str, int]) -> int:
    """Return the patches or tokens that the vision encoder keeps; ``keep`` below 1 is a share of the largest image."""
    if isinstance(keep, int):
        return keep
    if "B" not in largest:  # no tiles, so the number counts tokens of the whole image
        return int(keep * largest["N"])
    wanted = keep * largest["N"] / largest["B"]
    return max(1, round(wanted / KEEP_MULTIPLE)) * KEEP_MULTIPLE


def _kept(keep: int | float, num_visual: int) -> int:
    """Return K of the selector before the decoder; ``keep`` below 1 is a share of ``num_visual``."""
    count = keep if isinstance(keep, int) else int(keep * num_visual)
    most = min(num_visual - 1, MAX_TOPK)
    if not 1 <= count <= most:
        raise ScheduleError(
            f"--token-keep: expected 1..{most} of the image's {num_visual} visual tokens, got {count}; choose a number in"
            " this range"
        )
    return count


def bundle_dtype(checkpoint: Checkpoint, wanted: Literal["auto", "float16", "float32"]) -> FloatType:
    """Return the element type of a bundle's graphs."""
    if wanted != "auto":
        return wanted
    return "float32" if checkpoint.tensor(EMBEDDING_NAME).dtype == "F32" else "float16"


def token_selector(
    method: str, *, num_keep: int, clip: bool = False, grid: tuple[int, int] | None = None
) -> TokenSelector:
    """Return the selector ``method`` that keeps ``num_keep`` tokens of an image; raise ScheduleError if there is none.

    With ``clip`` it compares text and image in CLIP's space. ``grid`` are rows and columns of the tokens, if they are one
    full grid.
    """
    row = token_method(method)
    options: dict[str, Any] = {"clip": clip} if row.takes_clip else {}
    if row.takes_grid:
        options["grid"] = grid
    selector: TokenSelector = row.load()(num_keep=num_keep, **options)
    return selector


def _full_grid(processing: ImageProcessing) -> tuple[int, int] | None:
    """Return rows and columns if every image is one full grid of tokens, as with LLaVA-1.5; else None."""
    if not isinstance(processing, LlavaImages) or processing.kind != "single" or processing.encoder_keep:
        return None
    return processing.patches_per_side, processing.patches_per_side


def _model(
    options: ExportOptions, source: ExportSource, resolved: ResolvedOptions
) -> tuple[FamilyModel, ClipGraphs | None]:
    """Return the model's modules, and those of the CLIP checkpoint, if there is one."""
    model = source.family.build(
        source.checkpoint,
        processing=resolved.processing,
        dtype=resolved.dtype,
        with_features=options.token_method is not None and token_method(options.token_method).reads_features,
    )
    source.checkpoint.check_parameters(model.root)
    if source.clip is None:
        return model, None
    clip_graphs = build_clip(source.clip)
    return with_patches(model, clip_graphs, dtype=resolved.dtype), clip_graphs


def dimensions_of(model: FamilyModel) -> Dimensions:
    """Return the sizes of the decoder."""
    text = model.text_config
    heads = int(text.num_attention_heads)
    first: Any = model.layers[0]
    return Dimensions(
        num_layers=len(model.layers),
        hidden_size=int(text.hidden_size),
        num_heads=heads,
        # configurations omit these two, or set them to None, if they follow from the others
        num_kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        head_size=int(getattr(text, "head_dim", None) or text.hidden_size // heads),
        # LFM2 adjusts the configured size
        intermediate_size=int(first.mlp.up_proj.weight.shape[0]),
        vocab_size=int(text.vocab_size),
        linear=_linear_attention(model),
        has_attention_gate=any(_has_gate(layer) for layer in model.layers),
    )


def _has_gate(layer: Any) -> bool:
    """Return whether the query projection is wider than the heads; see ``trio.decoder_layers.split_gate``."""
    if is_linear(layer):
        return False
    attention = layer.self_attn
    return bool(attention.q_proj.weight.shape[0] > attention.o_proj.weight.shape[1])


def _linear_attention(model: FamilyModel) -> LinearAttention | None:
    text, layers = model.text_config, tuple(i for i, layer in enumerate(model.layers) if is_linear(layer))
    if not layers:
        return None
    if hasattr(model.layers[layers[0]], "conv"):
        return LinearAttention(layers=layers, width=int(text.hidden_size), kernel_size=int(text.conv_L_cache))
    return LinearAttention(
        layers=layers,
        num_key_heads=int(text.linear_num_key_heads),
        num_value_heads=int(text.linear_num_value_heads),
        key_size=int(text.linear_key_head_dim),
        value_size=int(text.linear_value_head_dim),
        kernel_size=int(text.linear_conv_kernel_dim),
    )


def _check_schedule(schedule: Schedule, family: Family, dimensions: Dimensions, *, max_images: int) -> None:
    """Raise ScheduleError if the family or the method cannot follow the schedule."""
    linear = dimensions.linear_layers
    check_stage_layers(schedule, num_layers=dimensions.num_layers, linear_layers=linear)
    if schedule.positions not in family.positions:
        raise ScheduleError(
            f"--positions: expected {' or '.join(family.positions)} for {family.model_type}, got {schedule.positions};"
            " leave it out"
        )
    if schedule.budget == "image" and schedule.stages:
        _check_shares(schedule, max_images)


def _check_shares(schedule: Schedule, max_images: int) -> None:
    """Raise ScheduleError unless each image can have a share of the kept tokens."""
    row, keep = stage_method(schedule.method), schedule.stages[-1].keep
    if not (row.has_image_shares and keep >= max_images):
        able = " or ".join(other.name for other in all_methods(StageMethod) if other.has_image_shares)
        raise ScheduleError(
            f"--budget image: expected --method {able}, and at least {max_images} kept tokens (one for each image), got"
            f" {row.name} and {keep} tokens; leave out --budget"
        )


def _layout(
    options: ExportOptions, source: ExportSource, resolved: ResolvedOptions, schedule: Schedule
) -> Layout:
    """Return all sizes; those of the vision graph by ascending N."""
    buckets, max_images = tuple(sorted({*options.text_buckets, options.max_text})), options.num_units
    # A selection needs at least as many rows as it keeps.
    least = schedule.stages[0].keep if schedule.stages and max_images == 1 else 1
    if resolved.token_keep is not None:
        least = resolved.token_keep
    raised = ({**sizes, "N": max(sizes["N"], least)} for sizes in resolved.images.sizes)
    distinct = map(dict, {tuple(sorted(sizes.items())) for sizes in raised})
    return Layout(
        vision_sizes=tuple(sorted(distinct, key=lambda sizes: (sizes["N"], *sizes.values()))),
        schedule=schedule,
        token_keep=resolved.token_keep,
        text_buckets=buckets if options.text_buckets else text_buckets(options.max_text),
        max_new_tokens=options.max_new_tokens,
        dtype=resolved.dtype,
        clip_texts=() if source.clip is None else source.clip.num_texts(options.max_text),
        max_images=max_images,
        most_of_several=resolved.images.most_of_several,
    )
