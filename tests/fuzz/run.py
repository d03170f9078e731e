"""Runs many inputs in several processes and prints a table of how they ended: ``python -m tests.fuzz.run --bundle out/tiny``.

A process that ends or stands still is a finding; another one goes on after the input that did it. Every input follows from
``--seed`` and its number, so ``--first N --inputs 1`` runs one again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

_RESTART_AFTER = 3000
"""Inputs of one process: what leaks slowly shows as little as in a user's."""
_STUCK_SECONDS = 150.0


@dataclass
class _Share:
    """The inputs of one process at a time: ``first``, ``first + step``, … below ``last``."""

    first: int
    last: int
    step: int
    results: Path
    process: subprocess.Popen[bytes] | None = None
    changed: float = field(default_factory=time.monotonic)
    size: int = 0
    findings: list[str] = field(default_factory=list)

    def lines(self) -> list[list[str]]:
        text = self.results.read_text(errors="replace") if self.results.exists() else ""
        return [line.split("\t", 3) for line in text.splitlines()]


def main() -> int:
    """Run the inputs and return 1 if there is a finding."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True, help="a small bundle: make bundle")
    parser.add_argument("--inputs", type=int, default=200_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="stop after so many, with what was run"
    )
    parser.add_argument("--kinds", default="", help="only these, with commas between")
    parser.add_argument("--report", type=Path, help="write counts and findings as JSON")
    options = parser.parse_args()
    counts, findings = run(
        options.bundle,
        inputs=range(options.first, options.first + options.inputs),
        processes=options.processes,
        seed=options.seed,
        seconds=options.seconds,
        kinds=options.kinds,
    )
    _print(counts, findings)
    if options.report is not None:
        report = {
            "counts": {f"{kind} {end}": number for (kind, end), number in counts.items()},
            "findings": findings,
        }
        options.report.write_text(json.dumps(report, indent=1))
    return 1 if findings else 0


def run(
    bundle: Path,
    *,
    inputs: range,
    processes: int = 1,
    seed: int = 0,
    seconds: float = float("inf"),
    kinds: str = "",
) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Return how many inputs of each kind ended how, and a line for each finding."""
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="trio-fuzz-run-") as folder:
        shares = [
            _Share(inputs.start + number, inputs.stop, processes, Path(folder) / str(number))
            for number in range(processes)
        ]
        with contextlib.suppress(KeyboardInterrupt):  # what was run so far counts
            while any(share.first < share.last for share in shares) and time.monotonic() < end:
                for share in shares:
                    _watch(share, bundle, seed, kinds)
                time.sleep(0.2)
        for share in shares:
            if share.process is not None:
                share.process.kill()
                share.process.wait()
        ends = [line for share in shares for line in share.lines() if len(line) == 4 and line[2] != "started"]
        findings = [finding for share in shares for finding in share.findings]
    findings += [f"{kind} {index}: {text}" for kind, index, end_, text in ends if end_ == "broken"]
    return Counter((line[0], line[2]) for line in ends), findings


def _watch(share: _Share, bundle: Path, seed: int, kinds: str) -> None:
    """Start the share's process where none runs, and look after the one that does."""
    if share.first >= share.last:
        return
    if share.process is None:
        last = min(share.last, share.first + _RESTART_AFTER * share.step)
        numbers = {"seed": seed, "first": share.first, "last": last, "step": share.step}
        command = [
            sys.executable,
            "-m",
            "tests.fuzz.worker",
            "--bundle",
            str(bundle),
            "--results",
            str(share.results),
        ]
        command += [f"--{name}={number}" for name, number in numbers.items()] + [f"--kinds={kinds}"]
        share.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        share.changed, share.size = time.monotonic(), -1
        return
    size = share.results.stat().st_size if share.results.exists() else 0
    if size != share.size:
        share.size, share.changed = size, time.monotonic()
    code = share.process.poll()
    is_stuck = time.monotonic() - share.changed > _STUCK_SECONDS
    if code is None and not is_stuck:
        return
    share.process.kill()
    share.process.wait()
    share.process = None
    lines = share.lines()
    kind, index, state = lines[-1][:3] if lines else ("start", str(share.first), "started")
    if code != 0:
        how = "stands still" if is_stuck else f"ended with {code}"
        share.findings.append(
            f"{kind} {index}: the process {how}" + ("" if state == "started" else " after it")
        )
    share.first = int(index) + share.step


def _print(counts: Counter[tuple[str, str]], findings: list[str]) -> None:
    ends = ("clear", "ok", "same", "different", "broken")
    print(f"{'kind':12}" + "".join(f"{end:>11}" for end in ends))
    for kind in sorted({kind for kind, _ in counts}):
        print(f"{kind:12}" + "".join(f"{counts[kind, end]:>11}" for end in ends))
    print(f"{sum(counts.values())} inputs, {len(findings)} findings")
    for finding in findings[:50]:
        print(finding)


if __name__ == "__main__":
    sys.exit(main())
