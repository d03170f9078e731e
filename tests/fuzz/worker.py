"""Runs a range of inputs in this process, under limits, and writes down how each ended; ``run`` starts and watches it."""

from __future__ import annotations

import argparse
import os
import random
import resource
import sys
import time
from pathlib import Path

from tests.fuzz.kinds import KINDS
from tests.fuzz.subject import Outcome, Subject

_ADDRESS_BYTES = 12 << 30
"""Address space; the graphs, torch and their threads take the half of it."""
_MOST_GROWTH_KB = 1 << 20
"""Resident memory that one input may take in addition."""
_MOST_SECONDS = 10.0
"""Of the processor: other programs make no finding."""


def main() -> int:
    """Run inputs ``--first`` to ``--last``; a line "kind index outcome text" for each goes to ``--results``."""
    parser = argparse.ArgumentParser()
    for name in ("--bundle", "--results"):
        parser.add_argument(name, type=Path, required=True)
    for name in ("--seed", "--first", "--last", "--step"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--kinds", default="")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_BYTES, _ADDRESS_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())
    kinds = {name: KINDS[name] for name in options.kinds.split(",") if name} or KINDS
    subject = Subject(options.bundle.resolve())  # commands run in another folder
    try:
        with options.results.open("a", buffering=1) as results:
            for index in range(options.first, options.last, options.step):
                name, outcome = _one(index, options.seed, kinds, subject, results)
                print(f"{name}\t{index}\t{outcome.kind}\t{outcome.text!r}", file=results)
                subject.clean()
    finally:
        subject.close()
    return 0


def _one(index: int, seed: int, kinds: dict, subject: Subject, results: object) -> tuple[str, Outcome]:  # type: ignore[type-arg]
    rng = random.Random(seed * 1_000_000_007 + index)
    name = rng.choices(sorted(kinds), [kinds[key][0] for key in sorted(kinds)])[0]
    print(f"{name}\t{index}\tstarted\t", file=results)  # type: ignore[call-overload]
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome = kinds[name][1](rng, subject)
    seconds, grown = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if seconds > _MOST_SECONDS:
        outcome = Outcome("broken", f"took {seconds:.0f} s: {outcome.text}")
    if grown > _MOST_GROWTH_KB:
        outcome = Outcome("broken", f"took {grown >> 10} MiB: {outcome.text}")
    return name, outcome


if __name__ == "__main__":
    sys.exit(main())
