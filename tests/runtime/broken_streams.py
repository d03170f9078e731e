"""Runs commands with broken standard streams, each in a fork of this process, which imports all commands once.

    python broken_streams.py CASES RESULTS

Both are JSON files: a list of {"main", "arguments", "streams"}, and a list of {"code", "stdout", "stderr"}. A stream is
"file", "closed", "full", "gone" (a pipe without a reader) or "read only".
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path


def _open(kind: str, file: str) -> int | None:
    if kind == "closed":
        return None
    if kind == "gone":
        reader, writer = os.pipe()
        os.close(reader)
        return writer
    if kind == "read only":
        return os.open("/dev/null", os.O_RDONLY)
    return os.open("/dev/full" if kind == "full" else file, os.O_WRONLY | os.O_CREAT)


def _become(streams: dict[str, str], folder: str) -> None:
    """Give this process the streams, as if it had been started with them."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        opened = _open(streams.get(name, "file"), f"{folder}/{name}") if number else _open("closed", "")
        os.close(number)
        if opened is None:
            setattr(sys, name, None)
            continue
        os.dup2(opened, number)
        os.close(opened)
        stream = os.fdopen(number, "w", buffering=1 if name == "stderr" else -1, closefd=False)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def main(cases_file: str, results_file: str) -> int:
    cases = json.loads(Path(cases_file).read_bytes())
    mains = {case["main"]: importlib.import_module(case["main"]).main for case in cases}
    gc.collect()
    gc.freeze()  # a child that collects would copy all pages
    results = []
    for case in cases:
        folder = tempfile.mkdtemp()
        if (child := os.fork()) == 0:
            _become(case["streams"], folder)
            sys.exit(mains[case["main"]](case["arguments"]))  # ends as any process
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = {name: Path(folder, name) for name in ("stdout", "stderr")}
        read = {name: file.read_text() if file.exists() else "" for name, file in texts.items()}
        results.append({"code": code, **read})
        shutil.rmtree(folder)
    Path(results_file).write_text(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
