"""What enters the linear layers of a decoder while it answers with token reduction on: rows of it, and its largest values.

The rows behind a stage come from a sequence that has lost most of its visual tokens, which is what the bundle's layers are going
to see; statistics of the model that keeps everything would be of other tokens. Probes are not listened to.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from trio_edge.calibration.quantization.groups import GROUPS
from trio_edge.calibration.schedules.greedy import greedy_answer
from trio_edge.calibration.schedules.prompts import make_prompt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor, nn

    from trio_edge.calibration.quantization.groups import GroupName
    from trio_edge.calibration.questions import Question
    from trio_edge.calibration.schedules.selecting import Probes
    from trio_edge.calibration.schedules.torch_model import TorchModel
    from trio_edge.runtime.schedule import Schedule

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
        assert self.largest_I is not None, "every decoder layer runs in every answer"
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
def listening_to_inputs(
    layers: Sequence[nn.Module], *, num_samples: int
) -> Iterator[list[dict[GroupName, Inputs]]]:
    """Collect from decoder layers, while they run, what enters their linear layers.

    Args:
        layers: The decoder's.
        num_samples: How many are going to be answered, so that each gives its share of the rows.
    """
    found: list[dict[GroupName, Inputs]] = [{group.name: Inputs() for group in GROUPS} for _ in layers]
    generator = torch.Generator().manual_seed(0)
    num_rows = -(-NUM_ROWS // num_samples)
    with ExitStack() as stack:
        for layer, inputs in zip(layers, found):
            stack.enter_context(_listening(layer, inputs, num_rows=num_rows, generator=generator))
        yield found


@contextmanager
def _listening(
    layer: nn.Module, inputs: dict[GroupName, Inputs], *, num_rows: int, generator: torch.Generator
) -> Iterator[None]:
    """Collect while ``layer`` itself runs; a probe runs its linear layers only."""
    is_running = False

    def begin(_module: nn.Module, _values: Any) -> None:
        nonlocal is_running
        is_running = True

    def end(_module: nn.Module, _values: Any, _result: Any) -> None:
        nonlocal is_running
        is_running = False

    def listener(found: Inputs) -> Callable[[nn.Module, Any], None]:
        def listen(_module: nn.Module, values: tuple[Tensor, ...]) -> None:
            if is_running:
                found.add(values[0].flatten(0, -2), num_rows=num_rows, generator=generator)

        return listen

    handles = [layer.register_forward_pre_hook(begin), layer.register_forward_hook(end)]
    for group in GROUPS:
        first = layer.get_submodule(group.linears[0])
        handles.append(first.register_forward_pre_hook(listener(inputs[group.name])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
