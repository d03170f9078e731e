"""Hooks of mkdocs: the first page, the options of the commands, and links that leave the site."""

from __future__ import annotations

import html
import importlib.metadata
import inspect
import posixpath
import re
from pathlib import Path
from typing import Any

import click
from mkdocs.structure.files import File, Files

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:)([^)#\s]+)(?:#[^)]*)?\)")
COMMAND = re.compile(r"<!-- command: (trio-\w+) -->")


def on_files(files: Files, *, config: Any) -> Files:
    """Add the repository's README.md as the first page of the site."""
    text = (Path(config.config_file_path).parent / "README.md").read_text(encoding="utf-8")
    outside = re.sub(r"\]\((?!https?:|#)", "](../", text)
    files.append(File.generated(config, "README.md", content=outside.replace("](../docs/", "](")))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Return the page's text with the commands' options, and with links that leave ``docs`` as their text alone."""
    folder = posixpath.dirname(page.file.src_uri)

    def shown(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, link[2]))
        return link[1] if target.startswith("../") else link[0]

    return COMMAND.sub(lambda found: _described(found[1]), LINK.sub(shown, markdown))


def _described(name: str) -> str:
    """Return a command's help as a table: mkdocs-click 0.9 prints click's own placeholder where there is no default."""
    (point,) = importlib.metadata.entry_points(group="console_scripts", name=name)
    command: click.Command = importlib.import_module(point.module).command
    context = click.Context(command, info_name=name)
    records = [
        record for option in command.get_params(context) if (record := option.get_help_record(context))
    ]
    rows = [f"| <code>{_cell(names)}</code> | {_cell(text)} |" for names, text in records if text]
    usage = command.get_usage(context).removeprefix("Usage: ")
    return "\n".join(
        [
            f"```text\n{usage}\n```\n",
            inspect.cleandoc(command.help or ""),
            "",
            "| option | does |",
            "|---|---|",
            *rows,
        ]
    )


def _cell(text: str) -> str:
    return html.escape(text).replace("|", "&#124;")
