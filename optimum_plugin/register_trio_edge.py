"""The command ``optimum-cli export trio``; optimum imports every file in its namespace ``optimum.commands.register``.

Every optimum command imports this file, so it never fails and imports nothing of trio-edge before the command runs.
optimum's parser passes all arguments on to the exporter.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Iterator

REGISTER_COMMANDS: Iterator[object] = iter(())
"""Pairs of a command and its parent command, under the name that optimum reads.

An iterator is read only once. optimum reads this for each folder of the namespace, and two installations (a virtual
environment over the system's) have two folders; a second command of the same name would break optimum's other commands.
"""

try:
    from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
    from optimum.commands.export.base import ExportCommand
except ImportError:  # another release of optimum: only this command is missing then
    pass
else:

    class TrioExportCommand(BaseOptimumCLICommand):
        """Passes all arguments after ``trio`` to the exporter."""

        COMMAND = CommandInfo(
            name="trio", help="Export a vision-language model with TRIO token reduction (trio-edge)."
        )

        @staticmethod
        def parse_args(parser: ArgumentParser) -> None:
            """Take all arguments as they are, options and --help included."""
            parser.prefix_chars = "\0"  # no argument looks like an option, or argparse would refuse it
            parser.add_argument("arguments", nargs=argparse.REMAINDER)

        def run(self) -> None:
            """Export, and exit with the exporter's code."""
            from trio_edge.export.cli import optimum_main

            raise SystemExit(optimum_main(self.args.arguments))

    REGISTER_COMMANDS = iter([(TrioExportCommand, ExportCommand)])
