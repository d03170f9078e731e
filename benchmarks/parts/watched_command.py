"""Time of each step of a running command, and its peak memory."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from parts.tables import markdown

from trio_edge.profiling.measure.machine_info import find_machine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

SAMPLE_SECONDS = 0.02


@dataclass
class Peaks:
    """Peak memory of watched processes, in bytes."""

    resident: int = 0
    anonymous: int = 0
    mapped: int = 0

    def forget(self) -> None:
        """Begin again."""
        self.resident = self.anonymous = self.mapped = 0

    @contextmanager
    def watching(self, pids: Callable[[], Iterable[int | None]]) -> Iterator[None]:
        """Sample the processes of ``pids()`` in a thread, within the block."""
        done = threading.Event()
        thread = threading.Thread(target=self._sample, args=(pids, done), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _sample(self, pids: Callable[[], Iterable[int | None]], done: threading.Event) -> None:
        while not done.wait(SAMPLE_SECONDS):
            for found in (memory_of(pid) for pid in pids() if pid):
                if found is not None:
                    self.resident, self.anonymous, self.mapped = map(
                        max, found, (self.resident, self.anonymous, self.mapped)
                    )


def memory_of(pid: int) -> tuple[int, int, int] | None:
    """Return a process's peak resident memory, and its present anonymous and mapped memory; None if it has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    kib = {name: int(count) for name, count in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
    if "VmHWM" not in kib:
        return None
    return 1024 * kib["VmHWM"], 1024 * kib["RssAnon"], 1024 * (kib["RssFile"] + kib["RssShmem"])


def forget(files: Iterable[Path]) -> None:
    """Write the files out and drop them from the page cache."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


@dataclass(frozen=True)
class Step:
    """A step of a command: the line that it printed at its start, and its time."""

    name: str
    seconds: float
    cpu_seconds: float


def watch(
    module: str, arguments: Sequence[str], *, is_step: Callable[[str], bool]
) -> tuple[list[Step], Peaks]:
    """Run ``main`` of ``module`` in a process, and return its steps and peak memory.

    Args:
        module: Module with a ``main``.
        arguments: The command's arguments.
        is_step: Returns whether a line on standard error starts a step.
    """
    code = f"import sys; from {module} import main; sys.exit(main())"
    peaks, marks, last_line = Peaks(), [("starting", time.perf_counter(), 0.0)], ""
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    ) as child:
        assert child.stderr is not None
        with peaks.watching(lambda: [child.pid]):
            for line in child.stderr:
                last_line = line.strip()
                if is_step(last_line):
                    marks.append((last_line, time.perf_counter(), _cpu_seconds(child.pid)))
            _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        marks.append(("", time.perf_counter(), usage.ru_utime + usage.ru_stime))
    if child.returncode:
        raise SystemExit(last_line)
    peaks.resident = max(peaks.resident, 1024 * usage.ru_maxrss)
    steps = [
        Step(name, after - before, cpu_after - cpu_before)
        for (name, before, cpu_before), (_, after, cpu_after) in zip(marks, marks[1:])
    ]
    return steps, peaks


def step_table(groups: dict[str, list[Step]], peaks: Peaks) -> str:
    """Return a table with one line for each group of steps, and a line with the peak memory."""
    rows = [
        (name, f"{sum(step.seconds for step in group):.1f}", f"{sum(step.cpu_seconds for step in group):.1f}")
        for name, group in groups.items()
    ]
    return (
        f"{markdown(('step', 'seconds', 'CPU seconds'), rows)}\n\n"
        f"peak memory {gigabytes(peaks.resident)}, of it at most {gigabytes(peaks.anonymous)} anonymous"
    )


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def folder_bytes(folder: Path, pattern: str = "*") -> int:
    return sum(path.stat().st_size for path in folder.rglob(pattern) if path.is_file())


def machine() -> str:
    """Return the machine and the versions, on which the figures depend."""
    return (
        f"{os.cpu_count()} CPUs ({find_machine().name}), Python {platform.python_version()}, torch"
        f" {version('torch')}, transformers {version('transformers')}"
    )
