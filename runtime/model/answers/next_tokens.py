"""The tokens of one answer after its first: decode steps, of one token or several, and tokens that need no step."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any, final

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    import numpy as np
    from numpy.typing import NDArray

    from trio_edge.runtime.answer import Statistics
    from trio_edge.runtime.bundle.reader import TokenTable
    from trio_edge.runtime.model.answers.drafts import Drafts
    from trio_edge.runtime.model.answers.sampling import TokenChooser, TopTokens
    from trio_edge.runtime.model.decoder import Decoder


@final
class NextTokens:
    """Finds the tokens of one answer."""

    def __init__(
        self,
        chooser: TokenChooser,
        drafts: Drafts | None,
        *,
        embedding: TokenTable,
        stop_ids: Collection[int],
        limit: int,
    ) -> None:
        """``limit`` is the most tokens of the answer."""
        self.chooser, self.limit = chooser, limit
        self._drafts, self._embedding, self._stop_ids = drafts, embedding, stop_ids
        self._count = 0
        """Tokens so far."""
        self._newest: list[int] = []
        """Tokens that the drafts do not know yet."""
        self._waiting: list[int] = []
        """The last of them, which have not run yet."""
        self._spent_ms = 0.0
        """Time of the tokens of ``_waiting`` that have run."""

    @property
    def is_over(self) -> bool:
        """Whether the answer has its last token."""
        return self._newest[-1] in self._stop_ids or self._count >= self.limit

    def first(self, token: int, statistics: Statistics) -> list[int]:
        """Return the answer's first token, and those that must come after it."""
        return self._with_certain([token], statistics)

    def _with_certain(self, found: list[int], statistics: Statistics) -> list[int]:
        """Append to the next tokens, whose last one has not run, those that must come after them."""
        self._count += len(found)
        num_found, self._newest = len(found), found
        while not self.is_over:
            start = time.perf_counter()
            if (token := self.chooser.certain()) is None:
                break
            found.append(token)
            self._count += 1
            statistics.token_ms.append(1e3 * (time.perf_counter() - start))
            statistics.decode_ms += statistics.token_ms[-1]
        self._waiting = found[num_found - 1 :]
        return found

    def after(self, decoder: Decoder, statistics: Statistics) -> list[int]:
        """Run the newest tokens and a draft of those after them; return the tokens that come next, one or more.

        Raises:
            ShapeError: If the answer's rules allow no token.
            BackendError: If a graph fails.
        """
        start, new = time.perf_counter(), self._waiting
        draft = () if self._drafts is None else self._drafts.after(self._newest)
        while len(new) > decoder.max_rows:
            decoder.decode(self._embedding[new[: decoder.max_rows]])
            statistics.steps, new = statistics.steps + 1, new[decoder.max_rows :]
        if draft:
            room = min(decoder.max_rows, decoder.room) - len(new)
            draft = draft[: min(room, self.limit - self._count - 1)]
        step_start = time.perf_counter()
        tops = decoder.decode(self._embedding[[*new, *draft]])
        step_ms = 1e3 * (time.perf_counter() - step_start)
        found: list[int] = []
        for row, top in enumerate(tops[len(new) - 1 :], len(new) - 1):
            found.append(self.chooser.choose(top, partial(decoder.logits, row)))
            if found != [*draft[: len(found)]] or found[-1] in self._stop_ids:
                break
        num_right = len(found) - 1
        if wrong := len(draft) - num_right:
            decoder.skip(-wrong)
        if self._drafts is not None:
            self._drafts.came(found[0], num_rows=len(tops), milliseconds=step_ms)
        statistics.kv_bytes = decoder.kv_bytes
        statistics.steps += 1
        statistics.draft_tokens += len(draft)
        statistics.accepted_tokens += num_right
        milliseconds = 1e3 * (time.perf_counter() - start)
        statistics.token_ms += [milliseconds / len(found)] * len(found)
        statistics.decode_ms += milliseconds
        return self._with_certain(found, statistics)

    @property
    def waiting(self) -> NDArray[Any]:
        """Embedding [D] of the token that runs next, if one runs at a time."""
        row: NDArray[Any] = self._embedding[self._waiting[:1]][0]
        return row

    def ran(
        self,
        top: TopTokens,
        logits: Callable[[], NDArray[np.float32]],
        statistics: Statistics,
        *,
        milliseconds: float,
    ) -> list[int]:
        """Note that ``waiting`` has run in a step with other answers; return the tokens that come next, if none waits.

        Raises:
            ShapeError: If the answer's rules allow no token.
        """
        start = time.perf_counter()
        del self._waiting[0]
        statistics.steps += 1
        self._spent_ms += milliseconds
        if self._waiting:
            return []
        if self._drafts is not None:
            self._drafts.after(self._newest)
        found = [self.chooser.choose(top, logits)]
        statistics.token_ms.append(self._spent_ms + 1e3 * (time.perf_counter() - start))
        statistics.decode_ms += statistics.token_ms[-1]
        self._spent_ms = 0.0
        return self._with_certain(found, statistics)
