"""Progress of a long command: a bar for each step, and warnings, on standard error."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@dataclass(frozen=True, kw_only=True)
class StepProgress:
    """Callbacks for a progress display."""

    step: Callable[[str, int], None] = lambda _text, _samples: None
    """Called with a step's name and number of samples, 0 if it has none, when it begins."""
    sample: Callable[[], None] = lambda: None
    """Called after each sample."""
    warn: Callable[[str], None] = lambda _text: None
    """Called with one line for the user."""


SILENT = StepProgress()


@contextmanager
def progress_bars(
    command: str, *, quiet: bool, check: Callable[[], None] = lambda: None
) -> Iterator[StepProgress]:
    """Yield callbacks that show a bar for each step of ``command``; ``check`` is called often and may raise."""
    console = Console(stderr=True, quiet=quiet)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=quiet) as bars:
        bar = bars.add_task("", total=None)

        def step(text: str, total: int) -> None:
            check()
            bars.reset(bar, total=total or None, description=text)
            if not console.is_terminal:
                console.print(text, markup=False, highlight=False)

        def sample() -> None:
            check()
            bars.advance(bar)

        def warn(text: str) -> None:
            visible = Console(stderr=True) if console.quiet else console
            visible.print(f"{command}: warning: {text}", soft_wrap=True, markup=False, highlight=False)

        yield StepProgress(step=step, sample=sample, warn=warn)
