"""Distributions of first tokens, by which bundles are compared: the KL divergence of one from another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np

from trio_edge.runtime.model.answers.sampling import log_softmax

if TYPE_CHECKING:
    from numpy.typing import NDArray

NUM_SUMMED_UP = 256
"""Tokens of a ``FirstToken``."""
_SMALLEST = 1e-30  # smaller probabilities of all other tokens are rounding errors


class FirstToken(msgspec.Struct, frozen=True, kw_only=True):
    """The most likely first tokens of an answer, in a form that fits into a line of text."""

    ids: bytes
    """int32, little-endian, ascending ids."""
    log_probs: bytes
    """float32, little-endian, natural logarithms."""


def summary_of(logits: NDArray[np.float32], *, num_tokens: int = NUM_SUMMED_UP) -> FirstToken:
    """Return the ``num_tokens`` most likely tokens of ``logits`` [V]; V of them give the exact divergence."""
    kept = np.sort(np.argsort(-logits, kind="stable")[:num_tokens])
    return FirstToken(
        ids=kept.astype("<i4").tobytes(),
        log_probs=log_softmax(logits)[kept].astype("<f4").tobytes(),
    )


def first_token_kl(reference: FirstToken, logits: NDArray[np.float32]) -> float:
    """Return the KL divergence of ``logits`` [V] from the reference's distribution, in nats; at least 0.

    All tokens that the summary lacks count as one. Joining events can only lower a KL divergence, so this is a lower bound:

        KL = Σ_{i in summary} p_i ln(p_i / q_i) + r_p ln(r_p / r_q),    r = 1 - Σ in summary
    """
    ids = np.frombuffer(reference.ids, "<i4")
    log_p = np.frombuffer(reference.log_probs, "<f4").astype(np.float64)
    log_q = log_softmax(logits)[ids]
    divergence = float((np.exp(log_p) * (log_p - log_q)).sum())
    rest_p, rest_q = 1.0 - float(np.exp(log_p).sum()), 1.0 - float(np.exp(log_q).sum())
    if len(ids) < len(logits) and rest_p > _SMALLEST:
        divergence += rest_p * float(np.log(rest_p / max(rest_q, _SMALLEST)))
    return max(divergence, 0.0)
