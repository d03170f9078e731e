"""Exports that are stopped: by Ctrl-C, by a kill, by a full disk. No half bundle stays, and the next export succeeds.

Every export is a process of its own, forked from one that has exported the same checkpoint already: what is stopped
while it writes takes over that one's traced graphs instead of tracing them once more.
"""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import save_checkpoint
from tests.conftest import ROOT
from trio_edge.runtime.bundle.errors import BundleError
from trio_edge.runtime.bundle.reader import open_bundle

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and limits of POSIX")

FORK = """
import os, resource, sys
from tests.shared_traces import shared_traces
from trio_edge.export import bundle
from trio_edge.export.cli import main

trace, traced = bundle.trace_graphs, []

def trace_and_keep(*args, **settings):
    traced[:] = trace(*args, **settings)
    raise SystemExit  # before the graphs get their weights

bundle.trace_graphs = trace_and_keep
try:
    with shared_traces():
        main(sys.argv[1:])
except SystemExit:
    pass

for line in sys.stdin:
    limit, traces, *arguments = line.rstrip("\\n").split("\\t")
    child = os.fork()
    if child == 0:
        bundle.trace_graphs = trace if traces else lambda *_, **__: list(traced)
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
        sys.exit(main(arguments))
    print("process", child, file=sys.stderr, flush=True)
    print("ended with", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=sys.stderr, flush=True)
"""
PADDING_BYTES = 256 << 20  # copying it takes long enough to be interrupted


@dataclass(frozen=True)
class Exports:
    """Runs one export after the other."""

    server: subprocess.Popen[str]
    source: Path

    def run(
        self,
        out: Path,
        *,
        stop_at: str | None = None,
        by: signal.Signals | None = None,
        limit: str = "",
        traces: bool = False,
    ) -> tuple[int, list[str]]:
        """Export into ``out`` and return the exit code (negative for a signal) and what was printed.

        Args:
            out: The bundle.
            stop_at: Start of the progress line at which the signal ``by`` is sent.
            by: The signal.
            limit: Largest file in bytes.
            traces: Whether it traces its graphs itself.
        """
        arguments = export_arguments(self.source, out)
        print("\t".join([limit, "itself" if traces else "", *arguments]), file=self.server.stdin, flush=True)
        process, lines = 0, []
        for line in self.server.stderr or ():
            if line.startswith("process "):
                process = int(line.split()[1])
            elif line.startswith("ended with "):
                return int(line.split()[2]), lines
            else:
                lines.append(line.strip())
                if stop_at is not None and by is not None and line.startswith(stop_at):
                    os.kill(process, by)
        raise AssertionError(lines)


def export_arguments(source: Path, out: Path) -> list[str]:
    return [str(source), "--out", str(out), "--keep", "all", "--max-text", "32", "--force"]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exports]:
    """Exports of a small checkpoint with one large tensor that no graph uses."""
    source = save_checkpoint(tmp_path_factory.mktemp("source") / "ck", num_layers=1)
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, "padding": torch.zeros(PADDING_BYTES // 4)}, source / "model.safetensors")
    command = [sys.executable, "-c", FORK, *export_arguments(source, source.parent / "bundle"), "--quiet"]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stderr=pipe, stdout=subprocess.DEVNULL, text=True, cwd=ROOT
    ) as server:
        yield Exports(server, source)
        assert server.stdin is not None
        server.stdin.close()


@pytest.mark.parametrize("moment", ["tracing vision", "writing the weights"])
def test_control_c_prints_one_line_and_leaves_nothing(moment: str, exports: Exports, tmp_path: Path) -> None:
    code, lines = exports.run(
        tmp_path / "bundle", stop_at=moment, by=signal.SIGINT, traces=moment.startswith("tracing")
    )
    assert (code, lines[-1]) == (130, "trio-export: interrupted"), lines
    assert not any("Traceback" in line or "Error" in line for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_leaves_no_bundle_and_the_next_one_cleans_up(
    exports: Exports, tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    code, _ = exports.run(out, stop_at="writing the weights", by=signal.SIGKILL)
    assert code == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    for folder in (out, left):
        with pytest.raises(BundleError, match="expected"):
            open_bundle(folder)
    exports.run(out, stop_at="hashing", by=signal.SIGKILL)
    assert not out.exists() or open_bundle(out, hash_all=True)  # the kill may have come too late
    code, _ = exports.run(out)
    assert code == 0
    assert list(tmp_path.iterdir()) == [out]
    open_bundle(out, hash_all=True)


def test_a_full_disk_gives_one_line_and_leaves_nothing(exports: Exports, tmp_path: Path) -> None:
    code, lines = exports.run(tmp_path / "bundle", limit=str(PADDING_BYTES // 2))
    assert code == 2
    assert lines[-1].startswith("trio-export: ")
    assert "expected room for the whole bundle, got 'File too large'" in lines[-1]
    assert not any("Traceback" in line for line in lines)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cache", [None, "inductor"], ids=["importing torch", "tracing"])
def test_a_disk_without_any_room_gives_one_line(tmp_path: Path, cache: str | None) -> None:
    """torch asks for a temporary folder when it is imported; one that knows its cache, when it traces."""
    others = {name: text for name, text in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    known = {} if cache is None else {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / cache)}
    code = "import sys; from trio_edge.export.cli import main; sys.exit(main())"
    command = [sys.executable, "-B", "-c", code, "tiny", "--out", str(tmp_path / "bundle")]

    def without_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**others, **known},
        preexec_fn=without_room,
    )
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    line = result.stderr.splitlines()[-1]
    assert re.match(
        r"trio-export: expected a temporary folder with room, got: .*; free some disk space", line
    )
    assert [path for path in tmp_path.iterdir() if path.name != cache] == []


def test_control_c_before_torch_is_imported_leaves_nothing(tmp_path: Path) -> None:
    code = "import sys; from trio_edge.export.cli import main; print('started', flush=True); sys.exit(main())"
    command = [sys.executable, "-c", code, "tiny", "--out", str(tmp_path / "bundle")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.5)  # while it imports torch
        process.send_signal(signal.SIGINT)
        _, error = process.communicate()
    assert process.returncode == 130
    assert error.splitlines()[-1] == "trio-export: interrupted"
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []
