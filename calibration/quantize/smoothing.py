"""Factors that were found for the inputs of linear layers, as what happens to the checkpoint's tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from trio_edge.export.quantize.scales import Smoothing

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor, nn

    from trio_edge.export.graphs.linear_groups import LinearGroup


def moved(
    found: Iterable[tuple[LinearGroup, Tensor]], *, names: Mapping[nn.Parameter, str]
) -> dict[str, Smoothing]:
    """Return what happens to the tensors of the groups and of what is before them, by canonical name.

    Args:
        found: Groups that factors can move out of, and [I] what their weights' columns are multiplied by.
        names: Canonical name of every parameter.
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    for group, factors_I in found:
        assert group.before is not None, "factors can move"
        inputs |= {names[linear.get_parameter("weight")]: factors_I for linear in group.linears}
        # other layers that are fused in front stay as they are
        outputs_O = torch.cat([torch.ones(group.start), factors_I])
        outputs |= {names[parameter]: outputs_O for parameter in group.before.parameters()}
    return {
        name: Smoothing(inputs=inputs.get(name), outputs=outputs.get(name)) for name in (*inputs, *outputs)
    }
