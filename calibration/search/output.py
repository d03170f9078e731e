"""Output of a calibration: ``calibration.json``, the bundle, and a printed summary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trio_edge.calibration.search.calibration_file import BUNDLE_NAME, CALIBRATION_NAME, json_of
from trio_edge.export import bundle
from trio_edge.export.options import ExportOptions, Progress
from trio_edge.export.quantize.plan import parse_plan

if TYPE_CHECKING:
    from pathlib import Path

    from trio_edge.calibration.progress import StepProgress
    from trio_edge.calibration.search.calibrate import Calibrated
    from trio_edge.calibration.search.calibration_file import Calibration


def write_calibration(calibrated: Calibrated, folder: Path, progress: StepProgress, *, export: bool) -> None:
    """Write ``calibration.json`` and, with ``export``, the bundle into ``folder``."""
    calibration = calibrated.calibration
    (folder / CALIBRATION_NAME).write_bytes(json_of(calibration))
    if export:
        bundle.export_bundle(
            _export_options(calibration, folder / BUNDLE_NAME),
            scales=calibrated.scales,
            progress=Progress(step=lambda text: progress.step(text, 0)),
        )


def _export_options(calibration: Calibration, out: Path) -> ExportOptions:
    options, shapes = calibration.options, calibration.shapes
    names = ("model", "revision", "dtype", "only_image_sizes", "max_visual", "max_new_tokens")
    same: dict[str, Any] = {name: getattr(options, name) for name in names}
    return ExportOptions(
        out=out,
        schedule=calibration.schedule,
        image_sizes=shapes.image_sizes,
        max_text=shapes.text_buckets[-1],
        text_buckets=shapes.text_buckets,
        quantize=parse_plan(options.quantize),
        **same,
    )


def _export_command(calibration: Calibration) -> str:
    """Return the command that makes the same bundle."""
    if calibration.quantization is not None:  # trio-export has no option for calibrated factors
        return "trio-calibrate --config calibration.json --out AGAIN"
    options, schedule, shapes = calibration.options, calibration.schedule, calibration.shapes
    parts = ["trio-export", options.model]
    if schedule.stages:
        stages = ",".join(f"{stage.layer}:{stage.keep}" for stage in schedule.stages)
        parts += ["--schedule", stages, "--probe-rows", schedule.probe_rows]
        parts += ["--nms-threshold", f"{schedule.nms_threshold:g}", "--nms-rounds", str(schedule.nms_rounds)]
    else:
        parts += ["--keep", "all"]
    parts += ["--positions", schedule.positions]
    parts += [word for size in shapes.image_sizes for word in ("--image-size", "{}x{}".format(*size))]
    parts += ["--only-image-sizes"] if options.only_image_sizes else []
    parts += ["--max-visual", str(options.max_visual)] if options.max_visual is not None else []
    parts += ["--revision", options.revision] if options.revision is not None else []
    parts += ["--max-text", str(shapes.text_buckets[-1])]
    parts += ["--text-buckets", ",".join(map(str, shapes.text_buckets))]
    parts += ["--max-new-tokens", str(options.max_new_tokens), "--dtype", options.dtype]
    parts += ["--quantize", options.quantize] if options.quantize != "none" else []
    return " ".join(parts)


def summary_of(calibration: Calibration, out: Path, *, exported: bool) -> str:
    """Return the lines that ``trio-calibrate`` prints at its end."""
    chosen = calibration.chosen
    stages = ", ".join(f"layer {layer}: {keep}" for layer, keep in chosen.stages) or "none"
    kl, agreement = chosen.held_out.kl, chosen.held_out.agreement
    within = f"({kl.interval_95[0]:.4f} to {kl.interval_95[1]:.4f})"
    same = f"({100 * agreement.interval_95[0]:.1f} to {100 * agreement.interval_95[1]:.1f})"
    flops, milliseconds = chosen.flops / 1e9, chosen.first_token_ms
    whole_flops, whole_ms = calibration.keep_all_flops / 1e9, calibration.keep_all_ms
    lines = [
        f"{calibration.rule}: stages {stages}, average keep {100 * chosen.average_keep:.1f} %",
        f"held out, {chosen.held_out.samples} samples: KL {kl.value:.4f} {within} nats",
        f"same answer as keep-all: {100 * agreement.value:.1f} {same} %",
        *_quantized_lines(calibration),
        *_gradient_lines(calibration),
        f"to the first token: {flops:.4g} GFLOPs (keep-all {whole_flops:.4g})",
        f"predicted for {calibration.options.target}: {milliseconds:.3g} ms (keep-all {whole_ms:.3g})",
        f"{out / CALIBRATION_NAME}{f', {out / BUNDLE_NAME}' if exported else ''}",
        *([] if exported else [_export_command(calibration)]),
    ]
    return "\n".join(lines)


def _gradient_lines(calibration: Calibration) -> list[str]:
    if not calibration.gradients:
        return []
    stages = [stage.layer for stage in calibration.schedule.stages]
    shown = [one for one in calibration.gradients if one.layer in stages] or calibration.gradients
    by_layer = ", ".join(f"layer {one.layer}: {one.spearman.value:.2f}" for one in shown)
    lines = [f"rank correlation of the saliency with the whole model's gradient: {by_layer}"]
    if (kl := calibration.whole_gradient) is not None:
        low, high = kl.interval_95
        lines.append(f"KL if the whole gradient chose: {kl.value:+.4f} ({low:+.4f} to {high:+.4f}) nats")
    return lines


def _quantized_lines(calibration: Calibration) -> list[str]:
    found = calibration.quantized_held_out
    if found is None:
        return []
    low, high = found.kl.interval_95
    within, same = f"({low:.4f} to {high:.4f})", 100 * found.agreement.value
    return [
        f"with {calibration.options.quantize}, held out: KL {found.kl.value:.4f} {within} nats, same answer {same:.1f} %"
    ]
