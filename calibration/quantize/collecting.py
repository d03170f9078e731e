"""Inputs of linear layers, and rows of KV caches, collected while a model answers with token reduction on.

After a stage the sequence has lost most of its visual tokens, as in the bundle; statistics of the model that keeps
everything would be of other tokens. The head sees the rows whose logits are read. Probes are not listened to.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from trio_edge.calibration.model.greedy import greedy_answer
from trio_edge.calibration.model.prompts import make_prompt
from trio_edge.export.quantize.scales import CacheRange

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from trio_edge.calibration.model.torch_model import TorchModel
    from trio_edge.calibration.quantize.sections import Section
    from trio_edge.calibration.questions import Question
    from trio_edge.export.quantize.scales import Smoothing
    from trio_edge.runtime.bundle.schedule import Schedule


NUM_ROWS = 512
"""Rows of every input that are kept, of all samples together, at most a few more."""


@dataclass(slots=True)
class Inputs:
    """Inputs of one group of linear layers."""

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
    num_tokens: int,
    on_sample: Callable[[], None],
) -> None:
    """Answer ``questions``, for those who listen: with answer tokens, as decoding sees other rows than prompts."""
    for question in questions:
        with torch.inference_mode():
            prompt = make_prompt(model, question)
            greedy_answer(model, prompt, schedule, max_tokens=num_tokens)
        on_sample()


@contextmanager
def listening_to_inputs(sections: Sequence[Section], *, num_samples: int) -> Iterator[list[list[Inputs]]]:
    """Collect from ``sections``, while they run, what enters each of their groups; each sample gives its share of the rows."""
    found = [[Inputs() for _ in section.groups] for section in sections]
    generator = torch.Generator().manual_seed(0)  # the same samples give the same factors
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


@dataclass(slots=True)
class CachedRows:
    """Largest values that one layer's KV cache has held."""

    key_GE: Tensor | None = None
    """float32, largest absolute value of each element of the rotated keys over all rows."""
    value_GE: Tensor | None = None

    def add(self, key: Tensor, value: Tensor) -> None:
        """Take the largest of rows [1, G, S, E]."""
        self.key_GE, self.value_GE = _largest(self.key_GE, key), _largest(self.value_GE, value)

    def range_of(self, smoothing: Smoothing | None) -> CacheRange:
        """Return the layer's range; its values are divided by the factors that ``smoothing`` moves into their weight."""
        assert self.key_GE is not None and self.value_GE is not None, (
            "every decoder layer runs in every answer"
        )
        value_GE = self.value_GE
        if smoothing is not None and smoothing.outputs is not None:
            value_GE = value_GE / smoothing.outputs.to(value_GE.device).reshape(value_GE.shape)
        return CacheRange(key=float(self.key_GE.max()), value=float(value_GE.max()))


def _largest(before_GE: Tensor | None, rows: Tensor) -> Tensor:
    largest_GE = rows[0].abs().amax(1).to(torch.float32)
    return largest_GE if before_GE is None else torch.maximum(before_GE, largest_GE)


@contextmanager
def listening_to_caches(layers: Sequence[nn.Module]) -> Iterator[list[CachedRows]]:
    """Collect from decoder layers, while they run, what they append to ``present``."""
    found = [CachedRows() for _ in layers]

    def listener(rows: CachedRows) -> Callable[..., None]:
        def listen(_module: nn.Module, _values: Any, named: dict[str, Any], _result: Any) -> None:
            rows.add(*named["present"][-2:])

        return listen

    with ExitStack() as stack:
        for layer, rows in zip(layers, found):
            handle = layer.register_forward_hook(listener(rows), with_kwargs=True)
            stack.callback(handle.remove)
        yield found


class _Products(TorchFunctionMode):
    """Calls ``inputs[weight]`` in place of what enters a product with a weight.

    Forward hooks would miss products that are functions of a weight, not calls of a layer, and would hear probes, which call
    layers of a module that does not run.
    """

    def __init__(self, inputs: Mapping[nn.Parameter, Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self._inputs = inputs

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is nn.functional.linear and args[1] in self._inputs:
            args = (self._inputs[args[1]](args[0]), *args[1:])
        return function(*args, **(kwargs or {}))


@contextmanager
def products_of(
    module: nn.Module, inputs: Mapping[nn.Parameter, Callable[[Tensor], Tensor]]
) -> Iterator[None]:
    """Let products x Wᵀ compute with ``inputs[W](x)``, whenever ``module`` runs."""
    mode: Any = _Products(inputs)

    def begin(*_: Any) -> None:
        mode.__enter__()

    def end(*_: Any) -> None:
        mode.__exit__(None, None, None)

    with ExitStack() as stack:
        for handle in (
            module.register_forward_pre_hook(begin),
            module.register_forward_hook(end, always_call=True),
        ):
            stack.callback(handle.remove)
        yield
