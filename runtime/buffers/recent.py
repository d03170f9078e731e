"""Memory for the most recently used results."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Generic, TypeVar, final

if TYPE_CHECKING:
    from collections.abc import Iterable

Slot = TypeVar("Slot")


@final
class Recent(Generic[Slot]):
    """Slots of device memory by key; a new key replaces the least recently used one."""

    def __init__(self, slots: Iterable[Slot]) -> None:
        self._free = list(slots)
        self._used: OrderedDict[bytes, Slot] = OrderedDict()

    def find(self, key: bytes) -> Slot | None:
        """Return the slot of ``key``, which is now the most recently used one; None if there is none."""
        if key not in self._used:
            return None
        self._used.move_to_end(key)
        return self._used[key]

    def take(self, key: bytes) -> Slot | None:
        """Return a slot to fill for ``key``; None without slots, or for an empty key."""
        if not key or not (self._free or self._used):
            return None
        self._used[key] = self._free.pop() if self._free else self._used.popitem(last=False)[1]
        return self._used[key]
