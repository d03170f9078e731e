"""The profile as one HTML page that needs nothing else: no script, no font, no network."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING, Any

import jinja2
import msgspec

from trio_edge.runtime.profiling.plots import plots_of

if TYPE_CHECKING:
    from trio_edge.runtime.profiling.report import Report

_PACKAGE, _TEMPLATE = "trio_edge.runtime.profiling", "page.html.j2"


def page_html(report: Report) -> bytes:
    """Return the page of ``report``: summary, plots, tables, and every value of its JSON."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["number"] = _number
    template = environment.from_string(files(_PACKAGE).joinpath(_TEMPLATE).read_text(encoding="utf-8"))
    page = template.render(report=report, plots=plots_of(report), values=msgspec.to_builtins(report))
    return page.encode()


def _number(value: Any) -> str:
    """Return a number as the JSON writes it."""
    return msgspec.json.encode(value).decode()
