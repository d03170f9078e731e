"""Inputs of the products with a module's weights while the module runs, to be seen or changed.

Forward hooks would miss products that are functions of a weight, not calls of a layer, and would hear probes, which call layers of
a module that does not run.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor


class _Products(TorchFunctionMode):
    """Calls ``inputs[weight]`` in place of what enters a product with a weight."""

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
