"""How far an answer is from keep-all's: divergence of its logits, and agreement of its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from trio_edge.calibration.model.greedy import greedy_answer
from trio_edge.runtime.bundle.schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor

    from trio_edge.calibration.model.sequence import Sequence
    from trio_edge.calibration.model.torch_model import TorchModel


@dataclass(frozen=True, kw_only=True)
class KeepAll:
    """One sample without reduction."""

    inputs: list[Sequence]
    """Rows before each layer, prompt and answer."""
    tokens: list[int]
    log_probs_TV: Tensor
    """float64, in nats."""

    @property
    def num_bytes(self) -> int:
        """Memory that it holds."""
        return sum(sequence.hidden_SD.nbytes for sequence in self.inputs) + self.log_probs_TV.nbytes


class MeasuredSchedule(NamedTuple):
    """One schedule on one sample."""

    kl: float
    agrees: bool
    rounds: int


def keep_all(model: TorchModel, prompt: Sequence, *, num_tokens: int) -> KeepAll:
    """Return keep-all's answer of at most ``num_tokens`` tokens, and the inputs of every layer."""
    answer = greedy_answer(model, prompt, Schedule(), max_tokens=num_tokens)
    return KeepAll(inputs=answer.inputs, tokens=answer.tokens, log_probs_TV=_log_probs(answer.logits_TV))


def divergence(log_p_TV: Tensor, tokens: list[int], logits_TV: Tensor, *, rounds: int) -> MeasuredSchedule:
    """Return the divergence of logits from keep-all's log probabilities ``log_p_TV``, and agreement with its ``tokens``."""
    log_q_TV = _log_probs(logits_TV)
    kl = float((log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1).mean())
    chosen_T = torch.tensor(tokens, device=log_q_TV.device)
    return MeasuredSchedule(max(kl, 0.0), bool((log_q_TV.argmax(-1) == chosen_T).all()), rounds)


def _log_probs(logits_TV: Tensor) -> Tensor:
    # in float32, rounding gives a KL of 1e-6
    return torch.log_softmax(logits_TV.to(torch.float64), dim=-1)
