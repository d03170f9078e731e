"""A profile as one HTML page that needs nothing else: no script, no font, no network; the layout is that of predictions too."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING, Any

import jinja2
import msgspec

from trio_edge.profiling.page.figures import SCHEME
from trio_edge.profiling.page.plots import plots_of

if TYPE_CHECKING:
    from trio_edge.profiling.report.profile import ProfileReport

_PACKAGE = "trio_edge.profiling.page"


def page_html(report: ProfileReport) -> bytes:
    """Return the page of ``report``: summary, plots, tables, and every value of its JSON."""
    return render(
        f"{_PACKAGE}:page.html.j2", report=report, plots=plots_of(report), values=msgspec.to_builtins(report)
    )


def render(template: str, **values: Any) -> bytes:
    """Return the page that ``template`` makes.

    Args:
        template: Package and file, as ``trio_edge.profiling.page:page.html.j2``.
        **values: What the template reads, functions too.
    """
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_source),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["number"] = _number
    return environment.get_template(template).render(scheme=SCHEME, **values).encode()


def _source(name: str) -> str:
    package, _, file = name.partition(":")
    return files(package).joinpath(file).read_text(encoding="utf-8")


def _number(value: Any) -> str:
    """Return a number as the JSON writes it."""
    return msgspec.json.encode(value).decode()
