"""A question to token ids: checked, put into the chat template, tokenized and split at the image's place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trio_edge.runtime.prompts.chat import build_messages, render_chat

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio_edge.runtime.bundle.manifest import TextSpec
    from trio_edge.runtime.prompts.tokenizer import PromptIds, Tokenizer


def question_ids(
    prompt: str,
    *,
    tokenizer: Tokenizer,
    template: str,
    text: TextSpec,
    has_image: bool,
    history: Sequence[tuple[str, str]] = (),
    system: str | None = None,
) -> PromptIds:
    """Return the ids of one question.

    Args:
        prompt: The user's text.
        tokenizer: The model's.
        template: Its chat template.
        text: Its tokens with a meaning.
        has_image: Whether there is an image.
        history: Earlier (question, answer) turns.
        system: System prompt, if any.

    Raises:
        ShapeError: If a text holds a special token, or the template refuses it.
        BundleError: If the template is broken.
    """
    for user_text in (prompt, system or "", *(turn for pair in history for turn in pair)):
        tokenizer.check_user_text(user_text)
    turns = [
        {"role": role, "content": content}
        for pair in history
        for role, content in zip(("user", "assistant"), pair)
    ]
    rendered = render_chat(
        build_messages(prompt, has_image=has_image, history=turns, system=system),
        template=template,
        special_tokens={"bos_token": text.bos_token, "eos_token": text.eos_token},
    )
    return tokenizer.encode_prompt(
        rendered,
        image_token=text.image_token,
        image_token_id=text.image_token_id,
        has_image=has_image,
        bos_token=text.bos_token,
    )
