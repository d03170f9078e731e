"""One group of linear layers: smoothing factors to try, and the error of rounding on collected inputs.

Weights are rounded as in the export (``export/quantize/numerics``).
"""

from __future__ import annotations

import io
import warnings
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trio_edge.calibration.quantize.sections import block_of
from trio_edge.export.quantize.numerics import outlier_columns, quantize_weight, rounded_activations
from trio_edge.runtime.bundle.errors import CheckpointError, install_command

if TYPE_CHECKING:
    from torch import Tensor

    from trio_edge.export.graphs.linear_groups import LinearGroup
    from trio_edge.export.quantize.plan import Format
    from trio_edge.runtime.bundle.manifest import FloatType


ALPHAS = (0.25, 0.5, 0.75)
"""SmoothQuant's exponents; each group takes the best one."""
LARGEST_FACTOR = 1024.0
"""Limit of a factor and of its inverse; larger ones cost a float16 norm too many bits, or overflow."""
_NEGLIGIBLE = 1e-6
"""Values below this share of the largest one do not matter."""
MAX_OUTPUTS = 24_576
"""Most outputs of a group to look at, evenly spread: all of a 7B Llama layer (3 GB in a search), a part of a head."""


@dataclass(frozen=True, kw_only=True)
class GroupRounding:
    """A group as one linear layer with all outputs, its inputs, and its format."""

    weight_OI: Tensor
    rows_TI: Tensor
    """The last row has the largest absolute value of each input over all collected rows."""
    kind: Format
    dtype: FloatType
    block: int | None
    columns_K: Tensor | None = None
    """Inputs that stay in floating point."""

    @staticmethod
    def of(
        group: LinearGroup, rows_TI: Tensor, *, kind: Format, dtype: FloatType, outliers: float = 0.0
    ) -> GroupRounding:
        """Return the rounding of ``group`` to ``kind`` on ``rows_TI``, with scales in ``dtype``."""
        weights = [linear.get_parameter("weight").detach() for linear in group.linears]
        step = -(-sum(len(weight) for weight in weights) // MAX_OUTPUTS)
        weight_OI = torch.cat([weight[::step].to("cpu", torch.float32) for weight in weights])
        rows_TI, has_outliers = rows_TI.to("cpu"), kind == "int4" and outliers > 0
        return GroupRounding(
            weight_OI=weight_OI,
            rows_TI=rows_TI,
            kind=kind,
            dtype=dtype,
            block=block_of(group) if kind == "int4" else None,
            columns_K=outlier_columns(rows_TI[:-1], weight_OI, share=outliers) if has_outliers else None,
        )

    def candidates(self) -> list[Tensor]:
        """Return factors to try, with a geometric mean of 1: only their ratios matter to the rounding.

        FP8 has none: it is as exact for values that are 28000 times smaller, so large inputs cost the others nothing. Inputs that
        are almost 0, or that no output reads, have the factor 1.
        """
        alive_I = _matters(self.rows_TI[-1]) & _matters(self.weight_OI.abs().amax(0))
        if self.columns_K is not None:
            alive_I[self.columns_K] = False
        if self.kind == "fp8" or alive_I.sum() < 2:
            return []
        if self.block is not None:
            found = [awq_factors(self.weight_OI, self.rows_TI[:-1], block=self.block)[alive_I]]
        else:
            weight, rows = self.weight_OI[:, alive_I], self.rows_TI[:, alive_I]
            found = [smoothquant_factors(weight, rows, alpha=alpha) for alpha in ALPHAS]
        return [torch.ones(len(alive_I)).masked_scatter(alive_I, _around_one(factors)) for factors in found]

    def best(self, candidates: list[Tensor]) -> tuple[Tensor | None, float]:
        """Return the factors with the least error (None: no factors) and that error."""
        tried = [(factors, self.error(factors, with_activations=True)) for factors in (None, *candidates)]
        # of equal errors the first one: no factors, which cost nothing
        return min(tried, key=lambda one: one[1])

    def error(self, factors_I: Tensor | None, *, with_activations: bool) -> float:
        """Return the sum of squared errors of the outputs over their sum of squares."""
        inputs_TI = self.rows_TI[:-1]
        exact_TO = inputs_TI @ self.weight_OI.T
        weight_OI = self.weight_OI
        if factors_I is not None:
            inputs_TI, weight_OI = inputs_TI / factors_I, weight_OI * factors_I
        if with_activations and self.kind != "int4":
            largest = self.activation_max(factors_I)
            inputs_TI = rounded_activations(inputs_TI, largest=largest, kind=self.kind)
        rounded = quantize_weight(
            weight_OI, kind=self.kind, dtype=self.dtype, block=self.block, columns_K=self.columns_K
        )
        wrong_TO = inputs_TI @ rounded.dequantized().to(torch.float32).T - exact_TO
        return float(wrong_TO.square().sum() / exact_TO.square().sum().clamp(min=1e-30))

    def activation_max(self, factors_I: Tensor | None) -> float:
        """Return the largest absolute input after the factors."""
        largest_I = self.rows_TI[-1] if factors_I is None else self.rows_TI[-1] / factors_I
        return float(largest_I.max())


def _matters(largest_I: Tensor) -> Tensor:
    return largest_I > _NEGLIGIBLE * largest_I.max()


def _around_one(factors: Tensor) -> Tensor:
    """Return ``factors`` over their geometric mean, within ``LARGEST_FACTOR``."""
    ratios = factors / factors.log().mean().exp()
    return ratios.clamp(1 / LARGEST_FACTOR, LARGEST_FACTOR)


AWQ_STEP = 0.1
_OFF = {"quantizer_name": "*", "enable": False}


def awq_factors(weight_OI: Tensor, rows_TI: Tensor, *, block: int) -> Tensor:
    """Return the factors of a float32 weight's columns before rounding to INT4 in blocks of ``block``, float32 [I]."""
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
    """Return the factors of a weight's columns, by which its inputs are divided, before both are rounded to INT8.

    ``rows_TI`` has the largest of each input among them; the share ``alpha`` of the inputs' spread, 0 to 1, goes into the weight.
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
    """Return the factors of NVIDIA's Model Optimizer for a group of linear layers, given as one layer with all outputs.

    As one layer they get shared factors. The rows were collected before, so only one decoder layer is in memory.
    """
    mtq = modelopt()
    linear = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight_OI.clone(), requires_grad=False)  # modelopt changes it in place
    module = nn.Sequential(linear)
    with torch.no_grad(), redirect_stdout(io.StringIO()):
        mtq.quantize(module, config, forward_loop=lambda layer: layer(rows_TI))
    scale: Tensor = module[0].input_quantizer.pre_quant_scale  # type: ignore[union-attr, assignment]
    return 1.0 / scale.detach().to(torch.float32).flatten()


def modelopt() -> Any:
    """Return Model Optimizer's module for quantization; raise CheckpointError if it is not installed."""
    with warnings.catch_warnings():
        # it warns of untested releases of transformers, which is not used here
        warnings.simplefilter("ignore")
        try:
            import modelopt.torch.quantization as mtq
        except ModuleNotFoundError as error:
            raise CheckpointError(
                f"--quantize: expected nvidia-modelopt to be installed, got no {error.name};"
                f" {install_command('quantize')}"
            ) from None
    return mtq
