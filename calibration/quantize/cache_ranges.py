"""The largest keys and values of every decoder layer: what the scales of an INT8 KV cache are made of."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from trio_edge.export.quantize.scales import CacheRange

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor, nn

    from trio_edge.export.quantize.scales import Smoothing


@dataclass(slots=True)
class CachedRows:
    """What one layer's KV cache has held."""

    key_GE: Tensor | None = None
    """float32, largest absolute value of each element of the rotated keys over all rows."""
    value_GE: Tensor | None = None
    """Likewise of the values."""

    def add(self, key: Tensor, value: Tensor) -> None:
        """Take the largest of rows [1, G, S, E]."""
        self.key_GE, self.value_GE = _largest(self.key_GE, key), _largest(self.value_GE, value)

    def range_of(self, moved: Smoothing | None) -> CacheRange:
        """Return the layer's range, whose values are divided by the factors that were ``moved`` into their weight."""
        assert self.key_GE is not None and self.value_GE is not None, (
            "every decoder layer runs in every answer"
        )
        value_GE = self.value_GE
        if moved is not None and moved.outputs is not None:
            value_GE = value_GE / moved.outputs.to(value_GE.device).reshape(value_GE.shape)
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
