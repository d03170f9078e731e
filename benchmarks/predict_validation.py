"""Errors of predictions: fits the efficiencies to measured times, with parts of them left out.

    python benchmarks/predict_validation.py          # published figures with their errors, and the fitted constants
    python benchmarks/predict_validation.py --cpu    # the same for decoder layers measured here in ONNX Runtime

``published_figures.json`` has the figures with sources and conditions. Efficiencies are fitted to the logarithms of the times, for
each kind of device. The error of a figure comes from a fit without any figure of its decoder; further columns leave out its device
or its runtime, which may have several sources. ``--cpu`` leaves out one hidden size at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from parts.arguments import parser_for

from trio_edge.profiling.predict.models import MODELS
from trio_edge.profiling.predict.speed import Efficiency, Formats, Rates, graph_time, rates_of
from trio_edge.runtime.bundle.manifest import Dimensions, VisionDimensions
from trio_edge.trio.cost.devices import DEVICES
from trio_edge.trio.cost.work import Work, head_work, range_work, vision_work

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from trio_edge.profiling.predict.speed import WeightFormat
    from trio_edge.trio.cost.work import WeightKind

FIGURES = Path(__file__).parent / "published_figures.json"
KINDS = {"jetson": "Jetson Orin", "rtx": "GeForce RTX"}
_NX_SUPER = Rates(flops=19.2e12, bandwidth=102.4e9, low_flops={"int8": 38.4e12})
ASSUMED_RATES = {
    ("edge-llm-0.10", "jetson-orin-nx-16"): _NX_SUPER,
    ("edge-llm-0.10", "jetson-orin-nano-8"): Rates(flops=10.2e12, bandwidth=68e9),
    ("pymllm", "jetson-orin-nx-16"): _NX_SUPER,
}
"""Assumed rates for pages that do not state the power mode and whose figures fit another mode: the NX in Super mode (8 SMs at
1.173 GHz), the Nano without it (0.625 GHz, 68 GB/s)."""
RANGES = {
    "plateau": (0.6, 0.05, 1.2),
    "rows_for_half": (30.0, 0.1, 400.0),
    "attention": (0.4, 0.05, 1.0),
    "bandwidth": (0.8, 0.3, 1.2),
    "launch_s": (5e-6, 1e-7, 1e-3),
    "score_passes": (2.0, 0.1, 60.0),
}
"""Start, least and largest value of each fitted constant."""
GPU_VALUES = ("plateau", "rows_for_half", "attention", "bandwidth", "launch_s")
CPU_VALUES = ("plateau", "rows_for_half", "attention", "bandwidth", "score_passes")
CPU_RUNS = ((64, 0), (256, 0), (1024, 0), (1, 256), (1, 1024), (1, 2944))
"""New rows and cached rows of the measured layers."""


@dataclass(frozen=True)
class Figure:
    """One published time."""

    source: str
    runtime: str
    device: str
    model: str
    decoder: str
    format: WeightFormat
    what: str
    tokens: int
    ms: float
    inputs: bool = False
    """Whether the inputs of the decoder's products have the format of the weights too."""

    @property
    def kind(self) -> str:
        return self.device.split("-")[0]

    @property
    def rates(self) -> Rates:
        return ASSUMED_RATES.get((self.source, self.device)) or rates_of(DEVICES[self.device])

    @property
    def formats(self) -> Formats:
        inputs: frozenset[WeightKind] = frozenset({"layer"} if self.inputs else ())
        return Formats(layer=self.format, inputs=inputs)

    @property
    def format_name(self) -> str:
        return f"{self.format} and inputs" if self.inputs else self.format


def read_figures() -> tuple[list[Figure], dict[str, Any]]:
    """Return the figures, and the rest of the file."""
    values = json.loads(FIGURES.read_text(encoding="utf-8"))
    sources = values["sources"]
    figures = [
        Figure(**{"decoder": entry["model"], "runtime": sources[entry["source"]]["runtime"], **entry})
        for entry in values.pop("figures")
    ]
    values["work"] = functools.cache(lambda figure: _work(figure, values))
    return figures, values


def predicted_ms(figure: Figure, efficiency: Efficiency, known: dict[str, Any]) -> float:
    """Return the predicted time of a figure."""
    times = [
        graph_time(part, formats=figure.formats, rates=figure.rates, efficiency=efficiency)
        for part in known["work"](figure)
    ]
    return 1e3 * sum(time.seconds for time in times)


def _work(figure: Figure, known: dict[str, Any]) -> list[Work]:
    if figure.what == "vision":
        return [_vision(figure, known)]
    decoder = Dimensions(**dict(zip(_DIMENSIONS, known["decoders"][figure.decoder])))
    rows, past = (1, figure.tokens) if figure.what == "decode" else (figure.tokens, 0)
    return [range_work(decoder, layers=range(decoder.num_layers), rows=rows, past=past), head_work(decoder)]


_DIMENSIONS = (
    "num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_size", "intermediate_size", "vocab_size",
)  # fmt: skip


def _vision(figure: Figure, known: dict[str, Any]) -> Work:
    if figure.model == "Qwen2.5-VL-7B":
        tower = MODELS["qwen2.5-vl-7b"].vision
        assert tower is not None
    else:
        tower = VisionDimensions(**known["vision"][figure.model])
    return vision_work(tower, {"P": 4 * figure.tokens, "N": figure.tokens})


def efficiency_of(names: Sequence[str], values: Sequence[float]) -> Efficiency:
    """Return the efficiencies with fitted logarithms ``values`` of ``names``."""
    return Efficiency(**{"launch_s": 0.0, **dict(zip(names, map(math.exp, values)))})


def fit(
    entries: Sequence[Any], predicted: Callable[[Any, Efficiency], float], names: Sequence[str]
) -> Efficiency:
    """Return the efficiencies with the least squares of log errors; large errors have less weight."""
    from scipy.optimize import least_squares

    def residuals(values: Any) -> Any:
        efficiency = efficiency_of(names, values)
        return np.array([math.log(predicted(entry, efficiency) / entry.ms) for entry in entries])

    start, low, high = np.log([RANGES[name] for name in names]).T
    result = least_squares(residuals, start, bounds=(low, high), loss="soft_l1", f_scale=0.1)
    return efficiency_of(names, result.x)


def errors_left_out(
    entries: Sequence[Any],
    predicted: Callable[[Any, Efficiency], float],
    names: Sequence[str],
    same: Callable[[Any], Any],
) -> dict[Any, float]:
    """Return each entry's error in a fit without the entries of equal ``same(entry)``, if any others are left."""
    errors = {}
    for group in {same(entry) for entry in entries}:
        rest = [entry for entry in entries if same(entry) != group]
        if rest:
            efficiency = fit(rest, predicted, names)
            errors |= {
                entry: predicted(entry, efficiency) / entry.ms - 1
                for entry in entries
                if same(entry) == group
            }
    return errors


def spread(errors: Iterable[float]) -> str:
    """Return the median and the 90 % quantile of the errors' sizes."""
    sizes = sorted(map(abs, errors))
    if not sizes:
        return "no figure"
    tenth = sizes[math.ceil(0.9 * len(sizes)) - 1]
    return f"{len(sizes)} figures: median {statistics.median(sizes):.1%}, nine in ten within {tenth:.1%}, worst {sizes[-1]:.1%}"


def print_published(kind: str) -> None:
    """Print every published figure of one kind of device."""
    figures, known = read_figures()
    chosen = [entry for entry in figures if entry.kind == kind]

    def predicted(figure: Figure, efficiency: Efficiency) -> float:
        return predicted_ms(figure, efficiency, known)

    efficiency = fit(chosen, predicted, GPU_VALUES)
    left_out = {
        name: errors_left_out(chosen, predicted, GPU_VALUES, lambda entry, name=name: getattr(entry, name))
        for name in ("decoder", "device", "runtime")
    }
    print(f"\n## {KINDS[kind]}\n\n{efficiency}\n")
    print("| source | device | model | weights | what | tokens | published ms | predicted | fitted | without its decoder"
          " | without its device | without its runtime |\n|---|---|---|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    for entry in chosen:
        ms = predicted(entry, efficiency)
        errors = [ms / entry.ms - 1, *(errors.get(entry, math.nan) for errors in left_out.values())]
        cells = ["" if math.isnan(error) else f"{error:+.0%}" for error in errors]
        print(f"| {entry.source} | {entry.device} | {entry.model} | {entry.format_name} | {entry.what} | {entry.tokens} |"
              f" {entry.ms:.1f} | {ms:.1f} | {' | '.join(cells)} |")  # fmt: skip
    print()
    for name, errors in left_out.items():
        print(f"without its {name}: {spread(errors.values())}")
        for part in ("what", "format_name", "source"):
            for value in sorted({getattr(entry, part) for entry in errors}):
                print(
                    f"    {value}: {spread(errors[entry] for entry in errors if getattr(entry, part) == value)}"
                )
    for source, facts in known["sources"].items():
        print(f"{source}: {facts['title']}, {facts['url']} ({facts['conditions']})")


@dataclass(frozen=True)
class Measured:
    """One time of this CPU."""

    hidden: int
    rows: int
    past: int
    ms: float


def print_cpu(hidden_sizes: Sequence[int]) -> None:
    """Measure decoder layers of several sizes in ONNX Runtime on one thread, and print each with its error."""
    from parts.layer_graphs import HEAD_SIZE, LayerGraphs, dimensions, measured_rates, median_seconds

    rates, runs = measured_rates(), dict[tuple[int, int, int], float]()
    for hidden in (HEAD_SIZE, *hidden_sizes):
        with tempfile.TemporaryDirectory() as folder:
            graphs = LayerGraphs(hidden, Path(folder))
            session = graphs.range_session()
            for rows, past in CPU_RUNS if hidden > HEAD_SIZE else ((1, 1),):
                feeds = graphs.range_feeds(rows=rows, past=past)
                runs[hidden, rows, past] = median_seconds(functools.partial(session.run, None, feeds))
    launch = (
        runs.pop((HEAD_SIZE, 1, 1)) / range_work(dimensions(HEAD_SIZE), layers=(0,), rows=1, past=1).launches
    )
    entries = [Measured(*key, 1e3 * seconds) for key, seconds in runs.items()]
    formats = Formats(layer="float32", bytes_per_element=4)

    def predicted(entry: Measured, efficiency: Efficiency) -> float:
        work = range_work(dimensions(entry.hidden), layers=(0,), rows=entry.rows, past=entry.past)
        launched = dataclasses.replace(efficiency, launch_s=launch)
        return 1e3 * graph_time(work, formats=formats, rates=rates, efficiency=launched).seconds

    efficiency = fit(entries, predicted, CPU_VALUES)
    errors = errors_left_out(entries, predicted, CPU_VALUES, lambda entry: entry.hidden)
    print(f"{rates}\n{efficiency}, a launch {1e6 * launch:.1f} µs, measured with hidden size {HEAD_SIZE}\n")
    print(
        "| hidden | rows | cache | measured ms | predicted | fitted | without its hidden size |\n|---|---|---|---|---|---|---|"
    )
    for entry in entries:
        ms = predicted(entry, efficiency)
        print(f"| {entry.hidden} | {entry.rows} | {entry.past} | {entry.ms:.2f} | {ms:.2f} | {ms / entry.ms - 1:+.0%} |"
              f" {errors[entry]:+.0%} |")  # fmt: skip
    print(f"\nwithout its hidden size: {spread(errors.values())}")


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--cpu", action="store_true", help="measure decoder layers here instead")
    parser.add_argument(
        "--hidden", type=int, nargs="+", default=[1024, 2048, 3072, 4096], help="hidden sizes for --cpu"
    )
    options = parser.parse_args()
    if options.cpu:
        print_cpu(options.hidden)
        return
    for kind in KINDS:
        print_published(kind)


if __name__ == "__main__":
    main()
