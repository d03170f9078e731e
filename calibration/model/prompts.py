"""A sample as it enters decoder layer 0: text and visual tokens in one sequence, without padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from trio_edge.calibration.model.sequence import Sequence
from trio_edge.runtime.bundle.errors import DataError, ImageError, ShapeError
from trio_edge.runtime.images.reading import open_image
from trio_edge.runtime.prompts.chat import build_messages, prompt_ids
from trio_edge.runtime.prompts.tokenizer import Inset, RunPositions, mrope_positions, plain_positions

if TYPE_CHECKING:
    from PIL import Image

    from trio_edge.calibration.model.torch_model import TorchModel
    from trio_edge.calibration.questions import Sample
    from trio_edge.runtime.images.processing import ImageLayout
    from trio_edge.runtime.prompts.tokenizer import PromptIds, PromptPositions


@dataclass(frozen=True, kw_only=True)
class SampleShape:
    """Sizes of a sample, which a bundle's fixed shapes must cover."""

    where: str
    """FILE or FILE:LINE of the sample."""
    width: int
    height: int
    sizes: dict[str, int]
    """Sizes of the vision graph's axes, N among them."""
    num_text: int


def sample_shape(model: TorchModel, question: Sample) -> SampleShape:
    """Return the sizes of a sample, without running a graph.

    Raises:
        DataError: If its image cannot be read or has no tokens to choose from, or its prompt cannot be asked; the message
            starts with ``question.where``.
    """
    image, ids = _read(model, question)
    width, height = image.size
    sizes = model.images.sizes(width, height)
    if sizes["N"] < 2:
        raise DataError(
            f"{question.where}: expected an image of at least 2 visual tokens, got {sizes['N']}; leave it out"
        )
    return SampleShape(where=question.where, width=width, height=height, sizes=sizes, num_text=ids.num_tokens)


def make_prompt(model: TorchModel, question: Sample) -> Sequence:
    """Run the vision encoder on a sample and return the sequence that enters layer 0.

    Raises:
        DataError: As ``sample_shape``.
    """
    image, ids = _read(model, question)
    sizes = model.images.sizes(*image.size)
    inputs = model.images.prepare(image, sizes)
    graph = model.parts.vision
    tensors = [torch.from_numpy(inputs[spec.name]).to(model.device) for spec in graph.inputs]
    pixels = [spec.name for spec in graph.inputs].index("pixel_values")
    tensors[pixels] = tensors[pixels].to(model.dtype)
    with model.device:  # for constants that the graph makes
        outputs = graph.module(*tensors)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    visual_ND, *planes_ND = (rows[: sizes["N"]].to(model.dtype) for rows in outputs)
    layout = model.images.layout(*image.size)
    rows_N = torch.from_numpy(ids.visual_rows(layout.run_lengths).astype(np.int64)).to(model.device)
    all_ids = ids.all_ids(layout.run_lengths).astype(np.int64)
    hidden_SD = model.embedding_VD[torch.from_numpy(all_ids)].index_copy(0, rows_N, visual_ND)
    positions = _positions(model, ids, layout)
    return Sequence(
        hidden_SD=hidden_SD,
        positions_AS=torch.from_numpy(positions.ids).to(model.device),
        next_position=positions.next,
        visual_rows_N=rows_N,
        original_N=torch.arange(len(rows_N), device=model.device),
        planes_ND=tuple(planes_ND),
    )


def _read(model: TorchModel, question: Sample) -> tuple[Image.Image, PromptIds]:
    if len(question.images) != 1:
        raise DataError(
            f"{question.where}: expected one image, got {len(question.images)};"
            " leave the sample out (only trio-eval takes several images)"
        )
    try:
        image = open_image(question.images[0])
        layout = model.images.layout(*image.size)
        ids = prompt_ids(
            build_messages(question.question, images=[image]),
            tokenizer=model.tokenizer,
            template=model.template,
            text=model.text,
            insets=[Inset(layout.text, number_marks=layout.number_marks)],
        )
    except (ImageError, ShapeError) as error:
        raise DataError(f"{question.where}: {error}") from None
    return image, ids


def _positions(model: TorchModel, ids: PromptIds, layout: ImageLayout) -> PromptPositions:
    length = ids.num_tokens + layout.num_visual
    if model.parts.position_axes == 1:
        return plain_positions(num_rows=length, length=length)
    assert layout.positions is not None  # models with M-RoPE have them
    run = RunPositions(layout.positions, layout.position_span, len(ids.before))
    return mrope_positions([run], num_text=ids.num_tokens, num_rows=length)
