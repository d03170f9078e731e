"""The tokens of one answer after its first: decode steps, of one token or several, and tokens that need no step."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from collections.abc import Collection

    from trio_edge.runtime.answer import Statistics
    from trio_edge.runtime.bundle.reader import TokenTable
    from trio_edge.runtime.model.decoder import Decoder
    from trio_edge.runtime.model.drafts import Drafts
    from trio_edge.runtime.model.sampling import TokenChooser


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
        self._num_run = 0
        """Newest tokens that need no row: they were drafts, and right."""

    def add_certain(self, tokens: list[int], statistics: Statistics) -> None:
        """Append to the newest ``tokens``, which are not counted yet, those that must come after them."""
        while tokens[-1] not in self._stop_ids and statistics.new_tokens + len(tokens) < self.limit:
            start = time.perf_counter()
            if (token := self.chooser.certain()) is None:
                return
            tokens.append(token)
            statistics.token_ms.append(1e3 * (time.perf_counter() - start))
            statistics.decode_ms += statistics.token_ms[-1]

    def after(self, tokens: list[int], decoder: Decoder, statistics: Statistics) -> list[int]:
        """Run the newest ``tokens`` and a draft of those after them; return the tokens that come next, one or more.

        Raises:
            ShapeError: If the answer's rules allow no token.
            BackendError: If a graph fails.
        """
        start, new = time.perf_counter(), tokens[self._num_run :]
        draft = () if self._drafts is None else self._drafts.after(tokens)
        while len(new) > decoder.max_rows:
            decoder.decode(self._embedding[new[: decoder.max_rows]])
            statistics.steps, new = statistics.steps + 1, new[decoder.max_rows :]
        if draft:
            room = min(decoder.max_rows, decoder.room) - len(new)
            draft = draft[: min(room, self.limit - statistics.new_tokens - 1)]
        step_start = time.perf_counter()
        tops = decoder.decode(self._embedding[[*new, *draft]])
        step_ms = 1e3 * (time.perf_counter() - step_start)
        found: list[int] = []
        for row, top in enumerate(tops[len(new) - 1 :], len(new) - 1):
            found.append(self.chooser.choose(top, partial(decoder.logits, row)))
            if found != [*draft[: len(found)]] or found[-1] in self._stop_ids:
                break
        self._num_run = len(found) - 1
        if wrong := len(draft) - self._num_run:
            decoder.skip(-wrong)
        if self._drafts is not None:
            self._drafts.came(found[0], num_rows=len(tops), milliseconds=step_ms)
        statistics.kv_bytes = decoder.kv_bytes
        statistics.steps += 1
        statistics.draft_tokens += len(draft)
        statistics.accepted_tokens += self._num_run
        milliseconds = 1e3 * (time.perf_counter() - start)
        statistics.token_ms += [milliseconds / len(found)] * len(found)
        statistics.decode_ms += milliseconds
        return found
