"""Messages to token ids: checked, put into the chat template, tokenized, without the places of the images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trio_edge.runtime.bundle.errors import ShapeError
from trio_edge.runtime.prompts.chat import render_chat

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from trio_edge.runtime.bundle.manifest import TextSpec
    from trio_edge.runtime.prompts.chat import Message
    from trio_edge.runtime.prompts.tokenizer import PromptIds, Tokenizer


def prompt_ids(
    messages: Sequence[Message],
    *,
    tokenizer: Tokenizer,
    template: str,
    text: TextSpec,
    insets: Sequence[Sequence[str]] | None = None,
) -> PromptIds:
    """Return the ids of a conversation's text.

    Args:
        messages: As ``build_messages`` makes them.
        tokenizer: The model's.
        template: Its chat template.
        text: Its tokens with a meaning.
        insets: For each image in order, what the prompt says before each of its runs of visual tokens and after the last
            (``ImageLayout.text``); None means one run without text for each.

    Raises:
        ShapeError: If a text holds a special token, or the template refuses the messages.
        BundleError: If the template is broken.
    """
    for part in _parts(messages):
        if part["type"] == "text":
            tokenizer.check_user_text(part["text"])
    rendered = render_chat(
        [{**message, "content": _without_images(message["content"])} for message in messages],
        template=template,
        special_tokens={"bos_token": text.bos_token, "eos_token": text.eos_token},
    )
    return tokenizer.encode_prompt(
        rendered,
        image_token=text.image_token,
        image_token_id=text.image_token_id,
        insets=[("", "")] * len(images_of(messages)) if insets is None else insets,
        bos_token=text.bos_token,
    )


def images_of(messages: Sequence[Message]) -> list[Any]:
    """Return the images of a conversation in order."""
    return [part.get("image") for part in _parts(messages) if part["type"] == "image"]


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
        raise ShapeError(f"messages: expected the last turn to be the user's, got {messages[-1]['role']!r}")


def _check_part(part: object, *, where: str) -> None:
    if not isinstance(part, dict) or part.get("type") not in ("text", "image"):
        raise ShapeError(
            f"{where}: expected parts of the type 'text' or 'image', got {_described(part)}; see docs/python.md"
        )
    if part["type"] == "text" and not isinstance(part.get("text"), str):
        raise ShapeError(
            f"{where}: expected text in a part of the type 'text', got {_described(part.get('text'))}"
        )
    if part["type"] == "image" and part.get("image") is None:
        raise ShapeError(f"{where}: expected an image in a part of the type 'image', got none")


def _parts(messages: Sequence[Message]) -> Iterator[dict[str, Any]]:
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            yield {"type": "text", "text": content}
        else:
            yield from content


def _without_images(content: Any) -> Any:
    """Return the content with parts that only say where an image stands."""
    return (
        content
        if isinstance(content, str)
        else [{"type": "image"} if part["type"] == "image" else part for part in content]
    )


def _described(value: object) -> str:
    return f"{value.get('type')!r}" if isinstance(value, dict) and "type" in value else type(value).__name__
