"""A long prefill on the CPU in one pass and in chunks: processor time and peak memory of a process, in turns.

    python benchmarks/long_prefill.py --tokens 2900 --rounds 5

The model has the widths of Qwen2.5-VL-3B (16 heads), two decoder layers and random weights; the prompt is text. Runs of the
graph before, as at a process's start, are not counted.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from parts.arguments import parser_for, positive
from parts.peer_files import make_qwen
from parts.tables import markdown

from trio_edge.export.bundle import export_bundle
from trio_edge.export.options import ExportOptions
from trio_edge.runtime.backends import chunked_prefill
from trio_edge.runtime.bundle.schedule import Schedule
from trio_edge.runtime.pipeline import Pipeline

WAYS = ("one pass", "chunks")


def measure(bundle: str, way: str, tokens: int) -> dict[str, float]:
    """Return the seconds of a prefill and the process's memory in GB before and at its peak."""
    if way == "one pass":
        chunked_prefill.LARGEST_SCORES = sys.maxsize
    with Pipeline.from_bundle(bundle, backend="onnxruntime", threads=1) as pipeline:
        answers = [pipeline.generate(None, "the " * count, max_new_tokens=1) for count in (8, tokens)]
        _ = answers[0].text
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        _ = answers[1].text
        seconds = time.process_time() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        rows = answers[1].statistics.text_tokens
    return {"rows": rows, "seconds": seconds, "before": before * 1024 / 1e9, "peak": peak * 1024 / 1e9}


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--tokens", type=positive, default=2900)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--one", nargs=2, metavar=("BUNDLE", "WAY"), help="measure one way in this process")
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(measure(*options.one, options.tokens)))
        return
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, bundle = Path(folder) / "checkpoint", Path(folder) / "bundle"
        make_qwen(checkpoint, layers=2, vision_layers=1)
        export_bundle(
            ExportOptions(
                model=str(checkpoint),
                out=bundle,
                schedule=Schedule(positions="preserved"),
                max_text=options.tokens + 100,
                max_new_tokens=8,
                image_sizes=((56, 56),),
            ),
        )
        for _ in range(options.rounds):
            for way in WAYS:
                command = [sys.executable, __file__, "--tokens", str(options.tokens)]
                done = subprocess.run(
                    [*command, "--one", str(bundle), way], capture_output=True, text=True, check=True
                )
                found[way].append(json.loads(done.stdout))
                print(way, found[way][-1], flush=True)
    rows = []
    for way, runs in found.items():
        cells = [way, f"{runs[0]['rows']:.0f}"]
        for key in ("seconds", "before", "peak"):
            values = sorted(run[key] for run in runs)
            cells.append(f"{statistics.median(values):.2f} ({values[0]:.2f} – {values[-1]:.2f})")
        rows.append(cells)
    print(markdown(("prefill", "text tokens", "processor s", "GB before", "GB at its peak"), rows))


if __name__ == "__main__":
    main()
