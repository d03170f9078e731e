"""The sandbox of chat templates: Hugging Face's Jinja sandbox, with a bound on a template's time and memory.

Jinja's own sandbox keeps a template away from the interpreter, but nested loops can run for hours and doubled strings can
fill the machine. Here everything that takes time or memory is paid from a budget: loops by their length, and operators,
filters, tests, calls and literals by the sizes of their arguments and results. Results that can outgrow their arguments
are estimated beforehand. No clock is read, so a template is refused on every machine or on none.
"""

from __future__ import annotations

import functools
import json
import re
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple, cast, final

import jinja2
import jinja2.runtime
import jinja2.utils
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from jinja2.parser import Parser

MAX_PROMPT_CHARACTERS = 4_000_000
"""Longest text and largest value of a template, in characters and elements."""
# The unit is about a nanosecond on a slow processor; characters cost more, because they take memory too.
_BUDGET = 1_000_000_000
_CHARACTER, _ELEMENT, _STEP, _CALL = 20, 1000, 300, 5000
"""Prices of reading or building a character or an element, of a step of a loop, and of a call."""
_MOST_BITS = 100_000  # of a whole number
# Filters whose time grows faster than their input, or that are random; no chat needs them.
_LEFT_OUT = ("urlize", "striptags", "wordwrap", "xmlattr", "pprint", "random", "wordcount", "filesizeformat")
_LONG_WIDTH = re.compile(r"\d{5,}|\*")
_GROWING = frozenset({
    "replace", "join", "translate", "format", "format_map", "ljust", "rjust", "center", "zfill", "expandtabs", "indent",
    "tojson", "batch", "slice",
})  # fmt: skip
"""Methods of strings, and filters, whose result can be larger than their arguments."""


class TemplateRefusal(jinja2.TemplateError):
    """The template called ``raise_exception``."""


class TooMuchError(Exception):
    """A template computes or builds more than it may."""


@final
class _Budget:
    """The rest of a rendering's budget."""

    def __init__(self) -> None:
        self._left = _BUDGET

    def pay(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise TooMuchError

    def pay_for_call(self, args: Iterable[Any], *, can_grow: bool) -> None:
        """Pay for the arguments. A result that can grow has at most the size of the product of the two largest arguments."""
        weights = [_weight(arg) for arg in args]
        self.pay(_CALL + sum(weight.price for weight in weights))
        if can_grow:
            numbers = [abs(arg) for arg in args if isinstance(arg, int)]
            second, first = sorted([0, 0, *map(sum, weights), *numbers])[-2:]
            if (first + 1) * (second + 1) > 16 * MAX_PROMPT_CHARACTERS:
                raise TooMuchError


_budget: ContextVar[_Budget] = ContextVar("budget of the template that is rendered")


@contextmanager
def budget() -> Iterator[None]:
    """Provide a budget for compiling or rendering a template in the block."""
    token = _budget.set(_Budget())
    try:
        yield
    finally:
        _budget.reset(token)


class _Weight(NamedTuple):
    """Size of a value including its elements; repeated elements count each time."""

    characters: int
    elements: int

    @property
    def price(self) -> int:
        return _CHARACTER * self.characters + _ELEMENT * self.elements


def _weight(value: Any) -> _Weight:
    """Return the size of a value; raise TooMuchError if no prompt may be as large, and TypeError if it holds a namespace."""
    characters, elements, values = 0, 0, [value]
    while values:
        item = values.pop()
        if isinstance(item, (str, bytes)):
            characters += len(item)
        elif isinstance(item, (list, tuple, set, frozenset)):
            elements += len(item)
            values.extend(item)
        elif isinstance(item, dict):
            elements += 2 * len(item)
            values.extend(item)
            values.extend(item.values())
        elif isinstance(item, int) and item.bit_length() > _MOST_BITS:
            raise TooMuchError
        elif isinstance(item, _Namespace) and item is not value:
            # Its values can change later, and so would the size of the value that holds it.
            raise TypeError("expected a namespace by itself, got one inside another value")
        weight = _Weight(characters, elements)
        # Said before the whole value is read.
        if sum(weight) > MAX_PROMPT_CHARACTERS or weight.price > _BUDGET:
            raise TooMuchError
    return _Weight(characters, elements)


@final
class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of ``apply_chat_template`` with a budget."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
        self.filters["tojson"] = _tojson
        for name in _LEFT_OUT:
            del self.filters[name]
        self.filters = {name: _paid(function, name=name) for name, function in self.filters.items()}
        self.tests = {name: _paid(cast("Any", test), name=name) for name, test in self.tests.items()}
        # Names with a blank, which no template can write.
        self.filters |= {"counted ": _counted, "joined ": _joined, "read ": _read}
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda text: datetime.now().strftime(text)
        # Jinja's own versions give templates access to attributes of Python classes.
        self.globals["dict"] = _Dict()
        self.globals["namespace"] = _Namespace

    def concat(self, parts: Iterable[str]) -> str:
        """Join the text of a macro, a block or a ``set`` block."""
        pieces = list(parts)
        _budget.get().pay(_CHARACTER * sum(map(len, pieces)))
        return str(_read("".join(pieces)))

    def call_binop(self, context: jinja2.runtime.Context, operator_name: str, left: Any, right: Any) -> Any:
        """Compute an operator; results of ``*``, ``**`` and ``%`` can be larger than the operands."""
        is_power = operator_name == "**" and isinstance(left, int) and isinstance(right, int)
        if is_power and left.bit_length() * right > _MOST_BITS:
            raise TooMuchError
        if operator_name == "%":
            _check_widths(left)
        are_numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
        can_grow = operator_name in ("*", "%") and not are_numbers
        _budget.get().pay_for_call((left, right), can_grow=can_grow)
        return _read(super().call_binop(context, operator_name, left, right))

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Look something up; hashing a tuple takes as long as reading it."""
        if not isinstance(argument, (str, int)):
            _read(argument)
        return super().getitem(obj, argument)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805  # jinja2's own names
        """Call a function, a macro or a method."""
        method = getattr(__obj, "__wrapped__", __obj)
        receiver = getattr(method, "__self__", None)
        is_text = isinstance(receiver, str)
        if is_text and method.__name__ in ("format", "format_map"):
            _check_widths(receiver)
        given = ([receiver] if is_text else []) + [*args, *kwargs.values()]
        _budget.get().pay_for_call(given, can_grow=is_text and method.__name__ in _GROWING)
        return _read(super().call(__context, __obj, *args, **kwargs))

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_Payments().visit(source), *args, **kwargs)


class _Payments(NodeTransformer):
    """Adds paying filters to a template: around iterables of loops, compared values, literals, slices and ``~``."""

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        """Return ``node`` with payments for what it holds and for itself."""
        if isinstance(node, nodes.For) and node.recursive:
            raise jinja2.TemplateSyntaxError("recursive loops are not supported", node.lineno)
        self.generic_visit(node, *args, **kwargs)
        if isinstance(node, nodes.For):
            node.iter = _filtered(node.iter, "counted ")
        elif isinstance(node, (nodes.Compare, nodes.Operand)):
            node.expr = _filtered(node.expr, "read ")
        elif isinstance(node, nodes.Concat):
            return _filtered(nodes.List(node.nodes, lineno=node.lineno), "joined ")
        is_slice = isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
        is_read = is_slice or isinstance(node, (nodes.List, nodes.Dict, nodes.Tuple))
        return _filtered(node, "read ") if is_read and getattr(node, "ctx", "load") == "load" else node


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _counted(values: Any) -> Any:
    """Return the iterable of a loop, whose steps are paid for."""
    spent = _budget.get()
    if hasattr(values, "__len__"):
        spent.pay(_STEP * (1 + len(values)))
        return values

    def paid() -> Iterator[Any]:
        for value in values:
            spent.pay(_STEP)
            yield value

    return paid()


def _joined(values: list[Any]) -> str:
    _read(values)
    return str(_read("".join(map(str, values))))


def _read(value: Any) -> Any:
    """Return ``value`` after paying for its size."""
    _budget.get().pay(_weight(value).price)
    return value


def _paid(function: Callable[..., Any], *, name: str) -> Callable[..., Any]:
    """Return a filter or test whose arguments and result are paid for."""
    num_own = 1 if hasattr(function, "jinja_pass_arg") else 0  # Jinja gives it its environment first

    @functools.wraps(function)  # which keeps that mark
    def run(*args: Any, **kwargs: Any) -> Any:
        given = [*args[num_own:], *kwargs.values()]
        if name == "sum" and not all(isinstance(arg, (int, float, str, type(None))) for arg in given[1:]):
            raise TypeError("sum: expected a number to start from")
        if name == "format":
            _check_widths(given[0])
        if name in _GROWING and not hasattr(given[0], "__len__"):
            given[0] = list(given[0])  # otherwise its length is not known
            args = (*args[:num_own], given[0], *args[num_own + 1 :])
        _budget.get().pay_for_call(given, can_grow=name in _GROWING)
        return _read(function(*args, **kwargs))

    return run


def _check_widths(template: Any) -> None:
    """Raise TooMuchError if a format has a width of five or more digits, or takes a width from its arguments."""
    if isinstance(template, str) and _LONG_WIDTH.search(template):
        raise TooMuchError


class _GenerationTag(Extension):
    """``{% generation %}…{% endgeneration %}``, which marks answers in training, renders its body."""

    tags = {"generation"}  # noqa: RUF012  # jinja2's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without underscore names, which give access to the interpreter."""

    def __init__(*args: Any, **values: Any) -> None:  # jinja2's own signature: "self" may be a name
        self, *rest = args
        attributes = dict(*rest, **values)
        for name, value in attributes.items():
            _check_attribute(name, value)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name, value)
        super().__setitem__(name, value)


def _check_attribute(name: object, value: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} starts with an underscore")
    _read([value])


class _Dict:
    """``dict`` for templates, without the class's other attributes."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Return plain JSON; Jinja's own filter escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: object) -> None:
    raise TemplateRefusal(str(message))
