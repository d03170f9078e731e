"""Options of all commands that run graphs: backend, CPU threads and CPU accuracy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from trio_edge.runtime.backends.registry import BACKENDS_HELP, CPU_ACCURACIES

if TYPE_CHECKING:
    from collections.abc import Callable


def backend_options(
    *, threads: int = 0, threads_help: str = "CPU threads; 0 lets the backend choose."
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that adds ``--backend``, ``--threads`` and ``--cpu-accuracy`` to a command."""
    options = (
        click.option("--backend", default="auto", show_default=True, help=BACKENDS_HELP),
        click.option("--threads", type=click.IntRange(0, 1024), default=threads, help=threads_help),
        click.option(
            "--cpu-accuracy",
            type=click.Choice(CPU_ACCURACIES),
            default="auto",
            show_default=True,
            help="Type of activations that the CPU multiplies with INT4 and INT8 weights; auto: int8 in large graphs.",
        ),
    )

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add
