"""The exceptions of trio-edge for everything that a user can cause; each message is one line.

    TrioEdgeError              base class; commands print it as one line and exit with code 2
    ├── ManifestError          a bundle's description is broken or of another schema   (also a ValueError)
    ├── BundleError            a bundle's files are missing, changed or unfinished     (also a ValueError)
    ├── ShapeError             an array or a prompt does not fit the exported shapes   (also a ValueError)
    │   └── PromptTooLongError a prompt has more tokens than the bundle has room for
    ├── ScheduleError          an impossible reduction schedule                        (also a ValueError)
    ├── CheckpointError        a checkpoint cannot be exported                         (also a ValueError)
    ├── ImageError             an image cannot be read                                (also a ValueError)
    ├── TargetError            an unknown device                                       (also a ValueError)
    ├── DataError              a file of questions or of outcomes is broken            (also a ValueError)
    └── BackendError           a backend cannot load or run a graph                    (also a RuntimeError)

A message reads ``<where>: expected <rule>, got <value>; <what to do>``.
"""

from __future__ import annotations

import json
import unicodedata
from importlib.metadata import distributions, version
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterable

_MOST_CHARACTERS = 2000


class TrioEdgeError(Exception):
    """Base class of all errors that a user can correct."""

    def __str__(self) -> str:
        """Return the message as ``message_line`` gives it."""
        return message_line(super().__str__())


class ManifestError(TrioEdgeError, ValueError):
    """The manifest is broken or written for another schema version."""


class BundleError(TrioEdgeError, ValueError):
    """A file of the bundle is missing, changed or unfinished."""


class ShapeError(TrioEdgeError, ValueError):
    """An array, prompt or request does not fit the exported shapes."""


class PromptTooLongError(ShapeError):
    """A prompt has more text or visual tokens than the bundle has room for."""


class ScheduleError(TrioEdgeError, ValueError):
    """The model cannot follow the reduction schedule."""


class CheckpointError(TrioEdgeError, ValueError):
    """A checkpoint cannot be read or exported."""


class ImageError(TrioEdgeError, ValueError):
    """An image cannot be read or is too large."""


class TargetError(TrioEdgeError, ValueError):
    """A device is not in the table of targets."""


class DataError(TrioEdgeError, ValueError):
    """A file of questions or a folder of outcomes cannot be used."""


class BackendError(TrioEdgeError, RuntimeError):
    """A backend is missing, or cannot load or run a graph."""


def install_command(extra: str) -> str:
    """Return the command that adds the packages of ``extra`` to this installation: from its clone, or from its wheel file.

    No package index has trio-edge, so its bare name would install nothing, or a package of somebody else.
    """
    # A clone in which something was built also has an .egg-info, without the installer's file (PEP 610).
    found = [copy.read_text("direct_url.json") for copy in distributions(name="trio-edge")]
    source = json.loads(next(filter(None, found), "{}"))
    place = unquote(urlsplit(source.get("url", "")).path)
    if "dir_info" in source:
        editable = "-e " * bool(source["dir_info"].get("editable"))
        return f'pip install {editable}".[{extra}]" in {place}'
    if not Path(place).is_file():  # the wheel was deleted, or came from elsewhere
        place = f"./trio_edge-{version('trio-edge')}-py3-none-any.whl"
    return f'pip install "{place}[{extra}]"'


def did_you_mean(name: str, names: Iterable[str], *, otherwise: str) -> str:
    """Return a question after the names that begin with ``name``, or after the nearest one; ``otherwise`` if there is none."""
    from difflib import get_close_matches  # only errors need it

    known, wanted = list(names), name.lower()
    near = [known_name for known_name in known if wanted and known_name.startswith(wanted)]
    near = near or get_close_matches(wanted, known, n=1)
    return f"did you mean {' or '.join(near)}?" if near else otherwise


def message_line(text: str) -> str:
    """Return a message as one printable line; the middle of a very long one is cut."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= _MOST_CHARACTERS else f"{line[:1000]}…{line[-600:]}"


def printable(text: str, *, but: str = "") -> str:
    """Return ``text`` with control characters, bidirectional marks and lone surrogates escaped, except those in ``but``.

    A text from a file may come from anybody: escape sequences can rename a terminal's window, and marks reverse a name.
    """
    if text.isprintable():  # the common case
        return text
    return "".join(
        char.encode("unicode_escape").decode("ascii")
        if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") and char not in but
        else char
        for char in text
    )
