"""What one run of a bundle's graph computes and moves, from its manifest.

All of it is counted from shapes, but for vision graphs of bundles that say nothing of their tower: these have the manifest's
``cost``, which is for one picture and is scaled by its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trio_edge.runtime.prediction.counting import (
    Work,
    counted_work,
    head_work,
    range_work,
    select_work,
    vision_work,
)
from trio_edge.runtime.prediction.selections import (
    clip_text_flops,
    read_again,
    reduce_flops,
    stage_flops,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trio_edge.runtime.manifest import GraphSpec, Manifest, Profile

_ELEMENT_BYTES = {"float16": 2, "float32": 4, "int8": 1}


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphWork:
    """One run of a graph at one profile."""

    flops: float
    weight_bytes: int
    """Weights that the graph holds, in the bundle's own formats; a run reads each at least once."""
    moved_bytes: float
    """The least that must pass through memory: the weights once, every operand and result once, attention scores never."""
    launches: int
    """Kernels of a fused implementation."""


def graph_work(manifest: Manifest, graph: GraphSpec, profile: Profile) -> GraphWork:
    """Return the work of one run of ``graph`` at the sizes of ``profile``."""
    work = counted(manifest, graph, profile)
    moved = work.moved_bytes(
        dict.fromkeys(("layer", "head", "vision"), 0.0),
        bytes_per_element=_ELEMENT_BYTES[manifest.dtype],
        bytes_per_cached=_ELEMENT_BYTES[manifest.kv_dtype],
    )
    return GraphWork(
        flops=work.flops,
        weight_bytes=graph.weight_bytes,
        moved_bytes=moved + graph.weight_bytes,
        launches=work.launches,
    )


def counted(manifest: Manifest, graph: GraphSpec, profile: Profile) -> Work:
    """Return the products of one run of ``graph``, with sizes that the graph fixes taken from its inputs."""
    sizes = {**fixed_sizes(graph), **profile.sizes}
    decoder = manifest.dimensions
    if graph.role in ("prefix", "segment", "suffix"):
        return range_work(decoder, num_layers=graph.num_layers, rows=sizes["S"], past=sizes["C"])
    if graph.role == "head":
        return head_work(decoder)
    if graph.role == "vision":
        if manifest.vision is None:
            flops = vision_flops(manifest, num_visual=sizes["N"])
            return counted_work(flops, rows=sizes["N"], weights="vision")
        return vision_work(manifest.vision, sizes)
    if graph.role == "clip_text":
        assert manifest.clip_text is not None  # else there is no such graph
        texts = profile.sizes["M"]
        flops = clip_text_flops(manifest, num_texts=texts)
        return counted_work(flops, rows=texts * manifest.clip_text.length, weights="layer")
    if graph.role == "reduce":
        return _reduce_work(manifest, graph, sizes)
    stage = manifest.selects.index(graph)
    one_size = stage > 0 or len(manifest.visual_sizes) == 1
    if manifest.schedule.method != "trio":
        flops = _stage_flops(manifest, sizes, stage=stage, one_size=one_size)
        return counted_work(flops, rows=sizes["N"], weights="layer")
    return select_work(decoder, manifest.schedule, rows=sizes["S"], num_visual=sizes["N"], one_size=one_size)


def vision_flops(manifest: Manifest, *, num_visual: int) -> float:
    """Return the vision graph's FLOPs as the manifest counts them, scaled to ``num_visual`` tokens."""
    return manifest.cost.full_flops["vision"] * num_visual / max(manifest.cost.num_visual, 1)


def _reduce_work(manifest: Manifest, graph: GraphSpec, sizes: Mapping[str, int]) -> Work:
    method, keep, num_visual = manifest.token_method, manifest.token_keep, sizes["N"]
    assert method is not None and keep is not None  # else there is no such graph
    num_text = (
        sizes.get("T", 0) if manifest.clip_text is None else sizes["M"] * (manifest.clip_text.length - 2)
    )
    flops = reduce_flops(graph, method, num_visual=num_visual, num_keep=keep, num_text=num_text)
    again = read_again(method, num_visual=num_visual, num_keep=keep)
    return counted_work(flops, rows=num_visual, other=again * 4 / _ELEMENT_BYTES[manifest.dtype])


def _stage_flops(manifest: Manifest, sizes: Mapping[str, int], *, stage: int, one_size: bool) -> float:
    num_text = sizes["S"] - sizes["N"]
    return stage_flops(
        manifest.dimensions,
        manifest.schedule,
        stage=stage,
        num_visual=sizes["N"],
        num_text=num_text,
        prompt_visual=sizes.get("F", num_text) - num_text,
        one_size=one_size,
    )


def fixed_sizes(graph: GraphSpec) -> dict[str, int]:
    """Return the sizes of axes that are numbers in the graph because all profiles have the same."""
    names = {
        "hidden_states": {1: "S"},
        "inputs_embeds": {1: "S"},
        "visual_rows": {0: "N"},
        "visual_tokens": {0: "N"},
        "pixel_values": {0: "B"},
        "patch_positions": {1: "P"},
        "token_index": {0: "N"},
        "prompt_embeds": {1: "F"},
        "text_embeds": {0: "T"},
    }
    sizes: dict[str, int] = {}
    for tensor in graph.inputs:
        for axis, symbol in names.get(tensor.name, {}).items():
            size = tensor.shape[axis]
            if isinstance(size, int):
                sizes[symbol] = size
    return sizes
