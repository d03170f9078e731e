"""Finds texts that end an answer while it streams; text that may be the start of one is held back."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from collections.abc import Sequence


@final
class StopTexts:
    """Cuts a stream of text before the first of some stop texts."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts, self._held = tuple(texts), ""
        self.is_found = False

    def push(self, piece: str) -> str:
        """Add a piece; return the text before a stop text, without an end that may start one."""
        text = self._held + piece
        found = [at for at in (text.find(stop) for stop in self._texts) if at >= 0]
        if found:
            self.is_found, self._held = True, ""
            return text[: min(found)]
        num_held = max((_overlap(text, stop) for stop in self._texts), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def finish(self) -> str:
        """Return the text that was held back."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Return the number of characters at the end of ``text`` that start ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((count for count in range(longest, 0, -1) if text.endswith(stop[:count])), 0)
