"""The reference code's other proxy losses have no gradient, or that of the cross-entropy in another length."""

from __future__ import annotations

import torch
from torch.nn import functional

TEMPERATURE = 0.7


def gradient(loss: str, logits: torch.Tensor) -> torch.Tensor:
    """Return the gradient of one of the losses with respect to the logits [R, V] of the probe rows."""
    logits = logits.clone().requires_grad_()
    hard = functional.cross_entropy(logits, logits.detach().argmax(-1))
    scaled = functional.log_softmax(logits / TEMPERATURE, -1)
    soft = TEMPERATURE**2 * functional.kl_div(scaled, scaled.detach().exp(), reduction="batchmean")
    {"multi_pos": hard, "soft_kd": soft, "hybrid": 0.5 * hard + 0.5 * soft}[loss].backward()
    assert logits.grad is not None
    return logits.grad


def test_a_model_that_teaches_itself_has_no_gradient_and_the_mixture_has_half() -> None:
    logits = 3 * torch.randn(4, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hard = gradient("multi_pos", logits)
    assert hard.abs().max() > 1e-3
    assert gradient("soft_kd", logits).abs().max() < 1e-12
    torch.testing.assert_close(gradient("hybrid", logits), 0.5 * hard)
