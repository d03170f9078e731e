"""The frame of all commands: errors become one line on standard error and exit code 2; options of those that run graphs."""

from __future__ import annotations

import errno
import io
import os
import re
import sys
import warnings
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

import click

from trio_edge.runtime.backends.registry import BACKENDS_HELP, CPU_ACCURACIES
from trio_edge.runtime.bundle.errors import TrioEdgeError, message_line

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, the user's quota, or a limit on files
# A terminal that has hung up, or a file opened for reading.
_UNWRITABLE = (errno.EIO, errno.EBADF, errno.ENXIO)
_NAMES = {
    getattr(errno, name)
    for name in ("ENAMETOOLONG", "ELOOP", "EACCES", "EPERM", "EROFS", "ENOTDIR", "EISDIR")
}


def run(command: click.Command, argv: Sequence[str] | None) -> int:
    """Run a click command and return its exit code. Errors that a user can correct print one line."""
    is_closed = sys.stdout is None
    _open_closed_streams()
    with redirect_stderr(cast("TextIO", _Messages(sys.stderr))), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, about numbers of hostile files
        if is_closed:
            return _fail(command, "standard output: expected an open one, got a closed one; leave out >&-")
        if isinstance(sys.stdout, io.TextIOWrapper):
            # A terminal shows a question mark for a character that it lacks.
            sys.stdout.reconfigure(errors="replace")
        arguments = sys.argv[1:] if argv is None else list(argv)
        if not all(map(_is_text, arguments)):
            return _fail(command, "arguments: expected text, got a null byte or half a character; remove it")
        code = _run(command, arguments)
        try:
            sys.stdout.flush()
        except OSError as error:
            failed = _fail_with_files(command, error)
            code = code or failed
        return code


def _run(command: click.Command, arguments: list[str]) -> int:
    try:
        result = command.main(args=arguments, prog_name=command.name, standalone_mode=False)
    except click.exceptions.Abort:
        print(f"{command.name}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except click.ClickException as error:
        return _fail(command, usage_line(error, command.name))
    except TrioEdgeError as error:
        return _fail(command, str(error))
    except MemoryError:
        return _fail(command, "expected more memory, the system has none left; close other programs")
    except OSError as error:
        return _fail_with_files(command, error)
    return result if isinstance(result, int) else 0


def usage_line(error: click.ClickException, name: str | None) -> str:
    """Return the message of an error of command ``name`` in the form of ours; click's own messages have another one."""
    message, advice = error.format_message(), f"see {name} --help"
    if isinstance(error, click.NoSuchOption):
        near = f"did you mean {error.possibilities[0]}?" if error.possibilities else advice
        return f"{error.option_name}: expected an option of {name}, got another; {near}"
    if isinstance(error, click.BadOptionUsage):
        rule = "no value, got one" if "not take" in message else "a value, got none"
        return f"{error.option_name}: expected {rule}; {advice}"
    if isinstance(error, click.BadParameter) and error.param is not None:
        is_option = isinstance(error.param, click.Option)
        where = error.param.opts[0] if is_option else error.param.human_readable_name
        value, is_clicks, rule = error.message.rstrip(".").rpartition(" is not ")
        rule = re.sub("^a valid (integer|float).*", "a number", _range_in_words(rule))
        text = f"expected {rule}, got {value}" if is_clicks else error.message
        if isinstance(error, click.MissingParameter):
            text = "expected a value, got none"
        return f"{where}: {text}; {advice}"
    if found := re.fullmatch(r"Got unexpected extra arguments? \((.*)\)\.?", message):
        return (
            f"arguments: expected none after the last one, got {found[1]}; put a text with spaces in quotes"
        )
    return message


def _range_in_words(rule: str) -> str:
    """Return click's "in the range 0<=x<=9" or "in the range x>=1" as our messages say it, and other rules as they are."""
    found = re.fullmatch(r"in the range (?:(\S+)<=)?x([<>]=?)(\S+)", rule)
    if found is None:
        return rule
    low, sign, bound = found.groups()
    words = {">=": "of at least", ">": "above", "<=": "of at most", "<": "below"}
    return f"a number in {low}..{bound}" if low else f"a number {words[sign]} {bound}"


def _is_text(argument: str) -> bool:
    """Return whether system calls accept ``argument``; they also accept what Python makes of bytes that are no UTF-8."""
    try:
        return b"\0" not in os.fsencode(argument)
    except UnicodeEncodeError:
        return False


def _fail_with_files(command: click.Command, error: OSError) -> int:
    if isinstance(error, BrokenPipeError):  # the reading program has ended
        lose(sys.stdout)
        return 1
    if error.errno in (*_FULL, *_UNWRITABLE) and error.filename is None:
        lose(sys.stdout)
        text, advice = "expected room for the output", "free some disk space"
        if error.errno in _UNWRITABLE:
            text, advice = "standard output: expected to write to it", "send it to a file"
        return _fail(command, f"{text}, got: {error.strerror}; {advice}")
    # This error is tempfile's, where no folder can be written to.
    if error.errno == errno.ENOENT and error.filename is None:
        room = f"expected a temporary folder with room, got: {error.strerror}"
        return _fail(command, f"{room}; free some disk space or set TMPDIR")
    if error.errno not in _NAMES or error.filename is None:
        raise error
    return _fail(command, f"{error.filename}: cannot be used ({error.strerror}); choose another name")


def _open_closed_streams() -> None:
    """Open the standard streams that a shell has closed (``>&-``): the next file opened would take their place."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


def lose(stream: TextIO) -> None:
    """Discard the rest of a stream that has failed: Python would report the failure again at exit."""
    with suppress(OSError, ValueError), Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


class _Messages:
    """Standard error whose loss changes nothing else: a closed terminal, a full disk, a reader that has gone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write what can be written."""
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            lose(self._stream)
        return len(text)

    def flush(self) -> None:
        """Do nothing: ``write`` has flushed."""


def _fail(command: click.Command, message: str) -> int:
    print(f"{command.name}: {message_line(message)}", file=sys.stderr)
    return EXIT_USER_ERROR


def level_option() -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that adds ``--level`` to a command."""
    text = (
        "Level of a bundle with several, or auto for the lowest that is sure enough. [default: the bundle's]"
    )
    return click.option("--level", metavar="NAME", help=text)


def lookup_option() -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that adds ``--lookup`` to a command: a number, or "auto"."""

    def read(_context: click.Context, _option: click.Parameter, given: str) -> int | str:
        if given != "auto" and re.fullmatch(r"\d{1,3}", given, re.ASCII) is None:
            raise click.BadParameter(f"expected a number or auto, got {given[:40]!r}")
        return given if given == "auto" else int(given)

    text = "Most draft tokens of a decode step, looked up in the prompt and the answer; auto drafts as many as pay."
    return click.option("--lookup", metavar="N|auto", default="0", callback=read, help=text)


def backend_options(
    *, threads: int = 0, threads_help: str = "CPU threads; 0 lets the backend choose."
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that adds ``--backend``, ``--threads`` and ``--cpu-accuracy`` to a command."""
    accuracy = (
        "Type of activations that the CPU multiplies with INT4 and INT8 weights; auto: int8 in large graphs."
    )
    shown: dict[str, Any] = {"default": "auto", "show_default": True}
    options = (
        click.option("--backend", help=BACKENDS_HELP, **shown),
        click.option("--threads", type=click.IntRange(0, 1024), default=threads, help=threads_help),
        click.option("--cpu-accuracy", type=click.Choice(CPU_ACCURACIES), help=accuracy, **shown),
    )

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add
