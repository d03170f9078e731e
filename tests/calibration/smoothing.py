"""Puts factors that calibration would move into a torch model."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trio_edge.calibration.model.torch_model import TorchModel
    from trio_edge.export.quantize.scales import Smoothing


def apply_smoothing(model: TorchModel, changes: Mapping[str, Smoothing]) -> None:
    """Change the parameters of ``model`` as ``changes`` say, by canonical name."""
    for parameter, name in model.tensor_names().items():
        if name in changes:
            parameter.data = changes[name].apply(parameter.data)
