"""Markdown tables of counted and of measured figures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from gpu_parts.ceilings import Ceilings
from gpu_parts.count import DECODE, Counted, Work, flops, seconds
from gpu_parts.layers_in_torch import WHOLE_MODEL
from gpu_parts.measure import Measured
from gpu_parts.parity import Compared
from parts.tables import markdown, percent

from trio_edge.trio.cost.devices import DEVICES

_NOTHING = "–"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way with one schedule, or the reason why it could not be measured."""

    model: str
    keep: float
    counted: Counted
    measured: Measured | None
    way: str
    problem: str = ""


def count_tables(counted: Mapping[tuple[str, float], Counted]) -> str:
    """Return the counted costs of models and of their graphs at each keep, and the least times on known devices."""
    summary, graphs = [], []
    for (model, keep), this in counted.items():
        full = counted[model, 1.0]
        ratios = [
            flops(full.prefill()) / flops(this.prefill()),
            flops(full.decoder()) / flops(this.decoder()),
            _causal(full) / _causal(this),
        ]
        summary.append(
            (
                model,
                percent(keep),
                tera(flops(this.prefill())),
                tera(flops(this.decoder())),
                *(f"{ratio:.2f}×" for ratio in ratios),
                percent(flops(this.selects()) / flops(this.decoder())),
                f"{this.kv_bytes / 1e6:.0f}",
                f"{full.kv_bytes / this.kv_bytes:.2f}×",
            )
        )
        graphs.append((model, percent(keep), *_per_graph(this.graphs)))
    heads = (
        "model", "keep", "prefill TFLOP", "decoder TFLOP", "prefill, times fewer", "decoder, times fewer",
        "decoder, causal half", "selection", "KV MB", "times fewer",
    )  # fmt: skip
    names = ("vision", "prefix", "selects", "segments", "suffix", "head", DECODE)
    device_heads = (
        "model", "device", "keep", "vision ms", "decoder ms", "times less", "selection", "decode ms/token",
    )  # fmt: skip
    return "\n\n".join(
        (
            markdown(heads, summary),
            "Each graph, TFLOP / GB (least FLOPs and least bytes; several are separated by +):",
            markdown(("model", "keep", *names), graphs),
            "Least times on known devices, from their rates (those of docs/prediction.md) and these counts:",
            markdown(device_heads, _least_times(counted)),
        )
    )


def _causal(counted: Counted) -> float:
    return sum(work.causal_flops for work in counted.decoder())


@dataclass(frozen=True)
class _TargetRates:
    flops_per_s: float
    bytes_per_s: float


def _least_times(counted: Mapping[tuple[str, float], Counted]) -> Iterator[Sequence[str]]:
    """Yield keep-all and the smallest keep of each model, on each device that has room for the weights."""
    least = min(keep for _, keep in counted)
    for model in dict.fromkeys(name for name, _ in counted):
        full = counted[model, 1.0]
        for target in DEVICES.values():
            if full.decode.num_bytes + full.graphs["vision"].num_bytes > target.usable_bytes:
                continue
            rates = _TargetRates(target.fp16_flops, target.bandwidth_bytes_per_s)
            whole = seconds(full.decoder(), rates)
            for keep in dict.fromkeys((1.0, least)):
                this = counted[model, keep]
                decoder = seconds(this.decoder(), rates)
                yield (
                    model,
                    target.name,
                    percent(keep),
                    ms(1e3 * this.graphs["vision"].seconds(rates)),
                    ms(1e3 * decoder),
                    f"{whole / decoder:.2f}×",
                    percent(seconds(this.selects(), rates) / decoder),
                    ms(1e3 * this.decode.seconds(rates)),
                )


def _per_graph(graphs: Mapping[str, Work]) -> list[str]:
    def cell(name: str) -> str:
        found = [work for key, work in graphs.items() if key == name or key.startswith(f"{name[:-1]}_")]
        return (
            " + ".join(f"{tera(work.flops)} / {giga(work.num_bytes)}" for work in found)
            if found
            else _NOTHING
        )

    return [cell(name) for name in ("vision", "prefix", "selects", "segments", "suffix", "head", DECODE)]


def parity_table(compared: Sequence[Compared]) -> str:
    """Return the comparison of all backends with ONNX Runtime on the CPU."""
    rows = []
    for this in compared:
        cells = (f"does not run: {this.reason}", "", "")
        if this.runs:
            cells = (
                "the same" if this.same_kept else "DIFFERENT",
                f"{this.largest_difference:.1e}",
                "yes" if this.within else "NO",
            )
        rows.append((this.way, *cells))
    return markdown(("backend", "kept tokens", "largest difference of a logit", "within tolerance"), rows)


def measured_table(rows: Sequence[Row], ceilings: Ceilings) -> str:
    """Return all rows; ratios are to the fastest whole model in torch of the same run."""
    heads = (
        "model", "keep", "way", "vision", "prefix", "selects", "segments", "suffix", "head", "decoder ms", "TTFT ms",
        "decode ms/token", "peak GB", "KV MB", "decoder", "TTFT", "KV", "selection", "bound ms", "TFLOP/s", "GB/s in decode",
    )  # fmt: skip
    return markdown(heads, [_cells(row, rows, ceilings) for row in rows])


def _cells(row: Row, rows: Sequence[Row], ceilings: Ceilings) -> Sequence[str]:
    start = (row.model, percent(row.keep), row.way)
    this = row.measured
    if this is None:
        return (*start, row.problem, *[""] * 17)
    whole = min(
        (
            other.measured
            for other in rows
            if other.model == row.model and other.way.startswith(WHOLE_MODEL) and other.measured is not None
        ),
        key=lambda measured: measured.ttft_ms,
        default=None,
    )
    selects = sum(_times(this, "select_"))
    decoder = decoder_ms(this)
    causal_flops = sum(work.causal_flops for work in row.counted.prefill())
    flops_per_s = causal_flops / (1e-3 * this.ttft_ms)
    bytes_per_s = row.counted.decode.num_bytes / (1e-3 * this.decode_ms)
    return (
        *start,
        *(
            _joined(_times(this, name))
            for name in ("vision", "prefix", "select_", "segment_", "suffix", "head")
        ),
        ms(decoder),
        ms(this.ttft_ms),
        ms(this.decode_ms),
        _NOTHING if this.peak_bytes is None else giga(this.peak_bytes),
        f"{this.kv_bytes / 1e6:.1f}",
        *(
            [_NOTHING] * 3
            if whole is None
            else [
                f"{decoder_ms(whole) / decoder:.2f}×",
                f"{whole.ttft_ms / this.ttft_ms:.2f}×",
                f"{whole.kv_bytes / this.kv_bytes:.2f}×",
            ]
        ),
        percent(selects / decoder),
        ms(1e3 * seconds(row.counted.prefill(), ceilings)),
        f"{tera(flops_per_s)} ({percent(flops_per_s / ceilings.flops_per_s)})",
        f"{bytes_per_s / 1e9:.1f} ({percent(bytes_per_s / ceilings.bytes_per_s)})",
    )


def decoder_ms(measured: Measured) -> float:
    """Return the prefill's time without vision."""
    return sum(time for name, time in measured.parts_ms.items() if name != "vision")


def _times(measured: Measured, name: str) -> list[float]:
    return [time for key, time in measured.parts_ms.items() if key == name or key.startswith(name)]


def _joined(times: Iterable[float]) -> str:
    return " + ".join(ms(time) for time in times) or _NOTHING


def ms(value: float) -> str:
    """Return milliseconds with three digits or more."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def tera(value: float) -> str:
    """Return in units of 10^12."""
    return f"{value / 1e12:.3g}"


def giga(value: float) -> str:
    """Return in units of 10^9."""
    return f"{value / 1e9:.3g}"
