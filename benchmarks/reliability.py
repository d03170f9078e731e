"""Plots accuracy by confidence of each run in a report of ``trio-eval --decide --json``: on the diagonal, probabilities are true.

python benchmarks/reliability.py eval.json reliability.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure  # pyplot would bring windows and state

LARGEST_POINT = 400.0  # square points, for a bin with all questions; a point's area is the share of the questions in its bin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("plot", type=Path)
    arguments = parser.parse_args()
    figure = Figure(figsize=(5.5, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="gray", linewidth=1, label="as sure as right")
    for run in json.loads(arguments.report.read_bytes())["runs"]:
        found = run["reliability"]
        places, accuracy = ([one[name] for one in found["bins"]] for name in ("confidence", "accuracy"))
        counts = [one["questions"] for one in found["bins"]]
        (line,) = axes.plot(
            places, accuracy, label=f"{run['run']['label']}, error {found['calibration_error']:.3f}"
        )
        sizes = [LARGEST_POINT * count / sum(counts) for count in counts]
        axes.scatter(places, accuracy, sizes, color=line.get_color(), alpha=0.4)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy")
    axes.legend()
    figure.savefig(arguments.plot, metadata={"Date": None} if arguments.plot.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
