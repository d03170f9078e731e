"""The largest values inside a model on samples, to see whether they fit float16 before a bundle is built for a board."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trio_edge.calibration.model.torch_model import TorchModel

LARGEST_FLOAT16 = 65504.0


@contextmanager
def listening_to_ranges(model: TorchModel) -> Iterator[dict[str, float]]:
    """Collect by module the largest absolute value that goes in or out of it while ``model`` runs.

    A layer itself has the residual stream. What norms and softmax compute inside is left out: a bundle has it in float32.
    """
    tops = {"vision": model.parts.vision.module, "head": model.head}
    tops |= {f"layers.{index}": layer for index, layer in enumerate(model.parts.layers)}
    found: dict[str, float] = {}

    def listen(name: str, values: Any) -> None:
        for tensor in values if isinstance(values, tuple) else (values,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.numel():
                largest = float(tensor.abs().max().nan_to_num(nan=torch.inf))
                found[name] = max(found.get(name, 0.0), largest)

    with ExitStack() as stack:
        for top, module in tops.items():
            for inner, part in module.named_modules(prefix=top):

                def hook(_module: Any, inputs: Any, output: Any, name: str = inner) -> None:
                    listen(name, inputs)
                    listen(name, output)

                stack.callback(part.register_forward_hook(hook).remove)
        yield found


def float16_warning(largest: dict[str, float]) -> str | None:
    """Return the warning about modules with values that float16 cannot hold; None if there are none."""
    above = {name: value for name, value in largest.items() if value > LARGEST_FLOAT16}
    if not above:
        return None
    name = max(above, key=lambda one: above[one])
    others = f", {len(above) - 1} more" if len(above) > 1 else ""
    return (
        f"{name}: expected values up to {LARGEST_FLOAT16:.0f}, the largest of float16, got {above[name]:.4g} on the samples"
        f" ({', '.join(sorted(above)[:3])}{others}); use --dtype float32"
    )
