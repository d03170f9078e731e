"""``trio-inspect BUNDLE``: prints the content and the cost of a bundle as a table or as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trio_edge.runtime.bundle.errors import printable
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.cli.console import run
from trio_edge.runtime.cli.tables import profile_list
from trio_edge.runtime.devices.memory import estimate
from trio_edge.runtime.engines.files import engine_sets

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio_edge.runtime.bundle.manifest import GraphSpec, Manifest


@click.command("trio-inspect", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--io", "show_io", is_flag=True, help="Also list the inputs and outputs of every graph.")
@click.option("--verify", is_flag=True, help="Check the SHA-256 of every file, large weight files included.")
def command(bundle: Path, as_json: bool, show_io: bool, verify: bool) -> int:
    """Print the graphs, sizes, schedule and cost of BUNDLE."""
    manifest = open_bundle(bundle, hash_all=verify).manifest
    if as_json:
        print(json.dumps({**summary(manifest), "engines": _engines(bundle)}, indent=1))
        return 0
    console = Console()
    _print(console, manifest)
    if show_io:
        table = Table("graph", "direction", "tensor", "dtype", "shape")
        for graph in manifest.graphs:
            for tensor in graph.tensors:
                direction = "in" if tensor in graph.inputs else "out"
                table.add_row(graph.name, direction, tensor.name, tensor.dtype, str(list(tensor.shape)))
        console.print(table)
    for entry in _engines(bundle):
        size = f"{len(entry['graphs'])} graphs, {entry['num_bytes'] / 1e6:.1f} MB"
        built = f"{entry['backend']} {entry['tensorrt_version']}, {entry['platform']}"
        _print_line(console, "engines", printable(f"{entry['target']}: {size}, {built}"))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(command, argv)


def _decode_rows(manifest: Manifest) -> int:
    return manifest.program("decode").sizes[-1]["T"]


def summary(manifest: Manifest) -> dict[str, Any]:
    """Return the facts that ``--json`` prints: sizes in bytes, ``average_keep`` as a fraction."""
    cost = manifest.cost
    flops: dict[str, Any] = {"full": cost.full_flops, "reduced": cost.reduced_flops}
    flops["ratio"] = sum(cost.full_flops.values()) / sum(cost.reduced_flops.values())
    return {
        **_values(manifest, "model", "family", "dtype", "opset", "max_visual", "max_images"),
        "takes_videos": manifest.video_processing is not None,
        "follow_ups": any(program.name == "question" for program in manifest.programs),
        "decode_rows": _decode_rows(manifest),
        "batch": manifest.batch,
        "visual_sizes": list(manifest.visual_sizes),
        "image_sizes": [
            {**_values(size, "width", "height", "num_visual"), "padding": size.rows - size.num_visual}
            for size in manifest.image_sizes
        ],
        **_values(manifest, "text_buckets", "max_new_tokens"),
        **_values(manifest, "schedule", "encoder_keep", "token_method", "token_keep"),
        "average_keep": manifest.average_keep,
        "flops": {**_values(cost, "num_visual", "num_text"), **flops},
        "kv": {
            "dtype": manifest.kv_dtype,
            "allocated_bytes": manifest.kv_bytes,
            "prefill_bytes": cost.reduced_kv_bytes,
            "full_prefill_bytes": cost.full_kv_bytes,
            "ratio": cost.full_kv_bytes / cost.reduced_kv_bytes,
        },
        "weights": {
            "model_bytes": manifest.model_bytes,
            "device_ratio": manifest.device_weight_ratio,
            "bundle_bytes": sum(entry.num_bytes for entry in manifest.files),
        },
        "level": manifest.level,
        "levels": [_level_facts(manifest, name) for name in manifest.level_names if manifest.levels],
        "graphs": [
            {
                **_values(graph, "name", "role", "file"),
                "layers": _layers(graph),
                **_values(graph, "weight_bytes", "inputs", "outputs", "profiles"),
            }
            for graph in manifest.graphs
        ],
        "tools": manifest.tools,
    }


def _level_facts(manifest: Manifest, name: str) -> dict[str, Any]:
    level = manifest.at_level(name)
    return {
        "name": name,
        **_values(level, "visual_sizes", "schedule"),
        "average_keep": level.average_keep,
        "flops": sum(level.cost.reduced_flops.values()),
        "kv_bytes": level.cost.reduced_kv_bytes,
        "memory": estimate(
            level, level.graphs, weight_bytes=sum(graph.weight_bytes for graph in level.graphs)
        ),
    }


def _values(source: object, *names: str) -> dict[str, Any]:
    return {name: msgspec.to_builtins(getattr(source, name)) for name in names}


def _levels_table(manifest: Manifest, levels: Sequence[dict[str, Any]], headers: Sequence[str]) -> Table:
    table = Table(*headers)
    for level in levels:
        stages = ", ".join(f"{stage['layer']}:{stage['keep']}" for stage in level["schedule"]["stages"])
        table.add_row(
            level["name"] + " (default)" * (level["name"] == manifest.level),
            str(level["visual_sizes"][-1]),
            stages or "keeps all",
            f"{100 * level['average_keep']:.1f} %",
            f"{level['flops'] / 1e9:.2f}",
            f"{level['kv_bytes'] / 1e6:.2f}",
            f"{sum(level['memory'].values()) / 1e6:.1f}",
        )
    return table


def _engines(bundle: Path) -> list[dict[str, Any]]:
    """Return the bundle's engines, whether or not they run on this machine."""
    names = ("backend", "tensorrt_version", "compute_capabilities", "platform", "num_bytes")
    return [
        {"target": target, **_values(found, *names), "graphs": [entry.graph for entry in found.engines]}
        for target, found in engine_sets(bundle).items()
    ]


def _layers(graph: GraphSpec) -> str:
    if graph.first_layer is None:
        return ""
    if graph.num_layers == 0:
        return f"probes {graph.first_layer}"
    return f"{graph.first_layer}..{graph.first_layer + graph.num_layers - 1}"


def _visual_sizes(manifest: Manifest) -> str:
    """Return the number of visual tokens of each exported image size, and its padding."""
    parts = [
        f"{size.num_visual} for {size.width}x{size.height}"
        + (f" (+{size.rows - size.num_visual} padding)" if size.rows > size.num_visual else " (no padding)")
        for size in manifest.image_sizes
    ]
    if manifest.max_images > 1:
        is_shared = manifest.schedule.budget == "prompt"
        kept = "all images share what is kept" if is_shared else "each keeps a share"
        parts.append(f"up to {manifest.max_visual} for {manifest.max_images} images; {kept}")
    elif manifest.max_visual > max((size.rows for size in manifest.image_sizes), default=0):
        parts.append(f"any image padded to {manifest.max_visual}")
    return ", ".join(parts)


def _print_line(console: Console, name: str, text: str) -> None:
    console.print(f"[bold]{name:14}[/] {escape(text)}", highlight=False, soft_wrap=True)


def _print(console: Console, manifest: Manifest) -> None:
    facts = summary(manifest)
    schedule, flops, kv, weights = facts["schedule"], facts["flops"], facts["kv"], facts["weights"]
    total = {name: sum(flops[name].values()) / 1e9 for name in ("reduced", "full")}
    lines = {
        "model": f"{manifest.model} ({manifest.family}), {manifest.dtype}, opset {manifest.opset}",
        "visual tokens": _visual_sizes(manifest),
        "text": f"padded to {list(manifest.text_buckets)} tokens; {manifest.max_new_tokens} new tokens,"
        f" up to {_decode_rows(manifest)} a step"
        + f"; {manifest.batch} answers decode together"
        * (manifest.batch > 1),
        "selection": (
            f"{manifest.selection} ({schedule['probe_rows']} probe rows, {schedule['positions']} positions)"
        ),
        "average keep": f"{100 * manifest.average_keep:.1f} %",
        "FLOPs": (
            f"{total['reduced']:.2f} G against {total['full']:.2f} G ({flops['ratio']:.2f}x)"
            f" at {flops['num_visual']} visual and {flops['num_text']} text tokens"
        ),
        "KV cache": (
            f"{kv['prefill_bytes'] / 1e6:.2f} MB against {kv['full_prefill_bytes'] / 1e6:.2f} MB"
            f" ({kv['ratio']:.2f}x), {kv['dtype']}; {kv['allocated_bytes'] / 1e6:.2f} MB allocated"
        ),
        "weights": (
            f"{weights['model_bytes'] / 1e6:.1f} MB model, {weights['device_ratio']:.3f}x in the graphs;"
            f" bundle {weights['bundle_bytes'] / 1e6:.1f} MB"
        ),
    }
    for name, text in lines.items():
        _print_line(console, name, text)
    if facts["levels"]:
        headers = "level", "visual tokens", "stages", "average keep", "GFLOPs", "KV MB", "memory MB"
        console.print(_levels_table(manifest, facts["levels"], headers))
    table = Table("graph", "layers", "weights MB", "profiles")
    for graph in manifest.graphs:
        weights = f"{graph.weight_bytes / 1e6:.2f}"
        table.add_row(graph.name, _layers(graph), weights, profile_list(graph))
    console.print(table)
