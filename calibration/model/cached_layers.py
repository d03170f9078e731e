"""Decoder layers of the torch model whose answer rows read keys and values as an INT8 KV cache has them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from trio_edge.calibration.model.sequence import advanced, no_past, run_layers
from trio_edge.export.quantize.numerics import rounded_activations

if TYPE_CHECKING:
    from torch import Tensor

    from trio_edge.calibration.model.sequence import Sequence
    from trio_edge.calibration.model.torch_model import TorchModel
    from trio_edge.export.quantize.scales import CacheRange


def advanced_with_cache(
    model: TorchModel, sequence: Sequence, layers: range, caches: tuple[CacheRange, ...]
) -> Sequence:
    """Return the sequence after ``layers``.

    Args:
        model: The model.
        sequence: A prompt and rows of its answer.
        layers: Which ones.
        caches: Largest values of each layer's INT8 KV cache, which answer rows read the rows before them from; none for one
            in floating point.
    """
    if not caches:
        return advanced(model, sequence, layers)
    for layer in layers:
        sequence = sequence.with_hidden(_with_cache(model, sequence, layer, caches[layer]))
    return sequence


def _with_cache(model: TorchModel, sequence: Sequence, layer: int, largest: CacheRange) -> Tensor:
    """Return the hidden states after one layer: of the prompt at once, then of one answer row after the other."""
    num_rows, past, hidden = len(sequence.hidden_SD), no_past(model, sequence.hidden_SD), []
    starts = [0, *range(sequence.prompt_length, num_rows)]
    for start, stop in zip(starts, [*starts[1:], num_rows]):
        present: list[Tensor] = []
        hidden.append(
            run_layers(
                model,
                sequence.hidden_SD[start:stop],
                sequence.positions_AS[:, start:stop],
                range(layer, layer + 1),
                past=[past],
                present=present,
            )
        )
        key = rounded_activations(present[0], largest=largest.key)
        value = rounded_activations(present[1], largest=largest.value)
        past = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
    return torch.cat(hidden)
