"""Time, memory and open files over many answers of one process.

    python benchmarks/long_run.py BUNDLE IMAGE… --answers 2000

Time is processor time, which other programs hardly affect.
"""

from __future__ import annotations

import gc
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

from parts.arguments import errors_in_one_line, parser_for, positive
from parts.tables import markdown

from trio_edge.runtime.devices.machine import process_bytes
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

_PROMPTS = (
    "what is this?",
    "how many circles are there?",
    "yes or no: is it red?",
    "what color is the square?",
)


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--answers", type=positive, default=2000)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--threads", type=positive, default=1)
    options = parser.parse_args()
    with errors_in_one_line(parser):
        print(markdown(_HEADERS, _rows(options)))


_HEADERS = ("answers", "median CPU ms", "95 % below CPU ms", "resident MB", "open files", "threads")


def _rows(options: argparse.Namespace) -> Sequence[Sequence[str]]:
    """Return a row for each tenth of the answers."""
    rows, times, each = [], [], max(1, options.answers // 10)
    with Pipeline.from_bundle(
        options.bundle, backend=options.backend, threads=options.threads, keep_images=4
    ) as pipeline:
        for number in range(1, options.answers + 1):
            image = options.images[number % len(options.images)]
            start = time.process_time()
            _ = pipeline.generate(image, _PROMPTS[number % len(_PROMPTS)], max_new_tokens=4).text
            times.append(1e3 * (time.process_time() - start))
            if number % each == 0:
                rows.append(_row(number, times[-each:]))
    return rows


def _row(number: int, times: Sequence[float]) -> tuple[str, ...]:
    median, late = statistics.median(times), sorted(times)[int(0.95 * (len(times) - 1))]
    files, threads = _count("/proc/self/fd"), _count("/proc/self/task")
    gc.collect()
    resident = (process_bytes("VmRSS") or 0) / 1e6
    return (str(number), f"{median:.1f}", f"{late:.1f}", f"{resident:.1f}", str(files), str(threads))


def _count(folder: str) -> int:
    return sum(1 for _ in Path(folder).iterdir())


if __name__ == "__main__":
    main()
