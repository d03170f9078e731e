"""Factors for the inputs of a linear layer, found by NVIDIA's Model Optimizer: AWQ for INT4 weights, SmoothQuant for INT8.

The library gets a group of linear layers as one layer with the outputs of all, so that its search ends with factors that the
group can share, and rows that were collected before, so that one decoder layer at a time is in memory.
"""

from __future__ import annotations

import io
import warnings
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trio_edge.runtime.bundle.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

AWQ_STEP = 0.1
"""Distance of the exponents that AWQ tries, from 0 to 1."""
_OFF = {"quantizer_name": "*", "enable": False}


def check_modelopt() -> None:
    """Raise CheckpointError unless Model Optimizer is installed."""
    _modelopt()


def awq_factors(weight_OI: Tensor, rows_TI: Tensor, *, block: int) -> Tensor:
    """Return what to multiply the columns of a weight by before it is rounded to INT4, float32 [I].

    Args:
        weight_OI: float32.
        rows_TI: Inputs that it sees, float32.
        block: Inputs that share a scale.

    Raises:
        CheckpointError: If Model Optimizer is not installed.
    """
    weights = {
        "quantizer_name": "*weight_quantizer",
        "cfg": {"num_bits": 4, "block_sizes": {-1: block, "type": "static"}},
    }
    return _factors(
        weight_OI,
        rows_TI,
        {"quant_cfg": [_OFF, weights], "algorithm": {"method": "awq_lite", "alpha_step": AWQ_STEP}},
    )


def smoothquant_factors(weight_OI: Tensor, rows_TI: Tensor, *, alpha: float) -> Tensor:
    """Return what to multiply the columns of a weight by, and divide its inputs by, before both are rounded to INT8.

    Args:
        weight_OI: float32.
        rows_TI: Inputs that it sees, with the largest of each among them, float32.
        alpha: How much of the inputs' spread goes into the weight, 0 to 1.

    Raises:
        CheckpointError: If Model Optimizer is not installed.
    """
    quantizers = [
        {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}},
        {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": 8, "axis": None}},
    ]
    return _factors(
        weight_OI,
        rows_TI,
        {"quant_cfg": [_OFF, *quantizers], "algorithm": {"method": "smoothquant", "alpha": alpha}},
    )


def _factors(weight_OI: Tensor, rows_TI: Tensor, config: dict[str, Any]) -> Tensor:
    mtq = _modelopt()
    linear = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight_OI.clone(), requires_grad=False)  # it is changed in place
    module = nn.Sequential(linear)
    with torch.no_grad(), redirect_stdout(io.StringIO()):
        mtq.quantize(module, config, forward_loop=lambda layer: layer(rows_TI))
    scale: Tensor = module[0].input_quantizer.pre_quant_scale  # type: ignore[union-attr, assignment]
    return 1.0 / scale.detach().to(torch.float32).flatten()


def _modelopt() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # of releases of transformers that it was not tried with; none is used here
        try:
            import modelopt.torch.quantization as mtq
        except ModuleNotFoundError as error:
            raise CheckpointError(
                f"--quantize: expected nvidia-modelopt to be installed, got no {error.name};"
                " pip install 'trio-edge[quantize]'"
            ) from None
    return mtq
