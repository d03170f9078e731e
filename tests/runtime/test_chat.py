import resource
from datetime import datetime

import numpy as np
import pytest
import transformers
from transformers.utils.chat_template_utils import render_jinja_template

from trio_edge.runtime.bundle.errors import BundleError, ShapeError
from trio_edge.runtime.prompts.chat import MISTRAL_TEMPLATE, VICUNA_TEMPLATE, build_messages, render_chat

# llava-hf's own template of LLaVA-1.5, with the training tag that transformers adds to Jinja
LLAVA_HF_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
TEMPLATES = {
    "vicuna": VICUNA_TEMPLATE,
    "mistral": MISTRAL_TEMPLATE,
    "llava-hf": LLAVA_HF_TEMPLATE,
    "bos and json": "{{ bos_token }}{{ messages | tojson(indent=2) }}{{ tools is none }}",
    "loop controls": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "trimmed blocks": "a\n  {% if true %}\n  b\n  {% endif %}\nc\n",
    "namespace and dict": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
    "{{ ns.n }}{{ dict(a=1) }}{{ dict.fromkeys('ab') }}",
    "undefined variable": "{{ nothing }}{{ messages[9] }}",
    "what reasoning models use": (
        "{%- macro shown(content, is_last=false) -%}"
        "{%- if content is string %}{{ content }}{%- elif content is iterable and content is not mapping %}"
        "{%- for part in content if part.type == 'text' %}{{ part.text ~ ('.' if is_last else ',') }}{%- endfor %}{%- endif %}"
        "{%- endmacro %}"
        "{%- set ns = namespace(last=messages | length - 1, found=false) %}"
        "{%- for message in messages[::-1] %}{%- set index = (messages | length - 1) - loop.index0 %}"
        "{%- if message.role == 'user' and not ns.found %}{%- set ns.found = true %}{%- set ns.last = index %}"
        "{%- endif %}{%- endfor %}"
        "{%- for message in messages %}"
        "{%- set text = shown(message.content, is_last=loop.last) | trim %}"
        "{%- if '</think>' in text %}{%- set text = text.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
        "{{ loop.index ~ '/' ~ loop.length ~ ' ' ~ loop.revindex0 ~ loop.cycle('a', 'b') }}"
        "{{ text[:3] + '|' + text[3:] if text | length > 3 else text }}{{ '%s-%d' % (message.role, 7) }}"
        "{{ '{:>5}'.format(message.role) }}{{ [1, 2] + [3] }}{{ (1, 'a') }}{{ {'a': [1]} }}{{ 2 ** 3 // 3 % 2 * 4 - 1 }}"
        "{{ message.keys() | list | sort | join('+') }}{{ text.replace('a', '') | upper }}{{ 1 < 2 <= 2 }}"
        "{%- set block %}<{{ text }}>{% endset %}{{ block }}{{ loop.index0 == ns.last }}"
        "{%- macro twice() %}{{ caller() }}{{ caller() }}{% endmacro %}{% call twice() %}z{% endcall %}"
        "{{ loop.previtem is defined }}{{ loop.changed(message.role) }}\n{%- endfor %}"
    ),
}
CONVERSATION = [
    {"role": "system", "content": [{"type": "text", "text": 'Be <brief> & "kind" – 你好'}]},
    {"role": "user", "content": [{"type": "image", "image": np.zeros(3)}, {"type": "text", "text": "What?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
]


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_rendering_equals_hugging_face(name, add_generation_prompt):
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    if name == "bos and json" and tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 21):
        pytest.skip(
            "transformers 5.20, the last one for Python 3.10, cannot print a pixel array; runs on 3.11 and later"
        )
    expected, _ = render_jinja_template(
        [CONVERSATION], chat_template=TEMPLATES[name], add_generation_prompt=add_generation_prompt, **tokens
    )
    ours = render_chat(
        CONVERSATION,
        template=TEMPLATES[name],
        special_tokens=tokens,
        add_generation_prompt=add_generation_prompt,
    )
    assert ours == expected[0]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (VICUNA_TEMPLATE, "USER: <image>\nWhat? ASSISTANT:"),
        (MISTRAL_TEMPLATE, "[INST] <image>\nWhat? [/INST]"),
    ],
    ids=["vicuna", "mistral"],
)
def test_the_fallback_templates_give_llavas_prompt(template, expected):
    assert render_chat(build_messages("What?", images=[None]), template=template) == expected


@pytest.mark.parametrize("template", [VICUNA_TEMPLATE, MISTRAL_TEMPLATE], ids=["vicuna", "mistral"])
def test_the_fallback_templates_take_plain_strings(template):
    conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in conversation]
    assert render_chat(conversation, template=template) == render_chat(parts, template=template)


def test_the_time_is_available_to_templates():
    assert render_chat([], template="{{ strftime_now('%Y') }}") == str(datetime.now().year)


def test_the_image_goes_into_the_first_user_message():
    messages = build_messages("c", images=["x"], history=[("a", "b")], system="s")
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert messages[1]["content"] == [{"type": "image", "image": "x"}, {"type": "text", "text": "a"}]
    assert messages[3]["content"] == [{"type": "text", "text": "c"}]


def test_a_template_that_refuses_the_messages_is_the_users_error():
    with pytest.raises(ShapeError, match=r"refused by the chat template: .*roles must alternate"):
        render_chat([], template="{{ raise_exception('roles must\nalternate') }}")
    with pytest.raises(ShapeError, match="got tool"):
        render_chat([{"role": "tool", "content": "x"}], template=VICUNA_TEMPLATE)


@pytest.mark.parametrize(
    "template",
    [
        "{% if %}",
        "{{ messages[0].nothing.more }}",
        "{{ 1 / 0 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__.keys() }}",
        "{% set ns = namespace(_a=1) %}",
        "{% set ns = namespace() %}{% set ns._a = 1 %}",
        "{{ range(10 ** 9) | list }}",
        "{% include '/etc/passwd' %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ],
)
def test_a_broken_or_hostile_template_is_one_error_line(template):
    with pytest.raises(BundleError, match=r"^chat template: ") as caught:
        render_chat([{"role": "user"}], template=template)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10 ** 12 }}",
        "{{ 10 ** (10 ** 9) }}",
        "{{ 10 ** 12 * 'a' }}",
        "{% for i in range(9999) %}{% for j in range(9999) %}{{ 'abc' }}{% endfor %}{% endfor %}",
    ],
)
def test_output_and_repetition_are_bounded(template):
    _refuses_soon(template)


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(100) }}",
        "{% set ns = namespace(a='ab') %}{% for i in range(40) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}{{ ns.a | length }}",
        "{% set ns = namespace(a='ab') %}{% for i in range(40) %}{% set ns.a = ns.a + ns.a %}{% endfor %}",
        (
            "{% set ns = namespace(a='ab') %}{% for i in range(40) %}{% set x %}{{ ns.a }}{{ ns.a }}{% endset %}"
            "{% set ns.a = x %}{% endfor %}"
        ),
        "{% set ns = namespace(a=[1]) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}{{ ns.a == ns.a }}",
        "{% set ns = namespace(a=(1,)) %}{% for i in range(60) %}{% set ns.a = (ns.a, ns.a) %}{% endfor %}{{ {ns.a: 1} }}",
        "{% set ns = namespace(a=1) %}{% for i in range(60) %}{% set b = namespace(x=1) %}{% set b.y = [ns, ns] %}{% endfor %}",
        "{{ 'x'.ljust(10 ** 9) }}",
        "{{ 'x' | center(10 ** 9) }}",
        "{{ 'x' | indent(10 ** 9, first=true) }}",
        "{{ ('x' * 100000).replace('', 'y' * 100000) }}",
        "{{ ('x' * 100000).join(range(9999) | map('string')) | length }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (10 ** 9, 1) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '{:{}}'.format(1, 10 ** 9) }}",
        "{{ [1] | batch(10 ** 9, 0) | list }}",
        "{{ 'x' | tojson(indent=10 ** 9) }}",
        "{{ 'a\tb'.expandtabs(10 ** 9) }}",
        "{% set ns = namespace(n=7) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
        "{% set s = 'ab' * 1000000 %}{% for i in range(9999) %}{% set t = s[1:] %}{% endfor %}",
        "{% set s = 'ab' * 1000000 %}{% for i in range(9999) %}{% if s == s ~ '' %}{% endif %}{% endfor %}",
        "{% set s = ('ab,' * 1000000) %}{% for i in range(9999) %}{% set t = s.split(',') %}{% endfor %}",
        "{{ range(9999) | map('list') | list }}",
        "{{ ([[1]] * 99999) | sum(start=[]) }}",
        "{{ ('<' * 4000000) | striptags }}",
        "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
        "{{ lipsum(n=99999) }}",
    ],
)
def test_a_template_that_would_take_hours_or_all_memory_is_one_error_line(template):
    _refuses_soon(template)


def _refuses_soon(template):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BundleError, match=r"^chat template: "):
        render_chat([{"role": "user", "content": "hi"}], template=template)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1e6  # KiB
