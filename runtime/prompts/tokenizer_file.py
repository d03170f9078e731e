"""Opens an untrusted ``tokenizer.json``: refuses files that could hang or abort the process before the library reads them.

The library (tokenizers, in Rust) does not limit costs: rules that replace text can fill the machine, which aborts the
process, and a regular expression can take exponential time. So the growth of texts is bounded here, and regular expressions
are limited to forms that take at most quadratic time. The patterns of all released tokenizers that we know (GPT-2, Llama,
Qwen, o200k, CLIP, …) have these forms.
"""

from __future__ import annotations

import base64
import binascii
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import tokenizers

from trio_edge.runtime.bundle.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_TOKENIZER_BYTES = 128 << 20
"""Size of the largest tokenizer.json; released ones have up to 33 MB."""
MAX_CHARACTERS = 8_000_000
"""Longest text in characters after the tokenizer's rules; while they run, each character takes up to 80 bytes."""
_MOST_RULES = 64
_MOST_DECODER_GROWTH = 1000
_MOST_PATTERN_CHARACTERS = 4096
_MOST_REPEATS = 1000
_FEW_REPEATS = 4
_MOST_CHOICES = 6
_UNICODE_GROWTH = 18  # of one character in the normal form KD
_BYTES_GROWTH = 4  # of one character as the bytes of UTF-8


class _File(msgspec.Struct):
    """The parts of the file that are checked; others, such as the vocabulary, are skipped."""

    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None
    decoder: dict[str, Any] | None = None
    added_tokens: list[dict[str, Any]] = []


def tokenizer_from(content: bytes, *, where: str) -> tuple[tokenizers.Tokenizer, int]:
    """Return the tokenizer of a ``tokenizer.json``, and the factor by which its rules can make a text longer.

    Raises:
        BundleError: If the file is broken, or its rules could take too much time or memory; the message begins with ``where``.
    """
    try:
        file = msgspec.json.decode(content, type=_File)
        growth = _growth(file.normalizer) * _growth(file.pre_tokenizer)
        _check_added_tokens(file.added_tokens, growth=growth)
        _check_decoder(file.decoder)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = (
            error if isinstance(error, ValueError) else f"a rule of another form ({type(error).__name__})"
        )
        raise BundleError(
            f"{where}: expected a tokenizer.json, got {str(reason)[:200]}; export the bundle again"
        ) from None
    with only_bundle_errors(where):
        return tokenizers.Tokenizer.from_buffer(content), growth


@contextmanager
def only_bundle_errors(where: str) -> Iterator[None]:
    """Turn the library's errors into a BundleError: plain Exceptions, and panics, which are not Exceptions."""
    try:
        yield
    except BundleError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200]
        raise BundleError(
            f"{where}: expected a tokenizer.json, got {reason}; export the bundle again"
        ) from None


def _check_decoder(decoder: dict[str, Any] | None) -> None:
    if (times := _growth(decoder)) > _MOST_DECODER_GROWTH:
        raise ValueError(f"a decoder that can make a text {times} times as long")


def _check_added_tokens(tokens: list[dict[str, Any]], *, growth: int) -> None:
    # The library normalizes added tokens when it loads the file.
    if sum(1 + len(token["content"]) for token in tokens) * growth > MAX_CHARACTERS:
        raise ValueError(f"rules that make added tokens longer than {MAX_CHARACTERS} characters")


def _growth(rule: dict[str, Any] | None) -> int:
    """Return the factor by which a normalizer, pre-tokenizer or decoder can make a text longer.

    Raises:
        ValueError: If there are too many rules, or a pattern has a form that is not allowed.
    """
    growth = 1
    for count, part in enumerate(_flat(rule)):
        if count >= _MOST_RULES:
            raise ValueError(f"more than {_MOST_RULES} rules in a row")
        growth *= _growth_of_one(part)
    return growth


def _flat(rule: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if rule is None:
        return
    parts = [rule[name] for name in ("normalizers", "pretokenizers", "decoders") if rule.get(name)]
    for part in parts:
        for inner in part:
            yield from _flat(inner)
    if not parts:
        yield rule


def _growth_of_one(rule: dict[str, Any]) -> int:
    kind, pattern = rule.get("type"), rule.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    if regex is not None:
        check_pattern(regex)
    if kind == "Replace":
        content = len(rule["content"])
        text = pattern.get("String", "") if isinstance(pattern, dict) else pattern
        replaced = len(text) if isinstance(text, str) and regex is None else 0
        return 1 + content if replaced == 0 else max(1, -(-content // replaced))
    if kind == "Prepend":
        return 1 + len(rule["prepend"])
    if kind == "Precompiled":
        return _longest_replacement(rule["precompiled_charsmap"])
    if kind in ("NFD", "NFKD", "NFC", "NFKC"):
        return _UNICODE_GROWTH
    return _BYTES_GROWTH if kind in ("ByteLevel", "BertNormalizer", "Lowercase") else 1


def _longest_replacement(charsmap: str | None) -> int:
    """Return the length of the longest text in SentencePiece's table: the size of a trie, the trie, zero-separated texts."""
    try:
        table = base64.b64decode(charsmap or "", validate=True)
    except binascii.Error:
        raise ValueError("a table of characters that is no base64") from None
    size = int.from_bytes(table[:4], "little")
    return max(len(text) for text in table[4 + size :].split(b"\0")) or 1


# Regular expressions


class _Part(NamedTuple):
    """Properties of a part of a regular expression that determine its cost."""

    is_long: bool = False
    """It can match a text of any length."""
    can_fail: bool = True
    has_choice: bool = False
    """It can match a text in several ways, because of alternatives or a repeat without a fixed number."""
    num_retries: int = 0
    """Its long repeats that are retried at each length, because a later part may fail."""
    num_choices: int = 0
    """Its other choices that are retried."""


def check_pattern(pattern: str) -> None:
    """Raise ValueError unless matching ``pattern`` takes at most quadratic time in the text's length."""
    if len(pattern) > _MOST_PATTERN_CHARACTERS:
        raise ValueError(f"a pattern of more than {_MOST_PATTERN_CHARACTERS} characters")
    scanner = _Scanner(pattern)
    part = scanner.alternatives()
    if scanner.rest:
        raise ValueError(f"a pattern with too many closing brackets: {pattern[:80]!r}")
    if part.num_retries > 1 or part.num_choices > _MOST_CHOICES:
        raise ValueError(f"a pattern that can take very long: {pattern[:80]!r}")


class _Scanner:
    """Reads a regular expression of Oniguruma from left to right."""

    _QUANTIFIER = re.compile(r"(?:[*+?]|\{(\d*)(,?)(\d*)\})([?+]?)")
    _ESCAPE = re.compile(r"\\(?:[pP]\{\^?[\w ]{1,40}\}|x\{[0-9A-Fa-f]{1,8}\}|[^0-9kgXK\\]|\\|0)", re.DOTALL)
    _GROUP = re.compile(r"\((?:\?(?:[imx-]*:|<?[=!]|>|<[A-Za-z_]\w*>)|(?![?*]))")
    _FLAGS = re.compile(r"\(\?[imx-]+\)")

    def __init__(self, pattern: str) -> None:
        self.rest = pattern

    def alternatives(self) -> _Part:
        parts = [self._sequence()]
        while self.rest.startswith("|"):
            self.rest = self.rest[1:]
            parts.append(self._sequence())
        if len(parts) == 1:
            return parts[0]
        return _Part(
            any(part.is_long for part in parts),
            any(part.can_fail for part in parts),
            True,
            max(part.num_retries for part in parts),
            max(part.num_choices for part in parts),
        )

    def _sequence(self) -> _Part:
        parts: list[_Part] = []
        while self.rest and self.rest[0] not in "|)":
            if found := self._FLAGS.match(self.rest):
                self.rest = self.rest[found.end() :]
                continue
            parts.append(self._repeated(self._atom()))
        fails_after, num_retries, num_choices = False, 0, 0
        for part in reversed(parts):
            num_retries += part.num_retries + (part.is_long and fails_after)
            num_choices += part.num_choices + (part.has_choice and not part.is_long and fails_after)
            fails_after |= part.can_fail
        has_choice = any(part.has_choice for part in parts)
        return _Part(any(part.is_long for part in parts), fails_after, has_choice, num_retries, num_choices)

    def _atom(self) -> _Part:
        if self.rest.startswith("("):
            return self._group()
        if self.rest.startswith("["):
            self._skip_class()
            return _Part()
        found = self._ESCAPE.match(self.rest) if self.rest.startswith("\\") else None
        if found is None and self.rest[0] in "\\*+?{":
            raise ValueError(f"a pattern of a form that is not supported: {self.rest[:40]!r}")
        self.rest = self.rest[1 if found is None else found.end() :]
        return _Part()

    def _group(self) -> _Part:
        found = self._GROUP.match(self.rest)
        if found is None:
            raise ValueError(f"a pattern with a group of a form that is not supported: {self.rest[:40]!r}")
        self.rest = self.rest[found.end() :]
        inner = self.alternatives()
        if not self.rest.startswith(")"):
            raise ValueError("a pattern with an open bracket")
        self.rest = self.rest[1:]
        looks_around = found[0][2:3] in ("=", "!") or found[0][2:4] in ("<=", "<!")
        return inner._replace(can_fail=True) if looks_around else inner

    def _repeated(self, part: _Part) -> _Part:
        found = self._QUANTIFIER.match(self.rest)
        if found is None:
            return part
        self.rest = self.rest[found.end() :]
        least, most = _bounds(found)
        if most > _MOST_REPEATS and most != _ENDLESS:
            raise ValueError(f"a pattern with more than {_MOST_REPEATS} repeats")
        if most > 1 and part.has_choice:
            raise ValueError("a pattern with a choice inside a repeat")
        is_long = part.is_long or most > _FEW_REPEATS
        has_choice = part.has_choice or least != most or most > _FEW_REPEATS
        return part._replace(is_long=is_long, can_fail=part.can_fail and least > 0, has_choice=has_choice)

    def _skip_class(self) -> None:
        """Skip a character class, which may contain other classes."""
        depth, place = 0, 0
        while place < len(self.rest):
            char = self.rest[place]
            if char == "\\":
                place += 1
            elif char == "[":
                depth += 1
                if self.rest[place + 1 : place + 2] == "^":
                    place += 1
                if self.rest[place + 1 : place + 2] == "]":  # directly after the start it is a character
                    place += 1
            elif char == "]":
                depth -= 1
                if depth == 0:
                    self.rest = self.rest[place + 1 :]
                    return
            place += 1
        raise ValueError("a pattern with an open class of characters")


_ENDLESS = 1 << 40


def _bounds(found: re.Match[str]) -> tuple[int, int]:
    """Return the least and most repeats of a quantifier."""
    sign = found[0][0]
    if sign != "{":
        return int(sign == "+"), 1 if sign == "?" else _ENDLESS
    least = int((found[1] or "0")[:9])
    if not found[2]:
        return least, least
    return least, int(found[3][:9]) if found[3] else _ENDLESS
