"""Chooses the next token from logits: greedy, or by temperature, top-k and top-p, in Hugging Face's order.

The device returns the most likely tokens, which suffice for greedy decoding and for a small top-k.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, final

import msgspec
import numpy as np

from trio_edge.runtime.bundle.errors import BackendError, PromptTooLongError, ShapeError
from trio_edge.runtime.bundle.generation import LIMIT_SETTINGS, SAMPLING_SETTINGS
from trio_edge.runtime.bundle.limits import is_number, is_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from trio_edge.runtime.bundle.generation import GenerationSettings


class TopTokens(NamedTuple):
    """The most likely tokens, descending; equal logits come in any order."""

    ids: NDArray[np.int32]
    """[T]."""
    logits: NDArray[np.float32]
    """[T]."""


@final
class Sampler:
    """Chooses a token id from logits."""

    def __init__(
        self, temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0, seed: int | None = None
    ) -> None:
        """Check the arguments.

        Args:
            temperature: Divides the logits; 0 always takes the most likely token, and the lowest id of equal ones.
            top_p: Sample from the smallest set of most likely tokens whose probabilities sum to this, in (0, 1].
            top_k: Sample from the k most likely tokens and those equal to the last one; 0 means all.
            seed: Makes the choices repeatable; None takes a seed from the operating system.

        Raises:
            ShapeError: If an argument is out of range.
        """
        if not is_number(temperature) or not 0.0 <= temperature <= sys.float_info.max:
            raise ShapeError(
                f"temperature: expected a number >= 0, got {temperature!r:.80}; use 0 for greedy decoding"
            )
        if not is_number(top_p) or not 0.0 < top_p <= 1.0:
            raise ShapeError(f"top_p: expected 0 < top_p <= 1, got {top_p!r}; use 1 to switch it off")
        if not is_whole(top_k) or top_k < 0:
            raise ShapeError(f"top_k: expected a whole number >= 0, got {top_k!r}; use 0 to switch it off")
        if seed is not None and (not is_whole(seed) or seed < 0):
            raise ShapeError(f"seed: expected a whole number >= 0 or None, got {seed!r}; choose one")
        self._temperature, self._top_p, self._top_k = temperature, top_p, top_k
        # Greedy decoding draws nothing, and numpy imports its generators at first use, which takes 10 ms.
        self._generator = None if temperature == 0.0 else np.random.default_rng(seed)

    def __call__(self, logits_V: NDArray[np.float32]) -> int:
        """Return the next token, from the logits of all tokens.

        Raises:
            BackendError: If the logits are NaN, +inf or all -inf, because the graph overflowed.
        """
        logits_V = checked_logits(logits_V)
        return int(np.argmax(logits_V)) if self._temperature == 0.0 else self._draw(logits_V)

    def from_top(self, top: TopTokens, *, floor: float | None = None) -> int | None:
        """Return the token that all logits would give, or None if ``top``, the most likely tokens, does not decide it.

        No other token has a logit above ``floor``, by default the smallest logit of ``top``.

        Raises:
            BackendError: If the logits are NaN, +inf or all -inf.
        """
        logits_T = checked_logits(top.logits)
        needed = 1 if self._temperature == 0.0 else self._top_k
        above = int((logits_T > (logits_T.min() if floor is None else floor)).sum())
        if not 1 <= needed <= above:
            return None  # tokens with the same logit as the last one needed may be missing
        # Ordered by id, so that ties and the generator's draw have the same result as with all logits.
        order = np.argsort(top.ids)
        ids, logits_T = top.ids[order], logits_T[order]
        chosen = int(np.argmax(logits_T)) if self._temperature == 0.0 else self._draw(logits_T)
        return int(ids[chosen])

    def _draw(self, logits: NDArray[np.float32]) -> int:
        assert self._generator is not None  # the temperature is not 0
        # float64: the generator refuses probabilities whose float32 sum is not 1.
        scores = logits.astype(np.float64)
        with np.errstate(over="ignore"):  # at a tiny temperature all scores but the largest become -inf
            scores = (scores - scores.max()) / self._temperature
        if 0 < self._top_k < len(scores):
            least = np.partition(scores, -self._top_k)[-self._top_k]
            scores = np.where(scores >= least, scores, -np.inf)
        weights = np.exp(scores)  # the largest score is 0
        probabilities = _nucleus(weights / weights.sum(), self._top_p)
        return int(self._generator.choice(len(probabilities), p=probabilities))


class TokenConstraint(Protocol):
    """The tokens that an answer may have, for instance by a grammar."""

    def allowed(self) -> NDArray[np.bool_]:
        """Return [V], whether each token may come next; stop tokens may when the answer is complete.

        Raises:
            ShapeError: If the constraint cannot be followed any longer.
        """

    def add(self, token: int) -> None:
        """Append a token to the answer."""


class TokenLogprobs(NamedTuple):
    """Natural logarithms of probabilities, before settings and constraints change the logits."""

    chosen: float
    top_ids: list[int]
    """The most likely tokens, descending; of equal ones the lower id first."""
    top: list[float]


@final
class TokenBias:
    """A number for each token that is added to its logit: OpenAI's ``logit_bias``, less its penalties.

    A token that came ``c`` times in the answer loses ``c * frequency_penalty``, and ``presence_penalty`` if ``c > 0``.
    """

    def __init__(
        self,
        num_tokens: int,
        *,
        logit_bias: Mapping[int, float] | None,
        presence_penalty: float | None,
        frequency_penalty: float | None,
    ) -> None:
        """Check the settings, for a vocabulary of ``num_tokens``; None means no effect.

        Raises:
            ShapeError: If a setting is out of range.
        """
        given = {"presence_penalty": presence_penalty or 0.0, "frequency_penalty": frequency_penalty or 0.0}
        for name, value in given.items():
            if not is_number(value) or not -2.0 <= value <= 2.0:
                raise ShapeError(f"{name}: expected a number in [-2, 2], got {value!r}; 0 switches it off")
        bias = logit_bias or {}
        if not isinstance(bias, Mapping):
            raise ShapeError(
                f"logit_bias: expected numbers by token id, got {type(bias).__name__}; give a dict"
            )
        for token, value in bias.items():
            if not (is_whole(token) and 0 <= token < num_tokens and is_number(value) and abs(value) <= 100):
                raise ShapeError(
                    f"logit_bias: expected token ids in 0..{num_tokens - 1} and numbers in [-100, 100], got"
                    f" {token!r}: {value!r}; correct it"
                )
        self.values_V = np.zeros(num_tokens, np.float32)
        self.values_V[list(bias)] = list(bias.values())
        self.may_raise = min(*given.values(), -max(bias.values(), default=0.0)) < 0
        """Whether a logit may become larger."""
        self._presence, self._frequency = given.values()
        self._seen: set[int] = set()

    def add(self, token: int) -> None:
        """Count a token of the answer."""
        self.values_V[token] -= self._frequency + (0.0 if token in self._seen else self._presence)
        self._seen.add(token)


@final
class AnswerRules:
    """Applies ``GenerationSettings`` to the logits of one answer, in the order of Hugging Face's ``_get_logits_processor``."""

    def __init__(
        self,
        settings: GenerationSettings,
        *,
        prompt_ids: Sequence[int],
        stop_ids: Sequence[int],
        limit: int,
        constraint: TokenConstraint | None = None,
        bias: TokenBias | None = None,
    ) -> None:
        """Start an answer of at most ``limit`` tokens; ``prompt_ids`` have a token for each visual token."""
        self._settings, self._stop_ids, self._limit = settings, list(stop_ids), limit
        self._constraint, self._bias = constraint, bias
        self._ids, self._num_prompt = list(prompt_ids), len(prompt_ids)
        self._seen = set(self._ids)

    def add(self, token: int) -> None:
        """Append a token to the answer."""
        self._ids.append(token)
        self._seen.add(token)
        for follower in (self._constraint, self._bias):
            if follower is not None:
                follower.add(token)

    def apply(self, logits_V: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the changed logits of all tokens.

        Raises:
            ShapeError: If no token is allowed.
        """
        changed_V = self._changed(logits_V, np.arange(len(logits_V)))
        if np.isneginf(changed_V.max()) and np.isfinite(logits_V.max()):
            raise ShapeError(
                "generation settings: expected at least one token that may come next, got none; override one of them, as"
                " no_repeat_ngram_size=0"
            )
        return changed_V

    def only_one(self) -> int | None:
        """Return the next token if the constraint allows one only, and no other rule forbids it."""
        if self._constraint is None:
            return None
        ids = np.flatnonzero(self._constraint.allowed())
        is_one = len(ids) == 1 and np.isfinite(self._changed(np.zeros(1, np.float32), ids)[0])
        return int(ids[0]) if is_one else None

    def choose_from_top(self, top: TopTokens, sample: Sampler) -> int | None:
        """Return the next token, or None if all logits are needed, because others may exceed the lowered ones of ``top``."""
        may_raise = self._settings.repetition_penalty < 1.0 or (
            self._bias is not None and self._bias.may_raise
        )
        if may_raise or self._is_last:
            return None
        changed = self._changed(top.logits, top.ids)
        if not np.isfinite(changed.max()):
            return None
        return sample.from_top(top._replace(logits=changed), floor=float(top.logits.min()))

    @property
    def _num_new(self) -> int:
        return len(self._ids) - self._num_prompt

    @property
    def _is_last(self) -> bool:
        return bool(self._settings.forced_eos_token_id) and self._num_new == self._limit - 1

    def _changed(self, logits_T: NDArray[np.float32], ids_T: NDArray[Any]) -> NDArray[np.float32]:
        settings, changed_T = self._settings, logits_T.copy()
        if settings.repetition_penalty != 1.0:
            penalty = np.float32(settings.repetition_penalty)
            seen_T = np.isin(ids_T, list(self._seen))
            scaled_T = np.where(changed_T < 0, changed_T * penalty, changed_T / penalty)
            changed_T = np.where(seen_T, scaled_T, changed_T)
        if self._bias is not None:
            changed_T += self._bias.values_V[ids_T]
        forbidden = self._after_same_words()
        least = settings.min_new_tokens or settings.min_length - self._num_prompt
        if self._num_new < least:
            forbidden |= set(self._stop_ids)
        changed_T[np.isin(ids_T, list(forbidden))] = -np.inf
        if self._is_last:
            changed_T[:] = np.where(np.isin(ids_T, settings.forced_eos_token_id), np.float32(0), -np.inf)
        never = {*settings.suppress_tokens, *(settings.begin_suppress_tokens if self._num_new == 0 else ())}
        changed_T[np.isin(ids_T, list(never))] = -np.inf
        if self._constraint is not None:
            changed_T[~self._constraint.allowed()[ids_T]] = -np.inf
        return changed_T

    def _after_same_words(self) -> set[int]:
        """Return the tokens that would complete a sequence that has occurred before."""
        size, ids = self._settings.no_repeat_ngram_size, self._ids
        if size == 0 or len(ids) + 1 < size:
            return set()
        last = ids[len(ids) - size + 1 :]
        return {ids[at + size - 1] for at in range(len(ids) - size + 1) if ids[at : at + size - 1] == last}


@final
class TokenChooser:
    """Chooses the tokens of one answer."""

    def __init__(
        self, sampler: Sampler, rules: AnswerRules | None = None, *, num_logprobs: int | None = None
    ) -> None:
        if num_logprobs is not None and (not is_whole(num_logprobs) or num_logprobs < 0):
            raise ShapeError(f"num_logprobs: expected a whole number >= 0, got {num_logprobs!r}; choose one")
        self._sampler, self._rules, self._num_logprobs = sampler, rules, num_logprobs
        self.logprobs: list[TokenLogprobs] = []
        """Log probabilities of each chosen token and of the ``num_logprobs`` most likely ones; empty if that number is None."""

    def choose(self, top: TopTokens, all_logits: Callable[[], NDArray[np.float32]]) -> int:
        """Return the next token from the most likely ones or, if these do not decide it, from ``all_logits`` [V].

        Raises:
            BackendError: If logits are NaN or infinite.
            ShapeError: If the answer's rules allow no token.
        """
        token = self._choose(top, all_logits)
        if self._num_logprobs is not None:
            self.logprobs.append(_logprobs(all_logits(), token, self._num_logprobs))
        return token

    def certain(self) -> int | None:
        """Return the next token if only one may come, which needs no logits; None if it does, also for log probabilities."""
        token = None if self._rules is None or self._num_logprobs is not None else self._rules.only_one()
        if token is not None and self._rules is not None:
            self._rules.add(token)
        return token

    def _choose(self, top: TopTokens, all_logits: Callable[[], NDArray[np.float32]]) -> int:
        sampler, rules = self._sampler, self._rules
        if rules is None:
            token = sampler.from_top(top)
            return sampler(all_logits()) if token is None else token
        token = rules.choose_from_top(top, sampler)
        if token is None:
            token = sampler(rules.apply(all_logits()))
        rules.add(token)
        return token


def log_softmax(logits_V: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the natural logarithms of all tokens' probabilities [V], from finite logits [V]."""
    shifted_V = logits_V.astype(np.float64) - float(logits_V.max())
    log_probs_V: NDArray[np.float64] = shifted_V - np.log(np.exp(shifted_V).sum())
    return log_probs_V


def _logprobs(logits_V: NDArray[np.float32], token: int, count: int) -> TokenLogprobs:
    scores_V = log_softmax(logits_V)
    ids = np.argsort(-scores_V, kind="stable")[:count]
    return TokenLogprobs(float(scores_V[token]), ids.tolist(), scores_V[ids].tolist())


def has_rules(settings: GenerationSettings) -> bool:
    """Return whether any setting changes logits before a token is chosen."""
    neutral = type(settings)()
    rules = set(settings.__struct_fields__) - {"do_sample", *SAMPLING_SETTINGS, *LIMIT_SETTINGS}
    return any(getattr(settings, name) != getattr(neutral, name) for name in rules)


def answer_limit(settings: GenerationSettings, *, room: int, num_prompt: int) -> int:
    """Return the most tokens of an answer for which the user sets no limit; ``room`` is the bundle's.

    Raises:
        PromptTooLongError: If a prompt of ``num_prompt`` tokens leaves nothing of the checkpoint's ``max_length``.
    """
    if settings.max_new_tokens is not None:
        return min(settings.max_new_tokens, room)
    if settings.max_length is None:
        return room
    if num_prompt >= settings.max_length:
        raise PromptTooLongError(
            f"prompt: expected fewer than {settings.max_length} tokens (max_length in the checkpoint's generation_config.json),"
            f" got {num_prompt} with visual tokens; shorten it, or give max_new_tokens"
        )
    return min(settings.max_length - num_prompt, room)


def sampler_of(settings: GenerationSettings, **given: Any) -> Sampler:
    """Return a sampler of the checkpoint's ``settings``; arguments of ``Sampler`` that are not None replace them."""
    own = {name: getattr(settings, name) for name in SAMPLING_SETTINGS} if settings.do_sample else {}
    return Sampler(**own | {name: value for name, value in given.items() if value is not None})


def with_overrides(settings: GenerationSettings, overrides: Mapping[str, object]) -> GenerationSettings:
    """Return ``settings`` with the values of ``overrides`` that are not None.

    Raises:
        ShapeError: If one is out of range.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    for name, value in given.items():
        try:
            msgspec.convert({name: value}, type(settings))
        except (msgspec.ValidationError, UnicodeError) as error:  # the second for lone surrogates
            raise ShapeError(f"{name}: expected a setting in range, got {value!r} ({error})") from None
    return msgspec.structs.replace(settings, **given)


def checked_logits(logits_V: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return logits [V].

    Raises:
        BackendError: If they are NaN, +inf or all -inf, because a graph overflowed.
    """
    if logits_V.ndim != 1 or logits_V.size == 0:
        raise ShapeError(f"logits: expected [V], got {list(logits_V.shape)}")
    largest = logits_V.max()  # NaN if any is
    if not np.isfinite(largest):
        raise BackendError(
            f"logits: expected finite numbers, got a maximum of {largest}; export with another --dtype"
        )
    return logits_V


def _nucleus(probabilities_V: NDArray[np.float64], top_p: float) -> NDArray[np.float64]:
    """Return the probabilities without the tail beyond ``top_p``; of equal tokens the lower id stays."""
    if top_p == 1.0:
        return probabilities_V
    order_V = np.argsort(-probabilities_V, kind="stable")
    num_kept = int(np.searchsorted(np.cumsum(probabilities_V[order_V]), top_p)) + 1
    kept_V = np.zeros_like(probabilities_V)
    kept_V[order_V[:num_kept]] = probabilities_V[order_V[:num_kept]]
    normalized_V: NDArray[np.float64] = kept_V / kept_V.sum()
    return normalized_V
