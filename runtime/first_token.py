"""How far a bundle's first token is from keep-all's: a KL divergence from a summary that fits into a line of text.

The summary holds keep-all's likeliest tokens with their log-probabilities. The divergence treats all other tokens as one:

    KL = Σ_{i in kept} p_i ln(p_i / q_i) + r_p ln(r_p / r_q),    r = 1 - Σ kept

Joining events can only lower a KL divergence, so this is a lower bound of the full one; with 256 tokens and a vocabulary
of no more than that they are equal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

NUM_TOKENS = 256
_SMALLEST = 1e-30  # below it a share of the rest is rounding


class FirstToken(msgspec.Struct, frozen=True, kw_only=True):
    """Keep-all's likeliest first tokens."""

    ids: bytes
    """int32, little-endian, ascending ids."""
    log_probs: bytes
    """float32, little-endian, natural logarithms."""


def summary_of(logits: NDArray[np.float32]) -> FirstToken:
    """Return the ``NUM_TOKENS`` likeliest tokens of ``logits`` [V]."""
    kept = np.sort(np.argsort(-logits, kind="stable")[:NUM_TOKENS])
    return FirstToken(
        ids=kept.astype("<i4").tobytes(),
        log_probs=_log_probs(logits)[kept].astype("<f4").tobytes(),
    )


def first_token_kl(reference: FirstToken, logits: NDArray[np.float32]) -> float:
    """Return the divergence, in nats, of ``logits`` [V] from keep-all's distribution; at least 0."""
    ids = np.frombuffer(reference.ids, "<i4")
    log_p = np.frombuffer(reference.log_probs, "<f4").astype(np.float64)
    log_q = _log_probs(logits)[ids]
    divergence = float((np.exp(log_p) * (log_p - log_q)).sum())
    rest_p, rest_q = 1.0 - float(np.exp(log_p).sum()), 1.0 - float(np.exp(log_q).sum())
    if len(ids) < len(logits) and rest_p > _SMALLEST:
        divergence += rest_p * float(np.log(rest_p / max(rest_q, _SMALLEST)))
    return max(divergence, 0.0)


def _log_probs(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - float(logits.max())
    log_probs: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return log_probs
