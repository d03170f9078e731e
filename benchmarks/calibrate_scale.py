"""Time and memory of trio-calibrate at full size, on a checkpoint with a released model's shapes and random weights.

    python benchmarks/calibrate_scale.py --family llava-1.5-7b --folder /tmp/scale --calibrate --quantize int4

The schedule means nothing with random weights; time, memory and the bundle's size do. The samples are drawn images. This
needs disk space for the checkpoint and the bundle, which are deleted at the end.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from parts.arguments import parser_for
from parts.drawn_questions import drawn_questions
from parts.released_shapes import add_options, checkpoint_of
from parts.watched_command import folder_bytes, gigabytes, machine, step_table, watch

WARNING = "trio-calibrate:"


def main() -> None:
    parser = parser_for(__doc__)
    add_options(parser, family="llava-1.5-7b", folder="out/calibrate-scale")
    parser.add_argument(
        "--calibrate", nargs=argparse.REMAINDER, default=[], help="options of trio-calibrate, last"
    )
    options = parser.parse_args()
    out = options.folder / "calibrated"
    with checkpoint_of(options, out) as checkpoint:
        report(checkpoint, out, options)


def report(checkpoint: Path, out: Path, options: argparse.Namespace) -> None:
    arguments = [
        str(checkpoint),
        "--samples",
        str(drawn_questions(100)),
        "--out",
        str(out),
        *options.calibrate,
    ]
    steps, peaks = watch(
        "trio_edge.calibration.search.cli", arguments, is_step=lambda line: not line.startswith(WARNING)
    )
    print(f"{options.family}, {options.dtype}, {' '.join(options.calibrate)}; {machine()}")
    groups = {f"{number + 1}. {step.name}": [step] for number, step in enumerate(steps)}
    print(step_table({**groups, "**all of trio-calibrate**": steps}, peaks))
    source, bundle = folder_bytes(checkpoint), folder_bytes(out / "bundle")
    print(f"checkpoint {gigabytes(source)}, bundle {gigabytes(bundle)} ({bundle / source:.4f}x)")


if __name__ == "__main__":
    main()
