"""Inputs of linear layers and KV cache rows, collected while a model answers with token reduction.

After a stage most visual tokens are gone, as in the bundle; without reduction the statistics would be of other tokens. The
head's inputs are the rows whose logits are read. Inputs of probes are not collected.
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
from trio_edge.calibration.progress import SILENT
from trio_edge.export.graphs.state_layers import is_linear
from trio_edge.export.quantize.scales import CacheRange

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from trio_edge.calibration.model.torch_model import TorchModel
    from trio_edge.calibration.progress import StepProgress
    from trio_edge.calibration.quantize.sections import Section
    from trio_edge.calibration.questions import Sample
    from trio_edge.export.quantize.scales import Smoothing
    from trio_edge.runtime.bundle.schedule import Schedule


NUM_ROWS = 512
"""Rows to keep of every input, over all samples; rounding up per sample adds a few."""


@dataclass(slots=True)
class Inputs:
    """Inputs of one group of linear layers."""

    rows: list[Tensor] = field(default_factory=list)
    """[rows, I] each, some of each prompt and answer token, in the compute type."""
    largest_I: Tensor | None = None
    """float32, largest absolute value of each input over all rows, kept or not."""

    def add(self, values_SI: Tensor, *, num_rows: int, generator: torch.Generator) -> None:
        """Keep ``num_rows`` random rows, and the largest values of all."""
        largest_I = values_SI.abs().amax(0).to(torch.float32)
        self.largest_I = largest_I if self.largest_I is None else torch.maximum(self.largest_I, largest_I)
        drawn = torch.randperm(len(values_SI), generator=generator)[:num_rows]
        self.rows.append(values_SI[drawn.to(values_SI.device)].clone())

    def all_rows(self) -> Tensor:
        """Return the kept rows and, as the last row, the largest values of all, float32 [T, I]."""
        assert self.largest_I is not None, "every layer runs in every answer"
        return torch.cat([*(rows.to(torch.float32) for rows in self.rows), self.largest_I[None]])


def answer_samples(
    model: TorchModel,
    questions: Sequence[Sample],
    schedule: Schedule,
    *,
    num_tokens: int,
    progress: StepProgress = SILENT,
) -> None:
    """Answer ``questions``, for listeners: decoding has other inputs than the prefill."""
    for question in questions:
        with torch.inference_mode():
            prompt = make_prompt(model, question)
            greedy_answer(model, prompt, schedule, max_tokens=num_tokens)
        progress.sample()


@contextmanager
def listening_to_inputs(sections: Sequence[Section], *, num_samples: int) -> Iterator[list[list[Inputs]]]:
    """Collect the inputs of each group of ``sections`` while they run; each sample gives an equal share of the rows."""
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
    """Largest values of one layer's KV cache."""

    key_GE: Tensor | None = None
    """float32, largest absolute value of each element of the rotated keys over all rows."""
    value_GE: Tensor | None = None

    def add(self, key: Tensor, value: Tensor) -> None:
        """Add rows [1, G, S, E]."""
        self.key_GE, self.value_GE = _largest(self.key_GE, key), _largest(self.value_GE, value)

    def range_of(self, smoothing: Smoothing | None) -> CacheRange:
        """Return the layer's range, its values divided by the factors that ``smoothing`` moves into v_proj."""
        assert self.key_GE is not None and self.value_GE is not None, "every layer runs in every answer"
        value_GE = self.value_GE
        if smoothing is not None and smoothing.outputs is not None:
            value_GE = value_GE / smoothing.outputs.to(value_GE.device).reshape(value_GE.shape)
        return CacheRange(key=float(self.key_GE.max()), value=float(value_GE.max()))


def _largest(before_GE: Tensor | None, rows: Tensor) -> Tensor:
    largest_GE = rows[0].abs().amax(1).to(torch.float32)
    return largest_GE if before_GE is None else torch.maximum(before_GE, largest_GE)


@contextmanager
def listening_to_caches(layers: Sequence[nn.Module]) -> Iterator[list[CachedRows]]:
    """Collect the keys and values that decoder layers append to ``present`` while they run."""
    found = [CachedRows() for _ in layers]

    def listener(rows: CachedRows) -> Callable[..., None]:
        def listen(_module: nn.Module, _values: Any, named: dict[str, Any], _result: Any) -> None:
            rows.add(*named["present"][-2:])

        return listen

    with ExitStack() as stack:
        for layer, rows in zip(layers, found):
            if not is_linear(layer):
                handle = layer.register_forward_hook(listener(rows), with_kwargs=True)
                stack.callback(handle.remove)
        yield found


class _Products(TorchFunctionMode):
    """Replaces the input x of each product with a weight by ``inputs[weight](x)``.

    Forward hooks would miss products that are no calls of a layer, and would see probes, which call layers of a module that
    does not run.
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
    """Let products x Wᵀ compute with ``inputs[W](x)`` whenever ``module`` runs."""
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
