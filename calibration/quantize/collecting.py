"""What enters the linear layers of a model while it answers with token reduction on: rows of it, and its largest values.

The rows behind a stage come from a sequence that has lost most of its visual tokens, which is what the bundle's layers are going
to see; statistics of the model that keeps everything would be of other tokens. The head sees the rows whose logits are read.
Probes are not listened to.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from trio_edge.calibration.model.greedy import greedy_answer
from trio_edge.calibration.model.prompts import make_prompt
from trio_edge.calibration.quantize.products import products_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from trio_edge.calibration.model.selecting import Probes
    from trio_edge.calibration.model.torch_model import TorchModel
    from trio_edge.calibration.quantize.sections import Section
    from trio_edge.calibration.questions import Question
    from trio_edge.runtime.bundle.schedule import Schedule

NUM_ROWS = 512
"""Rows of every input that are kept, of all samples together, at most a few more."""


@dataclass(slots=True)
class Inputs:
    """What entered one group of linear layers."""

    rows: list[Tensor] = field(default_factory=list)
    """[rows, I] each, some of every prompt and every answer token, in the compute type."""
    largest_I: Tensor | None = None
    """float32, largest absolute value of each input over all rows that entered."""

    def add(self, values_SI: Tensor, *, num_rows: int, generator: torch.Generator) -> None:
        """Take ``num_rows`` of the rows, drawn, and the largest values of all."""
        largest_I = values_SI.abs().amax(0).to(torch.float32)
        self.largest_I = largest_I if self.largest_I is None else torch.maximum(self.largest_I, largest_I)
        drawn = torch.randperm(len(values_SI), generator=generator)[:num_rows]
        self.rows.append(values_SI[drawn.to(values_SI.device)].clone())

    def all_rows(self) -> Tensor:
        """Return the rows [T, I], float32, and the largest values of all that entered as one more."""
        assert self.largest_I is not None, "every layer runs in every answer"
        return torch.cat([*(rows.to(torch.float32) for rows in self.rows), self.largest_I[None]])


def answer_samples(
    model: TorchModel,
    questions: Sequence[Question],
    schedule: Schedule,
    *,
    probes: Probes,
    num_tokens: int,
    on_sample: Callable[[], None],
) -> None:
    """Answer ``questions``, for those who listen.

    Args:
        model: In floating point.
        questions: Samples; each is answered.
        schedule: What reduces the tokens meanwhile.
        probes: The model's.
        num_tokens: Answer tokens of a sample, at most: decoding sees other rows than prompts.
        on_sample: Called after every sample.

    Raises:
        DataError: If a sample cannot be asked.
    """
    for question in questions:
        with torch.inference_mode():
            prompt = make_prompt(model, question)
            greedy_answer(model, prompt, schedule, probes=probes, max_tokens=num_tokens)
        on_sample()


@contextmanager
def listening_to_inputs(sections: Sequence[Section], *, num_samples: int) -> Iterator[list[list[Inputs]]]:
    """Collect from ``sections``, while they run, what enters each of their groups.

    Args:
        sections: Of the model.
        num_samples: How many are going to be answered, so that each gives its share of the rows.
    """
    found = [[Inputs() for _ in section.groups] for section in sections]
    generator = torch.Generator().manual_seed(0)
    num_rows = -(-NUM_ROWS // num_samples)

    def listener(inputs: Inputs) -> Callable[[Tensor], Tensor]:
        def listen(values: Tensor) -> Tensor:
            inputs.add(values.flatten(0, -2), num_rows=num_rows, generator=generator)
            return values

        return listen

    with ExitStack() as stack:
        for section, collected in zip(sections, found):
            listeners = {
                group.linears[0].get_parameter("weight"): listener(inputs)
                for group, inputs in zip(section.groups, collected)
            }
            stack.enter_context(products_of(section.module, listeners))
        yield found
