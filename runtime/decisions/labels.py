"""Scores the labels of a question: their tokens at the answer's place, and the probability of each as a sequence.

A label may be written in several ways, and each way may have several tokens. The probability of an option is the sum over its
ways; that of a way is the product over its tokens, each after the ones before. If one way is the beginning of another option's,
all of them also count the end of the answer.
"""

from __future__ import annotations

from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np

from trio_edge.runtime.bundle.errors import ShapeError
from trio_edge.runtime.model.answers.sampling import checked_logits, log_softmax

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from numpy.typing import NDArray

Tokens = tuple[int, ...]


def label_tokens(
    labels: Sequence[str],
    *,
    encode: Callable[[Sequence[str]], Sequence[Sequence[int]]],
    decode: Callable[[Sequence[int]], str],
    most_tokens: int,
) -> list[set[Tokens]]:
    """Return the token sequences that count as each label: as it is or capitalized, with a blank before it or not.

    ``encode`` returns the ids of the rendered prompt with each of some texts after it, ``decode`` the text of ids. A spelling
    does not count if it changes the prompt's own tokens, or if the tokenizer does not know it. One that belongs to two labels
    counts for neither, unless it is the label itself.

    Raises:
        ShapeError: If a label has no sequence of at most ``most_tokens`` tokens.
    """
    spellings = [
        (index, blank + form)
        for index, label in enumerate(labels)
        for form in dict.fromkeys((label, label[:1].upper() + label[1:]))
        for blank in ("", " ")
    ]
    prompt, *encoded = map(tuple, encode(["", *(text for _, text in spellings)]))
    owners: dict[Tokens, dict[int, bool]] = {}
    for (index, text), ids in zip(spellings, encoded):
        rest = ids[len(prompt) :]
        is_known = ids[: len(prompt)] == prompt and _same(decode(rest), text)
        if is_known and 0 < len(rest) <= most_tokens:
            exact = owners.setdefault(rest, {})
            exact[index] = exact.get(index, False) or text.strip() == labels[index]
    found: list[set[Tokens]] = [set() for _ in labels]
    for tokens, by_label in owners.items():
        exact_labels = [index for index, is_exact in by_label.items() if is_exact]
        candidates = [*by_label] if len(by_label) == 1 else exact_labels
        if len(candidates) == 1:
            found[candidates[0]].add(tokens)
    for label, ways in zip(labels, found):
        if not ways:
            raise ShapeError(
                f"label {label!r:.80}: expected one that the model's tokenizer can write after this prompt in at most"
                f" {most_tokens} tokens and that differs from the others, got none; choose another word"
            )
    return found


def _same(decoded: str, text: str) -> bool:
    return decoded.strip().casefold() == text.strip().casefold()


def log_probabilities(
    options: Sequence[Collection[Tokens]],
    logits: NDArray[np.float32],
    *,
    stop_ids: Sequence[int],
    step: Callable[[Sequence[int]], Sequence[NDArray[np.float32]]],
    back: Callable[[], None],
    most_rows: int,
) -> NDArray[np.float64]:
    """Return the logarithm of each option's probability [len(options)].

    ``logits`` [V] are those of the answer's first token. ``step`` appends up to ``most_rows`` tokens and returns the logits
    after each, ``back`` takes those of the last step away again.

    Raises:
        BackendError: If a graph fails.
    """
    ways = {tokens: index for index, option in enumerate(options) for tokens in option}
    has_end = len(stop_ids) > 0 and any(
        tokens[:length] in ways and ways[tokens[:length]] != index
        for tokens, index in ways.items()
        for length in range(1, len(tokens))
    )
    scores: list[list[float]] = [[] for _ in options]

    def walk(rest: Sequence[tuple[Tokens, int]], rows: Sequence[NDArray[np.float32]], so_far: float) -> None:
        """Score ``rest`` from the logits of its first token, and of those after it that are the same in all of it."""
        logs = log_softmax(checked_logits(rows[0]))
        by_token: dict[int, list[tuple[Tokens, int]]] = {}
        for tokens, index in rest:
            if tokens:
                by_token.setdefault(tokens[0], []).append((tokens[1:], index))
            else:
                scores[index].append(so_far + float(np.logaddexp.reduce(logs[list(stop_ids)])))
        for token, below in by_token.items():
            score = so_far + float(logs[token])
            ended = [index for tokens, index in below if not tokens and not has_end]
            for index in ended:
                scores[index].append(score)
            deeper = [(tokens, index) for tokens, index in below if tokens or has_end]
            if deeper and len(rows) > 1:
                walk(deeper, rows[1:], score)
            elif deeper:
                # The last token of a way needs no row, unless the end is scored.
                needed = [tokens if has_end else tokens[:-1] for tokens, _ in deeper]
                same = takewhile(lambda column: len({*column}) == 1, zip(*needed))
                chain = [token, *(column[0] for column in same)][:most_rows]
                walk(deeper, step(chain), score)
                back()

    walk([*ways.items()], [logits], 0.0)
    return np.array([np.logaddexp.reduce(found) for found in scores])


def normalized(logs: NDArray[np.float64], *, temperature: float = 1.0) -> NDArray[np.float64]:
    """Return the probabilities of options whose logarithms are ``logs``, which sum to 1; a larger temperature evens them out."""
    weights = np.exp((logs - logs.max()) / temperature)
    shares: NDArray[np.float64] = weights / weights.sum()
    return shares
