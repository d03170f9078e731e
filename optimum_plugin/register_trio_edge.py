"""``optimum-cli export trio``: optimum imports every file in its namespace ``optimum.commands.register``, so also this one.

Every optimum command imports it, so it imports nothing of trio-edge and never fails: the exporter itself is imported
when the command runs. optimum's parser hands all arguments on to the exporter, which reads them.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Iterator

REGISTER_COMMANDS: Iterator[object] = iter(())
"""Pairs of a command and the command that it belongs to, under the name that optimum looks for.

An iterator, because optimum reads this once for each folder of the namespace, and two installations (a virtual
environment over the system's) are two folders; a second command of the same name would break all of optimum's.
"""

try:
    from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
    from optimum.commands.export.base import ExportCommand
except ImportError:  # another release of optimum: without this command rather than without any
    pass
else:

    class TrioExportCommand(BaseOptimumCLICommand):
        """Hands everything after ``trio`` to the exporter."""

        COMMAND = CommandInfo(
            name="trio", help="Export a vision-language model with TRIO token reduction (trio-edge)."
        )

        @staticmethod
        def parse_args(parser: ArgumentParser) -> None:
            """Take all arguments, options and --help too, as they are."""
            parser.prefix_chars = "\0"  # no argument looks like an option, or argparse would refuse it
            parser.add_argument("arguments", nargs=argparse.REMAINDER)

        def run(self) -> None:
            """Export, and exit with the exporter's code."""
            from trio_edge.export.cli import optimum_main

            raise SystemExit(optimum_main(self.args.arguments))

    REGISTER_COMMANDS = iter([(TrioExportCommand, ExportCommand)])
