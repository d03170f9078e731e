"""What a calibration costs at full size: trio-calibrate on a checkpoint with a released model's shapes and random weights.

    python benchmarks/calibrate_scale.py --family llava-1.5-7b --folder /tmp/scale --calibrate --quantize int4 --keep 11.1%

What is found means nothing, as the weights do; time, memory and the bundle's size do. The samples are synthetic pictures.
Free space for the checkpoint and the bundle is needed; both are deleted at the end.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from released_shapes import FAMILIES, SAFETENSORS_DTYPES, make_checkpoint
from watched_command import folder_bytes, gigabytes, machine, step_table, watch

WARNING = "trio-calibrate:"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=list(FAMILIES), default="llava-1.5-7b")
    parser.add_argument("--layers", type=int, help="decoder layers (default: the family's)")
    parser.add_argument(
        "--dtype", choices=list(SAFETENSORS_DTYPES), default="float16", help="of the checkpoint"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("out/calibrate-scale"), help="new folder for everything"
    )
    parser.add_argument("--keep-files", action="store_true", help="keep the checkpoint, reuse it next time")
    parser.add_argument(
        "--calibrate", nargs=argparse.REMAINDER, default=[], help="the rest goes to trio-calibrate"
    )
    options = parser.parse_args()
    checkpoint, out = options.folder / "checkpoint", options.folder / "calibrated"
    if not checkpoint.exists():
        make_checkpoint(
            checkpoint,
            family=FAMILIES[options.family],
            num_layers=options.layers,
            dtype=options.dtype,
            shard_bytes=int(5e9),
        )
    try:
        report(checkpoint, out, options)
    finally:
        if not options.keep_files:
            shutil.rmtree(out, ignore_errors=True)
            shutil.rmtree(checkpoint, ignore_errors=True)


def report(checkpoint: Path, out: Path, options: argparse.Namespace) -> None:
    arguments = [str(checkpoint), "--samples", "shapes", "--out", str(out), *options.calibrate]
    steps, peaks = watch(
        "trio_edge.calibration.cli_calibrate", arguments, is_step=lambda line: not line.startswith(WARNING)
    )
    print(f"{options.family}, {options.dtype}, {' '.join(options.calibrate)}; {machine()}")
    groups = {f"{number + 1}. {step.name}": [step] for number, step in enumerate(steps)}
    print("\n".join(step_table({**groups, "**all of trio-calibrate**": steps}, peaks)))
    source, bundle = folder_bytes(checkpoint), folder_bytes(out / "bundle")
    print(f"checkpoint {gigabytes(source)}, bundle {gigabytes(bundle)} ({bundle / source:.4f}x)")


if __name__ == "__main__":
    main()
