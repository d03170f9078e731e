"""Runs code in processes of their own that have imported torch already: they are forked from one that has."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_SERVER = """
import gc, importlib, json, os, sys

for name in sys.argv[1:]:
    importlib.import_module(name)
gc.collect()
gc.freeze()  # a child that collects would copy all pages
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        for number, path in enumerate(job["outputs"], 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        os.environ.clear()
        os.environ.update(job["environment"])
        sys.argv = ["-c", *job["arguments"]]
        exec(compile(job["code"], "<string>", "exec"), {"__name__": "__main__"})
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@contextmanager
def preloaded(*modules: str) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Yield a function that runs Python code as ``subprocess.run`` does ``python -c``, where ``modules`` are imported already.

    Its arguments are the code, those of the command, and the environment.
    """
    command, pipe = [sys.executable, "-c", _SERVER, *modules], subprocess.PIPE
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as server,
    ):
        assert server.stdin is not None and server.stdout is not None
        assert server.stdout.readline() == "ready\n"

        def run(code: str, *arguments: str, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
            outputs = [Path(folder) / name for name in ("stdout", "stderr")]
            for path in outputs:
                path.unlink(missing_ok=True)
            job: dict[str, Any] = {"code": code, "arguments": arguments, "environment": dict(env)}
            print(json.dumps({**job, "outputs": list(map(str, outputs))}), file=server.stdin, flush=True)
            assert server.stdout is not None
            status = int(server.stdout.readline())
            return subprocess.CompletedProcess([*arguments], status, *(path.read_text() for path in outputs))

        yield run
        server.stdin.close()
