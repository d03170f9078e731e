"""Values that a JSON file of a friend never holds, and changes of JSON that keep most of it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import random

NUMBERS = (
    0, -1, 1, 2, 3, 7, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**40, 2**53, 2**63 - 1, 2**63, 2**64, 10**9, 10**12, 10**30,
    0.5, -0.0, 1e-320, 5e-324, 1e308, float("inf"), float("nan"),
)  # fmt: skip
TEXTS = (
    "", " ", "a", "x" * 300, "y" * 5000, "\0", "a\0b", "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\u202eback", "\u200b",
    "\ud800", "\r\n", "../../etc/passwd", "/dev/zero", "C:\\x", "a/../b", ".", "..", "trio.json", "vision", "head", "N",
    "float64", "int4", "<image>", "</s>", "{{ 7 }}", "%s%n", "𝔘𝔫𝔦", "ﬃ", "é" * 50,
)  # fmt: skip
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], [None], {"a": 1}, [1, "a", None])


def hostile(rng: random.Random) -> Any:
    """Return any such value."""
    return copy.deepcopy(rng.choice(rng.choice((NUMBERS, TEXTS, OTHERS))))


def places(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Return the paths of all values in JSON."""
    found = [path] if path else []
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, inner in entries:
        found += places(inner, (*path, key))
    return found


def mutated(rng: random.Random, value: Any, paths: list[tuple[str | int, ...]]) -> Any:
    """Return a copy of JSON with one to three changes; ``paths`` are its ``places``."""
    changed = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        *parents, last = rng.choice(paths)
        place = changed
        try:
            for key in parents:
                place = place[key]
            _change(rng, place, last)
        except (KeyError, IndexError, TypeError):  # an earlier change took it away
            continue
    return changed


def _change(rng: random.Random, place: Any, key: Any) -> None:
    old = place[key]
    kind = rng.randrange(8)
    if kind == 0:
        del place[key]
    elif kind == 1 and isinstance(place, dict):
        place[rng.choice((str(key) + "x", "__class__", "", "extra"))] = old
    elif kind == 2 and isinstance(place, list):
        place.insert(rng.randrange(len(place) + 1), copy.deepcopy(rng.choice(place)))
    elif kind == 3 and isinstance(old, str) and old:
        at = rng.randrange(len(old))
        place[key] = old[:at] + chr(ord(old[at]) ^ 1 << rng.randrange(7)) + old[at + 1 :]
    elif kind == 4 and isinstance(old, (int, float)) and not isinstance(old, bool):
        place[key] = rng.choice(
            (old + 1, old - 1, -old, old * 2, old * 1000, old // 2, old * 10**9, float(old))
        )
    elif kind == 5 and isinstance(old, list):
        place[key] = rng.choice((old[::-1], old[:-1], old * 2, old[:1] * 50, []))
    elif kind == 6 and isinstance(place, list):
        rng.shuffle(place)
    else:
        place[key] = hostile(rng)


def damaged(rng: random.Random, content: bytes) -> bytes:
    """Return bytes with some bits flipped, cut off, repeated or put in."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        at, kind = rng.randrange(len(data) + 1), rng.randrange(5)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at:at] = rng.randbytes(rng.choice((1, 4, 100)))
        elif kind == 3:
            data[at : at + 4] = rng.choice(
                (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\0\x01")
            )
        else:
            data[at:at] = data[at : at + rng.choice((1, 8, 200))]
        if not data:
            break
    return bytes(data)
