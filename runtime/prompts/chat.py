"""Turns messages into token ids: checks them, renders the checkpoint's Jinja chat template and tokenizes the result.

Environment and template variables are those of Hugging Face's ``apply_chat_template``, so the prompt is the same character
for character. Templates come from downloaded files: they run in a sandbox (``sandbox.py``), which bounds their time and
memory, and see plain JSON values only.

Source: transformers 5.23, utils/chat_template_utils.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

from trio_edge.runtime.bundle.errors import BundleError, PromptTooLongError, ShapeError
from trio_edge.runtime.bundle.limits import MOST_TOKENS
from trio_edge.runtime.prompts.sandbox import (
    MAX_PROMPT_CHARACTERS,
    Sandbox,
    TemplateRefusal,
    TooMuchError,
    budget,
)
from trio_edge.runtime.prompts.tokenizer import Inset

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import jinja2

    from trio_edge.runtime.bundle.manifest import TextSpec
    from trio_edge.runtime.prompts.tokenizer import PromptIds, Tokenizer

Message: TypeAlias = dict[str, Any]

_VISUAL = ("image", "video")
# A token of ordinary text has about four characters; the longest tokens of vocabularies are 128 blanks.
_CHARACTERS_PER_TOKEN = 32
_FEW_CHARACTERS = 16_384

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


LLAVA_ONEVISION_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ('system', 'user', 'assistant') %}" + _REFUSE_ROLE + "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML of LLaVA-OneVision, for checkpoints without a template."""

INTERNVL_TEMPLATE = LLAVA_ONEVISION_TEMPLATE.replace("<image>", "<IMG_CONTEXT>")
"""ChatML of InternVL3, for checkpoints without a template; the exporter adds the marks around the image."""

QWEN3_VL_TEMPLATE = LLAVA_ONEVISION_TEMPLATE.replace(
    "{{ '<image>\n' }}",
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif part['type'] == 'video' %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}",
)
"""ChatML of Qwen3-VL, which has no default system message."""

QWEN2_5_VL_TEMPLATE = QWEN3_VL_TEMPLATE.replace(
    "{% for message in messages %}",
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}",
)
"""ChatML with vision marks of Qwen2.5-VL, for checkpoints without a template."""

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

LFM2_VL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""``<|startoftext|><|im_start|>user\\n<image>…<|im_end|>\\n<|im_start|>assistant\\n``, for checkpoints without a template."""

MINICPM_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if not loop.first %}{{ '\n' }}{% endif %}"
    "{% if part['type'] == 'image' %}{{ '<|image_pad|>' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}"
)
"""ChatML of MiniCPM-V 4.6 with lines between parts and without thoughts, for checkpoints without a template."""

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

MISTRAL3_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] is string %}{% set text = message['content'] %}{% else %}"
    "{% set text %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '[IMG]' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endset %}{% endif %}"
    "{% if message['role'] == 'system' %}{{ '[SYSTEM_PROMPT]' + text + '[/SYSTEM_PROMPT]' }}"
    "{% elif message['role'] == 'user' %}{{ '[INST]' + text + '[/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ text + (eos_token or '</s>') }}"
    "{% else %}" + _REFUSE_ROLE + "{% endif %}{% endfor %}"
)
"""``[INST][IMG]…[/INST]`` of Ministral 3 and Mistral Small 3.1, for checkpoints without a template."""


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
    shown = [{"type": "image", "image": image} for image in images]
    shown += [{"type": "video", **video} for video in videos]
    for question, answer in history:
        messages += [_message("user", question, shown), _message("assistant", answer)]
        shown = []
    return [*messages, _message("user", prompt, shown)]


def _message(role: str, text: str, shown: Sequence[dict[str, Any]] = ()) -> Message:
    return {"role": role, "content": [*shown, {"type": "text", "text": text}]}


def check_messages(messages: object) -> None:
    """Raise ShapeError unless ``messages`` are a conversation whose last turn is the user's."""
    if not isinstance(messages, (list, tuple)) or not messages:
        kind = type(messages).__name__
        raise ShapeError(f"messages: expected a list of turns, got {kind}; write a question")
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ShapeError(f"{where}: expected a dict with 'role' and 'content', got {_described(message)}")
        content = message.get("content")
        if not isinstance(content, (str, list, tuple)):
            got = _described(content)
            raise ShapeError(f"{where}: expected text or a list of parts as content, got {got}")
        for part in () if isinstance(content, str) else content:
            _check_part(part, where=where)
    if messages[-1]["role"] != "user":
        got = messages[-1]["role"]
        raise ShapeError(f"messages: expected the last turn to be the user's, got {got!r}; add a question")


def _check_part(part: object, *, where: str) -> None:
    if not isinstance(part, dict) or part.get("type") not in ("text", *_VISUAL):
        raise ShapeError(
            f"{where}: expected parts of the type 'text', 'image' or 'video', got {_described(part)}; see docs/images-and-video.md"
        )
    kind = part["type"]
    if kind == "text" and not isinstance(part.get("text"), str):
        got = _described(part.get("text"))
        raise ShapeError(f"{where}: expected text in a part of the type 'text', got {got}")
    if kind in _VISUAL and part.get(kind) is None:
        raise ShapeError(f"{where}: expected {kind!r} in a part of the type {kind!r}, got none; add it")


def _described(value: object) -> str:
    return f"{value.get('type')!r}" if isinstance(value, dict) and "type" in value else type(value).__name__


def visual_parts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return the images and videos of a conversation in order."""
    return [part for part in _parts(messages) if part["type"] in _VISUAL]


def last_question(messages: Sequence[Message]) -> str:
    """Return the text of the last message."""
    return "\n".join(part["text"] for part in _parts(messages[-1:]) if part["type"] == "text")


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
        PromptTooLongError: If the text has more than ``max_tokens`` tokens.
        ShapeError: If a text holds a special token, or the template refuses the messages.
        BundleError: If the template is broken.
    """
    rendered = prompt_text(messages, tokenizer=tokenizer, template=template, text=text, max_tokens=max_tokens)
    if insets is None:
        insets = [Inset(is_video=part["type"] == "video") for part in visual_parts(messages)]
    ids = tokenizer.encode_prompt(rendered, text, insets)
    check_length(len(ids.text), max_tokens, "text tokens")
    return ids


def prompt_text(
    messages: Sequence[Message], *, tokenizer: Tokenizer, template: str, text: TextSpec, max_tokens: int
) -> str:
    """Return the rendered conversation of ``prompt_ids``, with a placeholder for each image and video; same errors."""
    most = max(_FEW_CHARACTERS, _CHARACTERS_PER_TOKEN * max_tokens)
    texts = [part["text"] for part in _parts(messages) if part["type"] == "text"]
    characters = f"characters for {max_tokens} text tokens"
    check_length(sum(map(len, texts)), most, characters)
    rendered = render_chat(
        [{**message, "content": _places(message["content"])} for message in messages],
        template=template,
        special_tokens={"bos_token": text.bos_token, "eos_token": text.eos_token},
    )
    check_length(len(rendered), most, characters)
    for written in texts:
        tokenizer.check_user_text(written)
    return rendered


def check_length(count: int, most: int, noun: str) -> None:
    """Raise PromptTooLongError if a prompt has more than ``most`` of ``noun``."""
    if count > most:
        raise PromptTooLongError(
            f"prompt: expected at most {most} {noun} (the largest bucket), got {count};"
            " shorten it or export with a larger --max-text"
        )


def render_chat(
    messages: Sequence[Message],
    *,
    template: str,
    special_tokens: Mapping[str, str] | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """Return the prompt text that the Jinja ``template`` renders for the messages, ending with the start of an answer.

    A content is a string or a list of ``{"type": "image"}`` and ``{"type": "text", "text": …}``. ``special_tokens`` are
    variables such as ``bos_token`` and ``eos_token``. Without ``add_generation_prompt`` no answer is started.

    Raises:
        BundleError: If the template is broken, or builds more than ``MAX_PROMPT_CHARACTERS``.
        ShapeError: If the template refuses the messages.
    """
    values = {"messages": messages, "add_generation_prompt": add_generation_prompt}
    return render(template, {**(special_tokens or {}), **values, "tools": None, "documents": None})


def render(template: str, values: Mapping[str, Any], *, what: str = "chat template") -> str:
    """Return the text that the Jinja ``template`` renders; ``what`` names it in errors, which are those of ``render_chat``."""
    compiled = compile_template(template, what=what)
    try:
        with budget():
            return "".join(_bounded(compiled.generate(_plain(values))))
    except Exception as error:  # a template can raise whatever Python code can
        raise _refusal(error, what) from error


def _refusal(error: Exception, what: str) -> ShapeError | BundleError:
    """Return our error for one that a template raised."""
    if isinstance(error, TemplateRefusal):
        return ShapeError(f"messages: refused by the {what}: {_one_line(error)}")
    if isinstance(error, TooMuchError):
        return BundleError(
            f"{what}: expected at most {MAX_PROMPT_CHARACTERS} characters of text and some seconds of work, got"
            " more; export the checkpoint with another template"
        )
    text = f"{what}: expected it to render, got {_one_line(error)}; export with another template"
    return BundleError(text)


def _bounded(pieces: Iterable[str]) -> Iterator[str]:
    """Yield the pieces of a text; raise TooMuchError when it becomes too long, as for an endless template."""
    num_characters = 0
    for piece in pieces:
        num_characters += len(piece)
        if num_characters > MAX_PROMPT_CHARACTERS:
            raise TooMuchError
        yield piece


@lru_cache(maxsize=16)  # compiling takes milliseconds, and each question renders the same template
def compile_template(template: str, *, what: str = "chat template") -> jinja2.Template:
    """Return the compiled template, which errors call ``what``.

    Raises:
        BundleError: If it is no valid Jinja text.
    """
    try:
        with budget():  # constants are computed here
            return Sandbox().from_string(template)
    except Exception as error:  # syntax errors, and recursion or overflow in hostile templates
        raise BundleError(
            f"{what}: expected valid Jinja text, got {_one_line(error)}; export with another template"
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
