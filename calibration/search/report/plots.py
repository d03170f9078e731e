"""The plots of a calibration as SVG text that can stand inside a page: no file, no window, no network."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio_edge.calibration.quantize.report import GroupError, QuantizationReport
    from trio_edge.calibration.search.report.calibration_file import Calibration, FrontPoint

_INK, _FAINT = "#20222b", "#6e7278"
_SEARCH, _HELD_OUT, _CHOSEN, _USUAL = "#9aa1ab", "#1f6feb", "#c43d00", "#7a4fb5"
_LEAST_KL = 1e-5
"""Nats; what is smaller is drawn here, where the logarithm ends."""


def front_plot(calibration: Calibration) -> str:
    """Return divergence and agreement against cost, with 95 % intervals of the held-out samples."""
    figure = _figure(height=4.0)
    left, right = figure.subplots(1, 2)
    front = calibration.front
    costs = [_cost(calibration, point) for point in front]
    left.plot(
        costs,
        [_visible(point.search.kl.value) for point in front],
        "o-",
        color=_SEARCH,
        markersize=3,
        linewidth=1,
        label="search samples",
    )
    _with_intervals(left, costs, front, "kl", color=_HELD_OUT, label="held-out samples")
    _with_intervals(right, costs, front, "agreement", color=_HELD_OUT, label="held-out samples")
    marked = [(calibration.chosen, "*", _CHOSEN, "chosen")]
    if calibration.usual is not None:
        marked.append((calibration.usual, "D", _USUAL, "trio-export's own, same keep"))
    for point, marker, color, label in marked:
        for axes, value in (
            (left, _visible(point.held_out.kl.value)),
            (right, 100 * point.held_out.agreement.value),
        ):
            size = 13 if marker == "*" else 6
            axes.plot(
                [_cost(calibration, point)],
                [value],
                marker,
                color=color,
                markersize=size,
                label=label,
                zorder=5,
            )
    if calibration.options.max_kl:
        left.axhline(calibration.options.max_kl, color=_CHOSEN, linewidth=0.8, linestyle="--")
    left.set_yscale("log")
    left.set_ylabel("KL to keep-all, nats")
    right.set_ylabel("same answer as keep-all, %")
    for axes in (left, right):
        axes.set_xlabel(_cost_label(calibration))
    left.legend(frameon=False, fontsize=8)
    return _svg(figure, name="front")


def layers_plot(calibration: Calibration) -> str:
    """Return the divergence of each single stage by its layer, one line per budget."""
    figure = _figure(height=3.6)
    axes = figure.subplots()
    keeps = sorted({stage.keep for stage in calibration.single_stages})
    colors = _shades(len(keeps))
    for keep, color in zip(keeps, colors):
        stages = sorted(
            (stage for stage in calibration.single_stages if stage.keep == keep),
            key=lambda stage: stage.layer,
        )
        axes.plot(
            [stage.layer for stage in stages],
            [_visible(stage.kl) for stage in stages],
            "o-",
            markersize=3,
            linewidth=1.2,
            color=color,
            label=f"keep {keep}",
        )
    _mark_stages(axes, calibration)
    axes.set_yscale("log")
    axes.set_xlabel("layer in front of which one stage alone reduces")
    axes.set_ylabel("KL to keep-all, nats")
    axes.legend(frameon=False, fontsize=8, ncols=2)
    return _svg(figure, name="layers")


def importance_plot(calibration: Calibration) -> str:
    """Return attention, saliency and its concentration by layer."""
    figure = _figure(height=3.2)
    parts = figure.subplots(1, 3)
    layers = [layer.layer for layer in calibration.importance]
    curves = (
        ("attention on visual tokens, %", [100 * layer.attention_share for layer in calibration.importance]),
        ("saliency mass, nats", [layer.saliency_mass for layer in calibration.importance]),
        ("tokens that carry it, %", [100 * layer.effective_share for layer in calibration.importance]),
    )
    for axes, (title, values) in zip(parts, curves):
        axes.plot(layers, values, "o-", markersize=3, linewidth=1.2, color=_HELD_OUT)
        _mark_stages(axes, calibration)
        axes.set_title(title, fontsize=10, color=_INK)
        axes.set_xlabel("layer")
        axes.set_ylim(bottom=0)
    return _svg(figure, name="importance")


def quantization_plot(report: QuantizationReport) -> str:
    """Return the error of every group of linear layers by layer, and what rounding to nearest would leave.

    A row of vision layers, if they are quantized, and one of decoder layers; empty if neither are.
    """
    rows: dict[str, dict[str, list[GroupError]]] = {}
    for error in report.errors:
        if error.layer is not None:
            rows.setdefault(error.part, {}).setdefault(error.group, []).append(error)
    if not rows:
        return ""
    figure = _figure(height=0.4 + 3.0 * len(rows))
    panels = figure.subplots(len(rows), 4, sharey=True, squeeze=False)
    for row, (part, by_group) in zip(panels, rows.items()):
        for axes, (group, errors) in zip(row, by_group.items()):
            _error_panel(axes, errors)
            axes.set_title(f"{part}: {group.replace('_', ', ')}", fontsize=10, color=_INK)
        for axes in row[len(by_group) :]:  # groups that INT4 cannot express
            axes.remove()
        row[0].set_ylabel("squared error of the outputs, %")
    panels[0, 0].legend(frameon=False, fontsize=8)
    return _svg(figure, name="quantization")


def _error_panel(axes: Any, errors: Sequence[GroupError]) -> None:
    layers = [error.layer for error in errors]
    for name, color in (("rounded", _SEARCH), ("calibrated", _HELD_OUT)):
        shares = [100 * getattr(error, name) for error in errors]
        axes.plot(layers, shares, "o-", markersize=3, linewidth=1.2, color=color, label=name)
    axes.set_xlabel("layer")
    axes.set_yscale("log")


def _figure(*, height: float) -> Any:
    from matplotlib.figure import Figure  # without pyplot: no window, no state

    return Figure(figsize=(9.6, height), layout="constrained")


def _svg(figure: Any, *, name: str) -> str:
    """Return the figure as an ``svg`` element; ids are its own, so that several can stand in one page."""
    import matplotlib

    for axes in figure.axes:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_FAINT, labelsize=8)
    out = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(out, format="svg", metadata=nothing)
    text = out.getvalue()
    element = text[text.index("<svg") :]
    for prefix in ('id="', "url(#", 'href="#'):
        element = element.replace(prefix, f"{prefix}{name}-")
    return element


def _with_intervals(
    axes: Any, costs: Sequence[float], front: Sequence[FrontPoint], measure: str, *, color: str, label: str
) -> None:
    found = [getattr(point.held_out, measure) for point in front]
    scaled = [
        (_visible(one.value), *map(_visible, one.interval_95))
        if measure == "kl"
        else (100 * one.value, 100 * one.interval_95[0], 100 * one.interval_95[1])
        for one in found
    ]
    below = [max(0.0, value - low) for value, low, _ in scaled]
    above = [max(0.0, high - value) for value, _, high in scaled]
    axes.errorbar(
        list(costs),
        [value for value, _, _ in scaled],
        yerr=(below, above),
        fmt="o",
        markersize=4,
        linewidth=1,
        elinewidth=0.7,
        capsize=2,
        color=color,
        label=label,
    )


def _cost(calibration: Calibration, point: FrontPoint) -> float:
    return point.first_token_ms if calibration.compared_by == "time" else point.flops / 1e9


def _cost_label(calibration: Calibration) -> str:
    if calibration.compared_by == "time":
        return f"predicted ms to the first token, {calibration.options.target}"
    return "GFLOPs of the prefill with the vision encoder"


def _mark_stages(axes: Any, calibration: Calibration) -> None:
    for layer, _keep in calibration.chosen.stages:
        axes.axvline(layer, color=_CHOSEN, linewidth=0.8, linestyle="--")


def _shades(count: int) -> list[Any]:
    import matplotlib

    colors = matplotlib.colormaps["viridis_r"]
    return [colors(0.15 + 0.8 * index / max(count - 1, 1)) for index in range(count)]


def _visible(kl: float) -> float:
    return max(kl, _LEAST_KL)
