"""Prompt lookup: drafts of an answer's next tokens are those that followed the same last tokens before.

A decode step runs a token and a draft of those after it. A draft's token is right if it is the one that is chosen at its place,
by the same rules and the same random numbers as without drafts, so the answer does not change.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Literal, TypeAlias, final

from trio_edge.runtime.bundle.errors import ShapeError
from trio_edge.runtime.bundle.graph_io import STEP_ROWS
from trio_edge.runtime.bundle.limits import is_whole

if TYPE_CHECKING:
    from collections.abc import Sequence

LookupTokens: TypeAlias = int | Literal["auto"]
"""Most tokens of a draft from the prompt or the answer; "auto" chooses by what drafts gain and cost."""
NGRAMS = (4, 3, 2)
"""Numbers of last tokens to look up, the longest first."""
_WEIGHT = 0.1
"""Share of the newest value in a running mean."""


@final
class Payoff:
    """Learns over all answers how often a draft's first token is right, and how long steps take."""

    def __init__(self, rows: Sequence[int]) -> None:
        """``rows`` are the possible rows of a step, ascending."""
        self.rows = rows
        self._right: dict[int, float] = {}
        self._ms: dict[int, float] = {}
        self._runs: defaultdict[int, int] = defaultdict(int)

    def saw(self, ngram: int, *, is_right: bool) -> None:
        """Note whether the first token that followed the same ``ngram`` tokens before is right, tried or not."""
        before = self._right.get(ngram, 0.0)
        self._right[ngram] = before + _WEIGHT * (is_right - before)

    def ran(self, num_rows: int, milliseconds: float) -> None:
        """Note the time of a step."""
        rows = next(rows for rows in self.rows if rows >= num_rows)
        self._runs[rows] += 1
        if self._runs[rows] > 2:  # the first two warm up and are captured
            before = self._ms.get(rows, milliseconds)
            self._ms[rows] = before + _WEIGHT * (milliseconds - before)

    def most_drafts(self, ngram: int) -> int:
        """Return the draft tokens after ``ngram`` equal ones that give the most tokens a second; 0 if none pay."""
        right, known = self._right.get(ngram, 0.0), min(self._ms, default=1)

        def speed(rows: int) -> float:
            # The time of untried rows is not known yet: as if they cost nothing more, so they are tried where drafts are right.
            return sum(right**token for token in range(rows)) / self._ms.get(rows, self._ms.get(known, 1.0))

        # The smallest of equal ones: max takes the first.
        return max(self.rows, key=speed) - 1


@final
class PromptLookup:
    """Finds where the last tokens of a text have come before."""

    def __init__(self, ids: Sequence[int]) -> None:
        """``ids`` are the prompt's."""
        self._ids: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        self.add(ids)

    def add(self, tokens: Sequence[int]) -> None:
        """Append tokens of the answer."""
        for token in tokens:
            # The place after the last tokens becomes known with the token that stands there.
            for ngram in NGRAMS:
                self._after[tuple(self._ids[-ngram:])] = len(self._ids)
            self._ids.append(token)

    def find(self) -> tuple[int, list[int]]:
        """Return the number of last tokens that came before, and the tokens that came after them the latest time."""
        for ngram in NGRAMS:
            place = self._after.get(tuple(self._ids[-ngram:]))
            if place is not None:
                found = self._ids[place : place + STEP_ROWS[-1]]
                # A text that repeats itself goes on so.
                return ngram, (found * STEP_ROWS[-1])[: STEP_ROWS[-1]]
        return 0, []


@final
class Drafts:
    """The drafts of one answer."""

    def __init__(self, lookup: LookupTokens, payoff: Payoff, prompt_ids: Sequence[int]) -> None:
        self._lookup, self._payoff, self._text = lookup, payoff, PromptLookup(prompt_ids)
        self._found: tuple[int, list[int]] = 0, []

    def after(self, tokens: Sequence[int]) -> Sequence[int]:
        """Append the answer's newest tokens and return a draft of those after them."""
        self._text.add(tokens)
        ngram, found = self._found = self._text.find()
        return found[: self._payoff.most_drafts(ngram) if self._lookup == "auto" else self._lookup]

    def came(self, token: int, *, num_rows: int, milliseconds: float) -> None:
        """Note the token that came next, and the rows and time of its step."""
        ngram, found = self._found
        if found:
            self._payoff.saw(ngram, is_right=found[0] == token)
        self._payoff.ran(num_rows, milliseconds)


def check_lookup(lookup: LookupTokens, rows: Sequence[int]) -> LookupTokens:
    """Return ``lookup`` if a step, which may have ``rows``, has room for as many draft tokens.

    Raises:
        ShapeError: If it has not.
    """
    if lookup != "auto" and not (is_whole(lookup) and 0 <= lookup < rows[-1]):
        raise ShapeError(
            f"lookup: expected auto or 0..{rows[-1] - 1} (the bundle's rows of a decode step less one), got {lookup!r:.80};"
            " choose one, or export with a larger --decode-rows"
        )
    return lookup
