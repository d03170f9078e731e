"""Chat templates: random ones of parts that real ones and hostile ones have, and changed real ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.fuzz.subject import Outcome, Subject, judged
from trio_edge.runtime.prompts.chat import build_messages, render_chat

if TYPE_CHECKING:
    import random

_ATOMS = (
    "messages", "messages[0]", "messages[0]['content']", "m", "m.role", "x", "ns.a", "ns", "'ab'", "''", "1", "0", "-3", "99999",
    "10 ** 9", "2 ** 99999", "1.5e308", "none", "true", "[1, 2]", "[[]]", "('a', 2)", "{'a': 1}", "range(99999)",
    "range(9)", "loop",
    "loop.index", "bos_token", "f", "cycler", "joiner(',')", "namespace(a=1)", "dict(a=2)", "self", "caller", "strftime_now('%Y')",
    "''.__class__", "messages.__len__", "varargs", "undefined_name", "'%s'", "'{0}{0}'", "'%99999999d'", "'\\u202e'", "'\\x1b[31m'",
)  # fmt: skip
_FILTERS = (
    "upper", "length", "list", "join", "join(x)", "first", "last", "string", "int", "float", "tojson", "tojson(indent=99999)",
    "replace('a', x)", "replace('', 'zzzz')", "map('upper')", "map(attribute='role')", "select('defined')",
    "selectattr('role', 'equalto', 'user')", "groupby('role')", "batch(3)", "batch(10 ** 9, 0)", "slice(10 ** 9)", "sort", "unique",
    "reverse", "sum", "sum(start=[])", "center(10 ** 9)", "indent(10 ** 9, true)", "trim", "safe", "escape", "format(x)",
    "dictsort",
    "items", "default(x)", "attr('__class__')", "min", "max", "abs", "round(99)", "truncate(10 ** 9)", "striptags", "urlize",
    "wordwrap(1)", "pprint", "random", "xmlattr", "title", "capitalize", "urlencode", "filesizeformat", "nothing",
)  # fmt: skip
_METHODS = (
    "ljust(10 ** 9)", "join(x)", "split('a')", "replace('', x)", "format(x, x)", "format_map(x)", "expandtabs(10 ** 9)",
    "zfill(99999)",
    "encode()", "append(1)", "items()", "get('a')", "update({})", "upper()", "__class__", "mro()", "translate({97: 'x' * 99999})",
    "startswith(x)", "strip()", "keys()", "index(1)", "count('a')", "splitlines()", "title()", "center(99999999)",
)  # fmt: skip
_OPERATORS = (
    "+",
    "-",
    "*",
    "/",
    "//",
    "%",
    "**",
    "~",
    "==",
    "<",
    "in",
    "not in",
    "and",
    "or",
    "is",
    "is not",
)
_TESTS = (
    "defined",
    "none",
    "string",
    "mapping",
    "sequence",
    "iterable",
    "callable",
    "equalto",
    "in",
    "odd",
    "divisibleby(0)",
)


def template(rng: random.Random, subject: Subject) -> Outcome:
    """A template, rendered for a short conversation."""
    text = _changed(rng, subject.template) if rng.random() < 0.3 else _statements(rng, 0)
    messages = build_messages("what?", images=[1], history=[("a", "b")] * rng.randrange(3))
    return judged(lambda: "ok" if render_chat(messages, template=text) is not None else "")


def _changed(rng: random.Random, text: str) -> str:
    for _ in range(rng.choice((1, 2, 4))):
        at = rng.randrange(len(text) + 1)
        piece = rng.choice(
            (
                _statements(rng, 2),
                _expression(rng, 2),
                "{% endfor %}",
                "{%",
                "}}",
                "'",
                "#}",
                "{% break %}",
                "(",
            )
        )
        text = text[:at] + piece + text[at + rng.choice((0, 1, 5, 30)) :]
    return text


def _statements(rng: random.Random, depth: int) -> str:
    return "".join(_statement(rng, depth) for _ in range(rng.choice((1, 1, 2, 3))))


def _statement(rng: random.Random, depth: int) -> str:
    value, kind = _expression(rng, 0), rng.randrange(12)
    if kind < 4 or depth > 3:
        return "{{ " + value + " }}"
    inner = _statements(rng, depth + 1)
    forms = (
        "{% for x in " + value + " %}" + inner + "{% endfor %}",
        "{% for m in messages %}" + inner + "{% else %}b{% endfor %}",
        "{% if " + value + " %}" + inner + "{% else %}" + inner + "{% endif %}",
        "{% set ns = namespace(a=" + value + ") %}" + inner,
        "{% for x in range(60) %}{% set ns.a = " + value + " %}{% endfor %}" + inner,
        "{% set x %}" + inner + inner + "{% endset %}{{ x }}{{ x }}",
        "{% macro f(x) %}" + inner + "{% endmacro %}{{ f(" + value + ") }}",
        "{% set x = " + value + " %}" + inner,
    )
    return forms[kind - 4]


def _expression(rng: random.Random, depth: int) -> str:
    kind = rng.randrange(9)
    if kind < 3 or depth > 3:
        return rng.choice(_ATOMS)
    left = _expression(rng, depth + 1)
    if kind == 3:
        return f"({left}) | {rng.choice(_FILTERS)}"
    if kind == 4:
        return f"({left}).{rng.choice(_METHODS)}"
    if kind == 5:
        return f"({left})[{rng.choice(('0', '-1', '1:', ':99', '::-1', _expression(rng, depth + 1)))}]"
    if kind == 6:
        return f"({left}) is {rng.choice(_TESTS)}"
    if kind == 7:
        return f"[{left}, {_expression(rng, depth + 1)}]"
    return f"({left}) {rng.choice(_OPERATORS)} ({_expression(rng, depth + 1)})"
