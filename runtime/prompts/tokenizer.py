"""Turns prompt text into token ids around runs of visual tokens, and token ids into streamed text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from trio_edge.runtime.bundle.errors import BundleError, ShapeError
from trio_edge.runtime.bundle.reader import read_regular
from trio_edge.runtime.prompts.sandbox import MAX_PROMPT_CHARACTERS
from trio_edge.runtime.prompts.tokenizer_file import (
    MAX_CHARACTERS,
    MAX_TOKENIZER_BYTES,
    only_bundle_errors,
    tokenizer_from,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import tokenizers
    from numpy.typing import NDArray

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_LARGEST_ID = (1 << 31) - 1
_INCOMPLETE = "\ufffd"  # decoders write it for bytes that are not, or not yet, a character


class Inset(NamedTuple):
    """The text that replaces the placeholder of one image or video."""

    text: Sequence[str] = ("", "")
    """Text before each run of visual tokens, and after the last run."""
    is_video: bool = False


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
        if not Path(path).is_file():
            raise BundleError(f"{where}: expected a file, found none; export the bundle again")
        try:
            content = read_regular(Path(path), max_bytes=MAX_TOKENIZER_BYTES)
        except OSError as error:
            raise BundleError(
                f"{where}: cannot be read ({error.strerror}); export the bundle again"
            ) from None
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

    def encode_prompt(
        self,
        text: str,
        *,
        image_token: str,
        image_token_id: int,
        video: tuple[str, int] | None = None,
        insets: Sequence[Inset] = (),
        bos_token: str = "",
    ) -> PromptIds:
        """Return the ids of a rendered chat without its placeholders of images and videos.

        Special tokens (a leading BOS) are added unless the text starts with ``bos_token``. This is the rule of Hugging
        Face's ``processor.apply_chat_template(tokenize=True)``.

        Args:
            text: The chat, with one placeholder for each image and each video.
            image_token: Placeholder of an image.
            image_token_id: Id of ``image_token``.
            video: Placeholder of a video and its id, if the model takes videos.
            insets: The texts that replace the placeholders, in order.
            bos_token: The text of the BOS token.

        Raises:
            ShapeError: If there are not as many image tokens as images; or the text is empty or not valid Unicode.
            BundleError: If the tokenizer has another id for the image token.
        """
        if self._tokenizer.token_to_id(image_token) != image_token_id:
            raise BundleError(
                f"tokenizer: expected image token {image_token!r} to have id {image_token_id},"
                f" got {self._tokenizer.token_to_id(image_token)}; export the bundle again"
            )
        _check_unicode(text)
        text = _with_insets(text, insets, image_token=image_token, video_token=video and video[0])
        starts_with_bos = bool(bos_token) and text.startswith(bos_token)
        ids = self._encode(text, add_special_tokens=not starts_with_bos)
        is_run = ids == image_token_id
        places, num_runs = np.flatnonzero(is_run), sum(len(inset.text) - 1 for inset in insets)
        if len(places) != num_runs:
            raise BundleError(
                f"tokenizer: expected {num_runs} tokens {image_token!r}, got {len(places)}; export the bundle again"
            )
        if len(ids) == 0:
            raise ShapeError("prompt: expected some text, got none; write a question")
        run_ids = [
            video[1] if video is not None and inset.is_video else image_token_id
            for inset in insets
            for _ in inset.text[1:]
        ]
        return PromptIds(
            text=ids[~is_run],
            text_before=tuple((places - np.arange(num_runs)).tolist()),
            run_ids=tuple(run_ids),
        )

    def plain_ids(self, text: str) -> NDArray[np.int32]:
        """Return the ids of a text without special tokens around it.

        Raises:
            ShapeError: If the text is not valid Unicode.
        """
        _check_unicode(text)
        return self._encode(text, add_special_tokens=False)

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
        piece = text[len(self._sent) :]
        self._sent = text
        return piece


def _with_insets(text: str, insets: Sequence[Inset], *, image_token: str, video_token: str | None) -> str:
    """Return the chat with one image placeholder for each run of visual tokens, and the text around the runs."""
    places = re.compile("|".join(re.escape(token) for token in (image_token, video_token) if token))
    found = places.findall(text)
    for kind, token, wanted in (
        ("image", image_token, sum(not inset.is_video for inset in insets)),
        ("video", video_token, sum(inset.is_video for inset in insets)),
    ):
        if found.count(token) != wanted:
            many = "" if wanted == 1 else "s"
            raise ShapeError(
                f"prompt: expected {wanted} {kind} token{many} {token!r} for {wanted} {kind}{many}, got"
                f" {found.count(token)}; remove it from your text, or use a chat template that places all {kind}s"
            )
    first, *rest = places.split(text)
    return first + "".join(image_token.join(inset.text) + piece for inset, piece in zip(insets, rest))


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ShapeError(
            f"prompt: expected valid Unicode, got a lone surrogate at character {error.start}; remove it"
        ) from error
