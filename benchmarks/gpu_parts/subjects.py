"""The models to measure, with released shapes, random weights made on the device, and one image each.

Shapes are those of ``released_shapes``; "small" ones have the same parts and run on a CPU in seconds. The image decides N, the
visual tokens: 336x336 for LLaVA-1.5, 672x672 (five tiles) for LLaVA-NeXT, 1008x1008 for Qwen2.5-VL.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers as hf
from gpu_parts.count import Counted, count
from gpu_parts.prompts import num_before, prompt_ids, prompt_positions, random_picture
from parts.released_shapes import FAMILIES, QWEN_PREPROCESSOR, clip_large, llava_next, qwen2_5_vl, vicuna_7b
from PIL import Image
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from trio_edge.export.checkpoints.checkpoint import Checkpoint, canonical_name, read_json
from trio_edge.export.checkpoints.weights import read_tensor
from trio_edge.export.families import family_of
from trio_edge.export.families.base import FamilyModel
from trio_edge.runtime.bundle.manifest import Dimensions, FloatType, VisionDimensions
from trio_edge.runtime.bundle.schedule import Positions, Schedule
from trio_edge.runtime.images.interface import ImageProcessing
from trio_edge.trio.budgets import ScheduleRequest
from trio_edge.trio.cost.memory import pixel_bytes_of

BUDGETS = (1.0, 1 / 3, 2 / 9, 0.111)


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Sizes of a model and its picture."""

    family: str
    config: Callable[[], Any]
    """transformers' configuration."""
    preprocessor: dict[str, Any]
    picture: tuple[int, int]
    """Width and height in pixels."""


def _small_text(**changes: Any) -> dict[str, Any]:
    sizes = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 12, "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }  # fmt: skip
    return {**sizes, **changes}  # vocabularies keep their size: tokenizers come with them


def _small_clip(side: int) -> Any:
    return clip_large(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=side
    )


def _small_qwen() -> Any:
    return qwen2_5_vl(
        text=_small_text(rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}),
        vision={"depth": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64,
                "fullatt_block_indexes": [1, 3]},
        tie=False,
    )  # fmt: skip


def _cropped(preprocessor: dict[str, Any], side: int, **changes: Any) -> dict[str, Any]:
    small = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    return {**preprocessor, **small, **changes}


_SMALL_PINPOINTS = [[56, 112], [112, 56], [112, 112]]
SHAPES: dict[str, dict[str, Shapes]] = {
    "full": {
        name: Shapes(
            family=name, config=FAMILIES[name].config, preprocessor=FAMILIES[name].preprocessor, picture=picture
        )
        for name, picture in (
            ("llava-1.5-7b", (336, 336)),
            ("llava-next-7b", (672, 672)),
            ("qwen2.5-vl-7b", (1008, 1008)),
        )
    },
    "small": {
        "llava-1.5-7b": Shapes(
            family="llava-1.5-7b",
            config=lambda: hf.LlavaConfig(
                text_config=vicuna_7b(**_small_text()), vision_config=_small_clip(112), image_token_index=32000
            ),
            preprocessor=_cropped(FAMILIES["llava-1.5-7b"].preprocessor, 112),
            picture=(112, 112),
        ),
        "llava-next-7b": Shapes(
            family="llava-next-7b",
            config=lambda: llava_next(vicuna_7b(**_small_text()), _small_clip(56), _SMALL_PINPOINTS),
            preprocessor=_cropped(FAMILIES["llava-next-7b"].preprocessor, 56, image_grid_pinpoints=_SMALL_PINPOINTS),
            picture=(112, 112),
        ),
        "qwen2.5-vl-7b": Shapes(
            family="qwen2.5-vl-7b", config=_small_qwen, preprocessor=QWEN_PREPROCESSOR, picture=(168, 168)
        ),
    },
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes that a cost follows from."""

    decoder: Dimensions
    tower: VisionDimensions
    vision_sizes: dict[str, int]
    """Sizes of the vision graph's axes for the picture."""
    pixel_bytes: int
    element_bytes: int
    num_visual: int
    """N."""
    vision_weights: int
    """Elements."""
    positions: Positions
    """The family's default rule."""

    def schedule(self, keep: float) -> Schedule:
        """Return the schedule with this average keep that ``trio-export`` would choose."""
        return ScheduleRequest(average=keep, positions=self.positions).schedule(
            num_layers=self.decoder.num_layers, num_visual=self.num_visual
        )

    def count(self, keep: float, *, num_text: int) -> Counted:
        """Return the work of this schedule."""
        return count(self, self.schedule(keep), num_text=num_text)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model on the device, with an image and a prompt."""

    sizes: Sizes
    root: nn.Module
    model: FamilyModel
    device: torch.device
    dtype: torch.dtype
    vision_inputs: dict[str, Tensor]
    """In the order in which the vision graph takes them."""
    token_embeddings: Tensor
    """[V, D]."""
    text_embeds: Tensor
    """[T, D]; the first ``num_before`` rows come before the picture."""
    num_before: int
    position_ids: Tensor
    """[A, S] int32; no row is padding."""
    next_position: int
    """Position of the first new token with preserved positions."""


def describe(shapes: Shapes, folder: Path) -> Checkpoint:
    """Write configuration files into ``folder`` and return them as a checkpoint without any tensor."""
    shapes.config().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(shapes.preprocessor))
    return Checkpoint(folder=folder, revision=None, config=read_json(folder / "config.json"), tensors={})


def empty_model(checkpoint: Checkpoint, *, dtype: FloatType) -> tuple[FamilyModel, ImageProcessing]:
    """Return a checkpoint's modules without memory, and its image processing."""
    family = family_of(checkpoint.folder, checkpoint.config)
    processing = family.image_processing(checkpoint, encoder_keep=None, max_visual=None)
    with torch.device("cpu"), FakeTensorMode(allow_non_fake_inputs=True):  # constants become numpy arrays
        model = family.build(checkpoint, processing=processing, dtype=dtype, with_features=False)
    return model, processing


def sizes_of(shapes: Shapes, *, dtype: FloatType) -> Sizes:
    """Return a model's sizes with its picture; the model needs no memory."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = describe(shapes, Path(folder))
        model, processing = empty_model(checkpoint, dtype=dtype)
        sizes = processing.sizes(*shapes.picture)
        return _sizes(model, processing, sizes, dtype=dtype, checkpoint=checkpoint)


def _sizes(
    model: FamilyModel,
    processing: ImageProcessing,
    vision_sizes: dict[str, int],
    *,
    dtype: FloatType,
    checkpoint: Checkpoint,
) -> Sizes:
    text, layer = model.text_config, cast("Any", model.layers[0])
    attention = layer.self_attn
    size = int(attention.head_dim)
    decoder = Dimensions(
        num_layers=len(model.layers),
        hidden_size=text.hidden_size,
        num_heads=attention.q_proj.out_features // size,
        num_kv_heads=attention.k_proj.out_features // size,
        head_size=size,
        intermediate_size=text.intermediate_size,
        vocab_size=text.vocab_size,
    )
    return Sizes(
        decoder=decoder,
        tower=model.vision_dimensions,
        vision_sizes=vision_sizes,
        pixel_bytes=pixel_bytes_of(processing.to_dict(), vision_sizes),
        element_bytes=2 if dtype == "float16" else 4,
        num_visual=vision_sizes["N"],
        vision_weights=sum(weight.numel() for weight in model.vision.module.parameters()),
        positions=family_of(checkpoint.folder, checkpoint.config).positions[0],
    )


def random_subject(
    shapes: Shapes, *, num_text: int, device: torch.device, dtype: FloatType, seed: int = 0
) -> Subject:
    """Return a model with random weights that are made on the device, and a random picture."""
    with tempfile.TemporaryDirectory() as folder:
        return subject_of(
            describe(shapes, Path(folder)),
            picture=random_picture(shapes.picture, seed=seed),
            num_text=num_text,
            device=device,
            dtype=dtype,
            seed=seed,
        )


def subject_of(
    checkpoint: Checkpoint,
    *,
    picture: Image.Image,
    num_text: int,
    device: torch.device,
    dtype: FloatType,
    seed: int = 0,
) -> Subject:
    """Return a checkpoint's model on the device; tensors that the checkpoint lacks are random.

    Args:
        checkpoint: With or without tensors.
        picture: RGB.
        num_text: Random text tokens of the prompt.
        device: Device of weights and inputs.
        dtype: Type of weights and activations.
        seed: Seed of weights and tokens.
    """
    model, processing = empty_model(checkpoint, dtype=dtype)
    element = getattr(torch, dtype)
    generator = torch.Generator(device).manual_seed(seed)
    _fill(model, checkpoint, device=device, dtype=element, generator=generator)
    sizes = processing.sizes(*picture.size)
    prepared = processing.prepare(picture, sizes)
    root: Any = model.root
    table = root.get_input_embeddings().weight
    ids = torch.from_numpy(prompt_ids(len(table), num_text=num_text, seed=seed)).to(device)
    positions = prompt_positions(
        processing, picture, mrope=model.position_axes == 3, num_text=num_text, num_rows=sizes["N"] + num_text
    )  # fmt: skip
    return Subject(
        sizes=_sizes(model, processing, sizes, dtype=dtype, checkpoint=checkpoint),
        root=root,
        model=model,
        device=device,
        dtype=element,
        vision_inputs={
            spec.name: torch.from_numpy(np.ascontiguousarray(prepared[spec.name])).to(device)
            for spec in model.vision.inputs
        },
        token_embeddings=table.detach(),
        text_embeds=table.detach()[ids],
        num_before=num_before(num_text),
        position_ids=torch.from_numpy(positions.ids).to(device),
        next_position=positions.next,
    )


def _fill(
    model: FamilyModel,
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> None:
    """Give all parameters memory on the device, and the checkpoint's values or random ones."""
    vision: Any = model.vision.module
    made: dict[nn.Parameter, nn.Parameter] = {}  # tensors hash by identity
    real: set[nn.Parameter] = set()
    for prefix, module in [*model.root.named_modules(), *vision.named_modules()]:
        for name, fake in list(module.named_parameters(recurse=False)):
            if fake in real:
                continue
            if fake not in made:
                values = torch.empty(fake.shape, dtype=dtype, device=device)
                source = checkpoint.tensors.get(canonical_name(f"{prefix}.{name}".lstrip(".")))
                if source is not None:
                    values.copy_(read_tensor(source))
                elif "norm" in prefix or "ln_" in prefix:
                    values.fill_(1.0 if name == "weight" else 0.0)
                else:
                    values.normal_(std=0.02, generator=generator)
                made[fake] = nn.Parameter(values, requires_grad=False)
                real.add(made[fake])
            setattr(module, name, made[fake])
    for name, constant in model.vision.constants.items():
        owner, _, leaf = name.rpartition(".")
        setattr(vision.get_submodule(owner), leaf, torch.from_numpy(np.asarray(constant)).to(device))
