"""Turns messages into token ids: checks them, renders the chat template and tokenizes the result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trio_edge.runtime.bundle.errors import PromptTooLongError, ShapeError
from trio_edge.runtime.bundle.limits import MOST_TOKENS
from trio_edge.runtime.prompts.chat import render_chat
from trio_edge.runtime.prompts.tokenizer import Inset

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from trio_edge.runtime.bundle.manifest import TextSpec
    from trio_edge.runtime.prompts.chat import Message
    from trio_edge.runtime.prompts.tokenizer import PromptIds, Tokenizer


_VISUAL = ("image", "video")
# A token of ordinary text has about four characters; the longest tokens of vocabularies are 128 blanks.
_CHARACTERS_PER_TOKEN = 32
_FEW_CHARACTERS = 16_384


def prompt_ids(
    messages: Sequence[Message],
    *,
    tokenizer: Tokenizer,
    template: str,
    text: TextSpec,
    insets: Sequence[Inset] | None = None,
    max_tokens: int = MOST_TOKENS,
) -> PromptIds:
    """Return the ids of a conversation's text; ``messages`` have the form of ``build_messages``.

    ``insets`` are the texts that replace images and videos, in order; None means one run without text for each. A text
    that is far longer than ``max_tokens`` is refused before it is tokenized, which would take long.

    Raises:
        ShapeError: If a text holds a special token or is far too long, or the template refuses the messages.
        BundleError: If the template is broken.
    """
    most = max(_FEW_CHARACTERS, _CHARACTERS_PER_TOKEN * max_tokens)
    texts = [part["text"] for part in _parts(messages) if part["type"] == "text"]
    _check_length(sum(map(len, texts)), most=most, max_tokens=max_tokens)
    for written in texts:
        tokenizer.check_user_text(written)
    rendered = render_chat(
        [{**message, "content": _places(message["content"])} for message in messages],
        template=template,
        special_tokens={"bos_token": text.bos_token, "eos_token": text.eos_token},
    )
    _check_length(len(rendered), most=most, max_tokens=max_tokens)
    if insets is None:
        insets = [Inset(is_video=part["type"] == "video") for part in visual_parts(messages)]
    return tokenizer.encode_prompt(
        rendered,
        image_token=text.image_token,
        image_token_id=text.image_token_id,
        video=None if text.video_token is None else (text.video_token, text.video_token_id or 0),
        insets=insets,
        bos_token=text.bos_token,
    )


def _check_length(num_characters: int, *, most: int, max_tokens: int) -> None:
    if num_characters > most:
        raise PromptTooLongError(
            f"prompt: expected at most {most} characters for {max_tokens} text tokens (the largest bucket), got"
            f" {num_characters}; shorten it or export with a larger --max-text"
        )


def visual_parts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return the images and videos of a conversation in order."""
    return [part for part in _parts(messages) if part["type"] in _VISUAL]


def last_question(messages: Sequence[Message]) -> str:
    """Return the text of the last message."""
    return "\n".join(part["text"] for part in _parts(messages[-1:]) if part["type"] == "text")


def check_messages(messages: object) -> None:
    """Raise ShapeError unless ``messages`` are a conversation whose last turn is the user's."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ShapeError(
            f"messages: expected a list of turns, got {type(messages).__name__}; write a question"
        )
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ShapeError(f"{where}: expected a dict with 'role' and 'content', got {_described(message)}")
        content = message.get("content")
        if not isinstance(content, (str, list, tuple)):
            raise ShapeError(
                f"{where}: expected text or a list of parts as content, got {_described(content)}"
            )
        for part in () if isinstance(content, str) else content:
            _check_part(part, where=where)
    if messages[-1]["role"] != "user":
        raise ShapeError(
            f"messages: expected the last turn to be the user's, got {messages[-1]['role']!r}; add a question"
        )


def _check_part(part: object, *, where: str) -> None:
    if not isinstance(part, dict) or part.get("type") not in ("text", *_VISUAL):
        raise ShapeError(
            f"{where}: expected parts of the type 'text', 'image' or 'video', got {_described(part)}; see docs/images-and-video.md"
        )
    kind = part["type"]
    if kind == "text" and not isinstance(part.get("text"), str):
        raise ShapeError(
            f"{where}: expected text in a part of the type 'text', got {_described(part.get('text'))}"
        )
    if kind in _VISUAL and part.get(kind) is None:
        raise ShapeError(f"{where}: expected {kind!r} in a part of the type {kind!r}, got none; add it")


def _parts(messages: Sequence[Message]) -> Iterator[dict[str, Any]]:
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            yield {"type": "text", "text": content}
        else:
            yield from content


def _places(content: Any) -> Any:
    """Return the content with placeholders for images and videos."""
    if isinstance(content, str):
        return content
    return [{"type": part["type"]} if part["type"] in _VISUAL else part for part in content]


def _described(value: object) -> str:
    return f"{value.get('type')!r}" if isinstance(value, dict) and "type" in value else type(value).__name__
