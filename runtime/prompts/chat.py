"""Renders messages as prompt text, with the checkpoint's Jinja chat template in a sandbox.

Environment and template variables are those of Hugging Face's ``apply_chat_template``, so the prompt is the same character
for character. Templates come from downloaded files: they run in a sandbox (``sandbox.py``), which bounds their time and
memory, and see plain JSON values only.

Source: transformers 5.23, utils/chat_template_utils.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

from trio_edge.runtime.bundle.errors import BundleError, ShapeError
from trio_edge.runtime.prompts.sandbox import (
    MAX_PROMPT_CHARACTERS,
    Sandbox,
    TemplateRefusal,
    TooMuchError,
    budget,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import jinja2

Message: TypeAlias = dict[str, Any]

_TEXTS = "message['content'] | selectattr('type', 'equalto', 'text')"
_IMAGES = (
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
)
_REFUSE_ROLE = "{{ raise_exception('expected roles system, user and assistant, got ' + message['role']) }}"

VICUNA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' }}"
    "{% elif message['role'] != 'system' %}" + _REFUSE_ROLE + "{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}{% else %}"
    + _IMAGES
    + "{% for part in "
    + _TEXTS
    + " %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""``USER: <image>\\n… ASSISTANT:`` of LLaVA-1.5 and LLaVA-NeXT (Vicuna), for checkpoints without a template."""


def _chatml(image: str, *, video: str = "", first: str = "") -> str:
    """Return a ChatML template with ``image`` and ``video`` as placeholders, and ``first`` before all messages."""
    return (
        "{% for message in messages %}"
        + first
        + "{% if message['role'] not in ('system', 'user', 'assistant') %}"
        + _REFUSE_ROLE
        + "{% endif %}"
        "{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}{{ '"
        + image
        + "' }}"
        + (video and "{% elif part['type'] == 'video' %}{{ '" + video + "' }}")
        + "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


_VISION_MARKS = "<|vision_start|>{}<|vision_end|>"

QWEN2_5_VL_TEMPLATE = _chatml(
    _VISION_MARKS.format("<|image_pad|>"),
    video=_VISION_MARKS.format("<|video_pad|>"),
    first="{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}",
)
"""ChatML with vision marks of Qwen2.5-VL, for checkpoints without a template."""

QWEN3_VL_TEMPLATE = _chatml(
    _VISION_MARKS.format("<|image_pad|>"), video=_VISION_MARKS.format("<|video_pad|>")
)
"""ChatML of Qwen3-VL, which has no default system message."""

INTERNVL_TEMPLATE = _chatml("<IMG_CONTEXT>\n")
"""ChatML of InternVL3, for checkpoints without a template; the exporter adds the marks around the image."""

LLAVA_ONEVISION_TEMPLATE = _chatml("<image>\n")
"""ChatML of LLaVA-OneVision, for checkpoints without a template."""

SMOLVLM_TEMPLATE = (
    "{{ '<|im_start|>' }}{% for message in messages %}"
    "{% if message['role'] not in ('system', 'user', 'assistant') %}" + _REFUSE_ROLE + "{% endif %}"
    "{{ message['role'] | capitalize + ':' }}"
    "{% if message['content'] is string %}{{ ' ' + message['content'] }}{% else %}"
    "{% if message['content'][0]['type'] != 'image' %}{{ ' ' }}{% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<end_of_utterance>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""``<|im_start|>User:<image>…<end_of_utterance>\\nAssistant:`` of SmolVLM2, for checkpoints without a template."""

MISTRAL_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] is string %}{% set text = message['content'] %}{% else %}"
    "{% set text = " + _TEXTS + " | map(attribute='text') | join('') %}{% endif %}"
    "{% if message['role'] == 'system' %}{{ '<<SYS>>\n' + text + '\n<</SYS>>\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% if message['content'] is not string %}" + _IMAGES + "{% endif %}{{ text + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + text + (eos_token or '</s>') + ' ' }}"
    "{% else %}" + _REFUSE_ROLE + "{% endif %}{% endfor %}"
)
"""``[INST] <image>\\n… [/INST]`` of LLaVA-NeXT (Mistral), for checkpoints without a template."""


def build_messages(
    prompt: str,
    *,
    images: Sequence[Any] = (),
    videos: Sequence[Mapping[str, Any]] = (),
    history: Sequence[tuple[str, str]] = (),
    system: str | None = None,
) -> list[Message]:
    """Return the messages of one question: system prompt, earlier (question, answer) turns, then the user's text.

    Images and videos come before the text of the first question. Each video has a "video" and its own settings.
    """
    messages = [] if system is None else [_message("system", system)]
    questions = [*(question for question, _ in history), prompt]
    answers = [answer for _, answer in history]
    for turn, question in enumerate(questions):
        shown = [{"type": "image", "image": image} for image in images]
        shown += [{"type": "video", **video} for video in videos]
        messages.append(_message("user", question, shown=shown if turn == 0 else ()))
        if turn < len(answers):
            messages.append(_message("assistant", answers[turn]))
    return messages


def _message(role: str, text: str, *, shown: Sequence[dict[str, Any]] = ()) -> Message:
    return {"role": role, "content": [*shown, {"type": "text", "text": text}]}


def render_chat(
    messages: Sequence[Message],
    *,
    template: str,
    special_tokens: Mapping[str, str] | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """Return the prompt text that the template renders for the messages.

    Args:
        messages: ``{"role", "content"}``, content a string or a list of ``{"type": "image"}`` and
            ``{"type": "text", "text": …}``.
        template: Jinja text.
        special_tokens: Variables such as ``bos_token`` and ``eos_token``.
        add_generation_prompt: End with the start of the assistant's answer.

    Raises:
        BundleError: If the template is broken, or builds more than ``MAX_PROMPT_CHARACTERS``.
        ShapeError: If the template refuses the messages.
    """
    compiled = compile_template(template)
    values = {
        **(special_tokens or {}),
        "messages": messages,
        "tools": None,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        with budget():
            return "".join(_bounded(compiled.generate(_plain(values))))
    except TemplateRefusal as error:
        raise ShapeError(f"messages: refused by the chat template: {_one_line(error)}") from error
    except TooMuchError as error:
        raise BundleError(
            f"chat template: expected at most {MAX_PROMPT_CHARACTERS} characters of text and some seconds of work, got"
            " more; export the checkpoint with another template"
        ) from error
    except Exception as error:  # a template can raise whatever Python code can
        raise BundleError(
            f"chat template: expected it to render, got {_one_line(error)}; export with another template"
        ) from error


def _bounded(pieces: Iterable[str]) -> Iterator[str]:
    """Yield the pieces of a text; raise TooMuchError when it becomes too long, as for an endless template."""
    num_characters = 0
    for piece in pieces:
        num_characters += len(piece)
        if num_characters > MAX_PROMPT_CHARACTERS:
            raise TooMuchError
        yield piece


@lru_cache(maxsize=16)  # compiling takes milliseconds, and each question renders the same template
def compile_template(template: str) -> jinja2.Template:
    """Return the compiled template.

    Raises:
        BundleError: If it is no valid Jinja text.
    """
    try:
        with budget():  # constants are computed here
            return Sandbox().from_string(template)
    except Exception as error:  # syntax errors, and recursion or overflow in hostile templates
        raise BundleError(
            f"chat template: expected valid Jinja text, got {_one_line(error)}; export with another template"
        ) from error


def _plain(value: Any) -> Any:
    """Return ``value`` as JSON types only, because a template could call methods of images, arrays and other objects."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for plain_type in (str, int, float):
        if isinstance(value, plain_type):
            return plain_type(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return f"<{type(value).__name__}>"


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
