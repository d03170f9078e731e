"""Turns prompt text into token ids around runs of visual tokens and their positions, and token ids into streamed text.

A ``tokenizer.json`` is not trusted: files that could hang or abort the process are refused before the library reads them. The
library (tokenizers, in Rust) does not limit costs: rules that replace text can fill the machine, which aborts the process, and
a regular expression can take exponential time. So the growth of texts is bounded here, and regular expressions are limited to
forms that take at most quadratic time. The patterns of all released tokenizers that we know (GPT-2, Llama, Qwen, o200k, CLIP,
…) have these forms.
"""

from __future__ import annotations

import base64
import binascii
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np
import tokenizers

from trio_edge.runtime.bundle.errors import BundleError, ShapeError
from trio_edge.runtime.bundle.limits import typed_json
from trio_edge.runtime.bundle.reader import read_regular
from trio_edge.runtime.prompts.sandbox import MAX_PROMPT_CHARACTERS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from trio_edge.runtime.bundle.manifest import TextSpec

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_LARGEST_ID = (1 << 31) - 1
_INCOMPLETE = "\ufffd"  # decoders write it for bytes that are not, or not yet, a character
MAX_TOKENIZER_BYTES = 128 << 20
"""Size of the largest tokenizer.json; released ones have up to 33 MB."""
MAX_CHARACTERS = 8_000_000
"""Longest text in characters after the tokenizer's rules; while they run, each character takes up to 80 bytes."""
_MOST_RULES = 64
_MOST_DECODER_GROWTH = 1000
_MOST_PATTERN_CHARACTERS = 4096
_MOST_REPEATS = 1000
_FEW_REPEATS = 4
_ENDLESS = 1 << 40
_MOST_CHOICES = 6
_BOUNDS = {"*": (0, _ENDLESS), "+": (1, _ENDLESS), "?": (0, 1)}
_GROWTH = {"NFD": 18, "NFKD": 18, "NFC": 18, "NFKC": 18, "ByteLevel": 4, "BertNormalizer": 4, "Lowercase": 4}
"""Characters that a rule can make of one: in the normal form KD, or as the bytes of UTF-8."""


class Inset(NamedTuple):
    """The text that replaces the placeholder of one image or video."""

    text: Sequence[str] = ("", "")
    """Text before each run of visual tokens, and after the last run."""
    is_video: bool = False
    number_marks: tuple[str, str] | None = None
    """Text around the image's number in the prompt, from 0, before ``text``; None for no number."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PromptIds:
    """A prompt's text tokens, and the places of its runs of visual tokens."""

    text: NDArray[np.int32]
    """[T], all text tokens in order."""
    text_before: tuple[int, ...] = ()
    """Number of text tokens before each run of visual tokens, ascending."""
    run_ids: tuple[int, ...] = ()
    """Placeholder id of each run's visual tokens: the image's or the video's."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.text)

    @property
    def before(self) -> NDArray[np.int32]:
        """The text before the first run; all of it without an image."""
        return self.text[: self.text_before[0]] if self.text_before else self.text

    @property
    def after(self) -> NDArray[np.int32]:
        """The text after the last run; none without an image."""
        return self.text[self.text_before[-1] if self.text_before else len(self.text) :]

    def visual_rows(self, run_lengths: Sequence[int]) -> NDArray[np.int32]:
        """Return the row [M] of each visual token, for runs of these lengths."""
        text_before = np.repeat(np.array(self.text_before, np.int32), run_lengths)
        return (text_before + np.arange(len(text_before))).astype(np.int32)

    def all_ids(self, run_lengths: Sequence[int]) -> NDArray[np.int32]:
        """Return the ids of the whole prompt, with a placeholder id for each visual token."""
        rows = self.visual_rows(run_lengths)
        ids = np.empty(len(self.text) + len(rows), np.int32)
        ids[rows] = np.repeat(np.array(self.run_ids, np.int32), run_lengths)
        ids[np.delete(np.arange(len(ids)), rows)] = self.text
        return ids


class PromptPositions(NamedTuple):
    """Positions of all rows of a prefill, and of the first new token."""

    ids: NDArray[np.int32]
    """[A, S]; padding rows have arbitrary positions."""
    next: int
    """Position of the first new token, on every axis."""


def plain_positions(*, num_rows: int, length: int) -> PromptPositions:
    """Return 0, 1, 2, … [1, num_rows] for a prompt of ``length`` real rows."""
    return PromptPositions(np.arange(num_rows, dtype=np.int32)[None], length)


class RunPositions(NamedTuple):
    """M-RoPE positions of one run of visual tokens, counted from the start of the run."""

    ids: NDArray[np.int32]
    """[3, M]: time, row and column of each token."""
    span: int
    """Positions from the run's start to the next token, which need not be its number of tokens."""
    text_before: int
    """Text tokens of the prompt before the run."""


def mrope_positions(runs: Sequence[RunPositions], *, num_text: int, num_rows: int) -> PromptPositions:
    """Return the M-RoPE positions [3, num_rows] of ``num_text`` text tokens and the ``runs`` of visual tokens, with padding.

    Text counts up equally on all axes. The positions of a run's tokens are offset by the start of the run.
    Source: Qwen2_5_VLModel.get_rope_index of transformers 5.23.
    """
    ids = np.zeros((3, num_rows), np.int32)  # padding rows are masked, so any position will do
    row = text = position = 0
    for run in (*runs, RunPositions(np.empty((3, 0), np.int32), 0, num_text)):
        count = run.text_before - text
        ids[:, row : row + count] = position + np.arange(count)
        row, text, position = row + count, run.text_before, position + count
        stop = row + run.ids.shape[1]
        ids[:, row:stop] = position + run.ids
        row, position = stop, position + run.span
    # The time of a long video can be larger than the positions of the text after it.
    return PromptPositions(ids, max(position, int(ids[:, :row].max(initial=-1)) + 1))


class Tokenizer:
    """A bundle's ``tokenizer.json``."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, *, growth: int = 1) -> None:
        """Take over a tokenizer of the library; its rules can make a text up to ``growth`` times as long.

        Truncation and padding are switched off, as in Hugging Face.
        """
        # tokenizer.json stores the settings of training; a truncated prompt would lose its question.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer, self._growth = tokenizer, growth
        self._special_tokens = tuple(
            token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special
        )

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Return the tokenizer of a ``tokenizer.json``.

        Raises:
            BundleError: If the file is missing or broken, or could hang or end the process.
        """
        where = f"tokenizer {str(path)!r}"
        with only_bundle_errors(where):
            content = read_regular(Path(path), max_bytes=MAX_TOKENIZER_BYTES)
        tokenizer, growth = tokenizer_from(content, where=where)
        return cls(tokenizer, growth=growth)

    def to_json(self) -> str:
        """Return the text of the ``tokenizer.json``, without truncation and padding."""
        return self._tokenizer.to_str()

    def check_user_text(self, text: str) -> None:
        """Raise ShapeError if a user's text holds a special token, or is not valid Unicode."""
        _check_unicode(text)
        # A user's text must not end the turn or contain a placeholder.
        for token in self._special_tokens:
            if token in text:
                raise ShapeError(f"prompt: expected plain text, got the special token {token!r}; remove it")

    def encode_prompt(self, text: str, spec: TextSpec, insets: Sequence[Inset] = ()) -> PromptIds:
        """Return the ids of a rendered chat, which has one placeholder for each image and each video, without placeholders.

        ``spec`` has the special tokens; ``insets`` replace the placeholders, in order. A leading BOS is added unless the
        text starts with it, as by Hugging Face's ``processor.apply_chat_template(tokenize=True)``.

        Raises:
            ShapeError: If there are not as many image tokens as images; or the text is empty or not valid Unicode.
            BundleError: If the tokenizer has another id for the image token.
        """
        image_token, image_id = spec.image_token, spec.image_token_id
        if self._tokenizer.token_to_id(image_token) != image_id:
            raise BundleError(
                f"tokenizer: expected image token {image_token!r} to have id {image_id},"
                f" got {self._tokenizer.token_to_id(image_token)}; export the bundle again"
            )
        (ids,) = self.with_endings(text, spec, insets, ("",))
        is_run = ids == image_id
        places, num_runs = np.flatnonzero(is_run), sum(len(inset.text) - 1 for inset in insets)
        if len(places) != num_runs:
            raise BundleError(
                f"tokenizer: expected {num_runs} tokens {image_token!r}, got {len(places)}; export the bundle again"
            )
        if is_run.all():
            raise ShapeError("prompt: expected some text, got none; write a question")
        video_id = spec.video_token_id or 0
        run_ids = [video_id if inset.is_video else image_id for inset in insets for _ in inset.text[1:]]
        text_before = tuple((places - np.arange(num_runs)).tolist())
        return PromptIds(text=ids[~is_run], text_before=text_before, run_ids=tuple(run_ids))

    def with_endings(
        self, text: str, spec: TextSpec, insets: Sequence[Inset], endings: Sequence[str]
    ) -> list[NDArray[np.int32]]:
        """Return the ids of a rendered chat followed by each of ``endings``; each run of visual tokens is one placeholder.

        Raises:
            ShapeError: If there are not as many image tokens as images; or a text is not valid Unicode.
        """
        _check_unicode("".join((text, *endings)))
        text = _with_insets(text, insets, image_token=spec.image_token, video_token=spec.video_token)
        starts_with_bos = bool(spec.bos_token) and text.startswith(spec.bos_token)
        return [self._encode(text + ending, add_special_tokens=not starts_with_bos) for ending in endings]

    def plain_ids(self, text: str) -> NDArray[np.int32]:
        """Return the ids of a text without special tokens around it.

        Raises:
            ShapeError: If the text is not valid Unicode.
        """
        _check_unicode(text)
        return self._encode(text, add_special_tokens=False)

    @property
    def num_tokens(self) -> int:
        """Size of the vocabulary."""
        return self._tokenizer.get_vocab_size()

    def has_only_unknown(self, text: str) -> bool:
        """Return whether the tokenizer knows nothing of ``text``, so that all its tokens are the unknown one.

        Raises:
            ShapeError: If the text is not valid Unicode.
        """
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        return unknown is not None and set(self.plain_ids(text)) == {self._tokenizer.token_to_id(unknown)}

    def _encode(self, text: str, *, add_special_tokens: bool) -> NDArray[np.int32]:
        if (1 + len(text)) * self._growth > MAX_CHARACTERS:
            raise BundleError(
                f"tokenizer: expected rules that leave {len(text)} characters below {MAX_CHARACTERS}, got some that make"
                f" them up to {self._growth} times as many; shorten the prompt"
            )
        with only_bundle_errors("tokenizer"):
            ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        if max(ids, default=0) > _LARGEST_ID:
            raise BundleError(
                f"tokenizer: expected token ids below 2^31, got {max(ids)}; export the bundle again"
            )
        return np.array(ids, dtype=np.int32)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of the ids without special tokens.

        Raises:
            BundleError: If the tokenizer fails, or the text is longer than any answer.
        """
        with only_bundle_errors("tokenizer"):
            text = self._tokenizer.decode([int(token_id) for token_id in token_ids], skip_special_tokens=True)
        if len(text) > MAX_PROMPT_CHARACTERS:
            raise BundleError(
                f"tokenizer: expected an answer of at most {MAX_PROMPT_CHARACTERS} characters, got {len(text)};"
                " export the bundle again"
            )
        return text

    def ends_text(self, token_id: int) -> bool:
        """Return whether the text up to this token is final, apart from a character's missing bytes.

        It is not after a byte token, whose run may go on, nor after a special token, which ``decode`` skips in a run.
        """
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token in self._special_tokens:
            return False
        return _BYTE_TOKEN.fullmatch(token) is None


class DetokenizeStream:
    """Text of token ids that come one at a time; all pieces together equal ``Tokenizer.decode`` of all ids.

    Text is held back until it is final: while a character's bytes are incomplete, and within a run of byte tokens, which
    SentencePiece's decoder accepts or rejects as a whole.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._token_ids: list[int] = []
        self._sent = ""

    def push(self, token_id: int) -> str:
        """Add a token and return the text that has become final, often none."""
        self._token_ids.append(int(token_id))
        if not self._tokenizer.ends_text(int(token_id)):
            return ""
        return self._send(self._tokenizer.decode(self._token_ids).rstrip(_INCOMPLETE))

    def finish(self) -> str:
        """Return the text that was held back; incomplete characters become U+FFFD."""
        return self._send(self._tokenizer.decode(self._token_ids))

    def _send(self, text: str) -> str:
        if not text.startswith(self._sent):
            return ""
        piece, self._sent = text[len(self._sent) :], text
        return piece


def _with_insets(text: str, insets: Sequence[Inset], *, image_token: str, video_token: str | None) -> str:
    """Return the chat with one image placeholder for each run of visual tokens, and the text around the runs."""
    places = re.compile("|".join(re.escape(token) for token in (image_token, video_token) if token))
    found = places.findall(text)
    for kind, token in (("image", image_token), ("video", video_token)):
        wanted = sum(inset.is_video == (kind == "video") for inset in insets)
        if found.count(token) != wanted:
            many = "" if wanted == 1 else "s"
            raise ShapeError(
                f"prompt: expected {wanted} {kind} token{many} {token!r} for {wanted} {kind}{many}, got"
                f" {found.count(token)}; remove it from your text, or use a chat template that places all {kind}s"
            )
    first, *rest = places.split(text)
    numbers = ((count, inset.number_marks) for count, inset in enumerate(insets))
    named = ("" if marks is None else f"{marks[0]}{count}{marks[1]}" for count, marks in numbers)
    runs = (image_token.join(inset.text) for inset in insets)
    return first + "".join(name + run + piece for name, run, piece in zip(named, runs, rest))


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ShapeError(
            f"prompt: expected valid Unicode, got a lone surrogate at character {error.start}; remove it"
        ) from error


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
    with only_bundle_errors(where):
        try:
            file = typed_json(content, _File)
            growth = _growth(file.normalizer) * _growth(file.pre_tokenizer)
            num_characters = sum(1 + len(token["content"]) for token in file.added_tokens)
            times = _growth(file.decoder)
        except (TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"a rule of another form ({type(error).__name__})") from None
        # The library normalizes added tokens when it loads the file.
        if num_characters * growth > MAX_CHARACTERS:
            raise ValueError(f"rules that make added tokens longer than {MAX_CHARACTERS} characters")
        if times > _MOST_DECODER_GROWTH:
            raise ValueError(f"a decoder that can make a text {times} times as long")
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


def _growth(rule: dict[str, Any] | None) -> int:
    """Return the factor by which rules can make a text longer; raise ValueError for too many rules or odd patterns."""
    growth = 1
    for count, part in enumerate(_flat(rule)):
        if count >= _MOST_RULES:
            raise ValueError(f"more than {_MOST_RULES} rules in a row")
        growth *= _growth_of_one(part)
    return growth


def _flat(rule: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if rule is None:
        return
    if parts := [rule[name] for name in ("normalizers", "pretokenizers", "decoders") if rule.get(name)]:
        for inner in (inner for part in parts for inner in part):
            yield from _flat(inner)
    else:
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
    return _GROWTH.get(str(kind), 1)


def _longest_replacement(charsmap: str | None) -> int:
    """Return the length of the longest text in SentencePiece's table: the size of a trie, the trie, zero-separated texts."""
    try:
        table = base64.b64decode(charsmap or "", validate=True)
    except binascii.Error:
        raise ValueError("a table of characters that is no base64") from None
    size = int.from_bytes(table[:4], "little")
    if size > len(table) - 4:  # the library would allocate it
        raise ValueError(f"a table of characters that is cut short: {size} bytes of a trie in {len(table)}")
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
    _CLASS_MARK = re.compile(r"\\.|\[\^?\]?|\]", re.DOTALL)  # directly after the start, a "]" is a character

    def __init__(self, pattern: str) -> None:
        self.rest = pattern

    def alternatives(self) -> _Part:
        parts = [self._sequence()]
        while self.rest.startswith("|"):
            self.rest = self.rest[1:]
            parts.append(self._sequence())
        if len(parts) == 1:
            return parts[0]
        return _Part._make(map(max, zip(*parts)))._replace(has_choice=True)

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
        if found[0][0] in _BOUNDS:
            least, most = _BOUNDS[found[0][0]]
        else:
            least = int((found[1] or "0")[:9])
            most = int(found[3][:9]) if found[3] else _ENDLESS if found[2] else least
        if most > _MOST_REPEATS and most != _ENDLESS:
            raise ValueError(f"a pattern with more than {_MOST_REPEATS} repeats")
        if most > 1 and part.has_choice:
            raise ValueError("a pattern with a choice inside a repeat")
        is_long = part.is_long or most > _FEW_REPEATS
        has_choice = part.has_choice or least != most or most > _FEW_REPEATS
        return part._replace(is_long=is_long, can_fail=part.can_fail and least > 0, has_choice=has_choice)

    def _skip_class(self) -> None:
        depth = 0
        for found in self._CLASS_MARK.finditer(self.rest):
            depth += {"[": 1, "]": -1}.get(found[0][0], 0)
            if depth == 0:
                self.rest = self.rest[found.end() :]
                return
        raise ValueError("a pattern with an open class of characters")
