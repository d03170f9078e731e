"""MiniCPM-V 4.6: slices after an overview, 16 patches merged to one visual token, and Qwen3.5's decoder without M-RoPE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import msgspec

from trio_edge.export.checkpoints.text_files import load_tokenizer
from trio_edge.export.families import base
from trio_edge.export.families.base import Family, VisionGraph
from trio_edge.export.graphs.vision.minicpm import WINDOW, MiniCpmVision
from trio_edge.runtime.bundle import graph_io as io
from trio_edge.runtime.bundle.errors import CheckpointError
from trio_edge.runtime.bundle.manifest import TensorSpec, VisionDimensions
from trio_edge.runtime.images.minicpm import MiniCpmImages
from trio_edge.runtime.prompts.chat import MINICPM_TEMPLATE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trio_edge.export.checkpoints.checkpoint import Checkpoint
    from trio_edge.runtime.bundle.manifest import FloatType

_MARKS = ("image_id", "image", "slice")


@final
class MiniCpmV46(Family):
    """MiniCPM-V 4.6. It has no ``image_marks``: the texts around slices depend on the image, and are in ``ImageLayout.text``."""

    model_type = "minicpmv4_6"
    architecture = "MiniCPMV4_6ForConditionalGeneration"
    chat_template = MINICPM_TEMPLATE
    text_types = ("qwen3_5_text",)
    is_hybrid = True
    required = (("merger_times", 1),)

    def check_config(self, config: Any, checkpoint: Checkpoint) -> None:
        """Raise CheckpointError unless patches are square, coloured and merged in blocks of 2x2."""
        vision = config.vision_config
        base.require_square_tiles(vision, checkpoint.folder)
        last = vision.num_hidden_layers - 1
        for name, is_supported, expected, got in (
            (
                "merge_kernel_size",
                tuple(config.merge_kernel_size) == (2, 2),
                "2, 2",
                config.merge_kernel_size,
            ),
            (
                "window_kernel_size",
                tuple(vision.window_kernel_size) == (2, 2),
                "2, 2",
                vision.window_kernel_size,
            ),
            ("insert_layer_id", 0 <= vision.insert_layer_id < last, f"0..{last - 1}", vision.insert_layer_id),
            ("vision num_channels", vision.num_channels == 3, "3", vision.num_channels),
        ):
            if not is_supported:
                raise CheckpointError(
                    f"{checkpoint.folder}: expected {name} {expected}, got {got}; this variant cannot be exported"
                )

    def images(self, checkpoint: Checkpoint, config: Any, max_visual: int | None) -> MiniCpmImages:
        """Return the slices; see ``Family``. ``max_visual`` lowers their number."""
        vision, tokenizer = config.vision_config, load_tokenizer(checkpoint)
        images = MiniCpmImages.from_preprocessor_config(
            base.read_image_processor(checkpoint),
            table_side=vision.image_size // vision.patch_size,
            **dict(_marks(tokenizer)),
        )
        ours = images.patch_size, f"{images.merge_size**2}x"
        theirs = vision.patch_size, config.downsample_mode
        base.require_same("patch_size and downsample_mode", checkpoint, tower=theirs, processor=ours)
        fewer = (
            msgspec.structs.replace(images, max_tiles=most) for most in range(images.max_tiles - 1, 1, -1)
        )
        candidates = filter(None, (images, *fewer, images.at_base()))
        return base.first_that_fits(max_visual, candidates, smallest="the overview")

    def vision(
        self, inner: Any, config: Any, *, processing: MiniCpmImages, dtype: FloatType, with_features: bool
    ) -> tuple[VisionGraph, VisionDimensions]:
        """Return the graph of the slices; see ``Family``."""
        vision, width, most = (
            config.vision_config,
            config.text_config.hidden_size,
            processing.patches_per_tile,
        )
        merge_after = vision.insert_layer_id if processing.merge_size == 4 else None
        module = MiniCpmVision(inner.vision_tower, inner.merger, merge_after=merge_after)
        merged = WINDOW * vision.hidden_size
        graph = VisionGraph(
            module=module,
            inputs=(
                TensorSpec(
                    name=io.PIXEL_VALUES, dtype="float32", shape=("B", most, 3 * vision.patch_size**2)
                ),
                TensorSpec(name=io.TABLE_INDEX, dtype="int32", shape=("B", most)),
                TensorSpec(name=io.NUM_PATCHES, dtype="int32", shape=("B",)),
                TensorSpec(name=io.TOKEN_INDEX, dtype="int32", shape=("N",)),
            ),
            outputs=(base.visual_tokens(width, dtype=dtype),),
            linear_groups=module.linear_groups(),
        )
        return graph, VisionDimensions(
            num_layers=vision.num_hidden_layers,
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            patches_per_tile=most,
            num_merged_layers=0 if merge_after is None else vision.num_hidden_layers - 1 - merge_after,
            projector_weights=merged * (merged + width),
        )


def _marks(tokenizer: Any) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield the texts that the tokenizer names, by their names in ``MiniCpmImages``."""
    for name in _MARKS:
        start, end = (getattr(tokenizer, f"{name}_{side}_token", None) for side in ("start", "end"))
        if start is not None and end is not None:
            yield f"{name.removeprefix('image_')}_marks", (str(start), str(end))
