"""The work of a bundle's graphs, counted from the shapes in its manifest.

If the manifest does not describe the vision tower, the vision graph's work is the manifest's ``cost`` of one image, scaled
by the number of visual tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trio_edge.runtime.bundle import graph_io as io
from trio_edge.trio.cost.flops import stage_work
from trio_edge.trio.cost.selections import StageSizes, TokenSizes, candidate_work, trio_work
from trio_edge.trio.cost.work import ELEMENT_BYTES, Work, counted_work, head_work, range_work, vision_work
from trio_edge.trio.methods import token_method

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trio_edge.runtime.bundle.manifest import GraphSpec, Manifest, Profile
    from trio_edge.trio.cost.selections import TokenCost, TrioPiece


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphWork:
    """One run of a graph at one profile."""

    flops: float
    weight_bytes: int
    """Weights that a run reads, in the bundle's own formats."""
    moved_bytes: float
    """Least memory traffic: weights, operands and results once, attention scores never."""
    launches: int
    """Kernel launches of a fused implementation."""


def graph_work(manifest: Manifest, graph: GraphSpec, profile: Profile) -> GraphWork:
    """Return the work of one run of ``graph`` at the sizes of ``profile``."""
    work, weights = counted(manifest, graph, profile), graph.part_at(profile).weight_bytes
    moved = work.moved_bytes(
        bytes_per_element=ELEMENT_BYTES[manifest.dtype], bytes_per_cached=ELEMENT_BYTES[manifest.kv_dtype]
    )
    return GraphWork(
        flops=work.flops, weight_bytes=weights, moved_bytes=moved + weights, launches=work.launches
    )


def counted(manifest: Manifest, graph: GraphSpec, profile: Profile) -> Work:
    """Return the products of one run of ``graph``; sizes that are not in ``profile`` come from the graph's inputs."""
    sizes = {**fixed_sizes(graph), **profile.sizes}
    clip = manifest.clip_text
    if graph.role == "vision" and manifest.vision is not None:
        return vision_work(manifest.vision, sizes)
    if graph.role == "vision":
        flops = vision_flops(manifest, num_visual=sizes["N"])
        return counted_work(flops, rows=sizes["N"], weights="vision")
    if graph.role == "clip_text" and clip is not None:
        flops = clip_text_flops(manifest, num_texts=sizes["M"])
        return counted_work(flops, rows=sizes["M"] * clip.length, weights="layer")
    if graph.role == "reduce":
        num_text = sizes.get("T", 0) if clip is None else sizes["M"] * (clip.length - 2)
        cost = reduce_cost(manifest, num_visual=sizes["N"], num_text=num_text)
        # The greedy loop reads float32, while ``other`` counts elements of the model's type.
        other = cost.read_again * 4 / ELEMENT_BYTES[manifest.dtype]
        return counted_work(cost.flops, rows=sizes["N"], other=other)
    if io.CANDIDATE_ROWS in graph.input_names:
        return candidate_work(manifest.dimensions, manifest.schedule)
    if io.is_probe(graph.part_at(profile)):
        return _probe_work(manifest, sizes, is_quantized=io.goes_around_mlp(graph))
    if graph.role == "select":
        return _select_work(manifest, manifest.selects.index(graph), sizes)
    if graph.role == "head":
        return head_work(manifest.dimensions, rows=sizes.get("L", 1))
    return range_work(manifest.dimensions, layers=graph.layers, rows=sizes["S"], past=sizes["C"])


def vision_flops(manifest: Manifest, *, num_visual: int) -> float:
    """Return the manifest's count of the vision graph's FLOPs, scaled to ``num_visual`` tokens."""
    return manifest.cost.full_flops["vision"] * num_visual / max(manifest.cost.num_visual, 1)


def clip_text_flops(manifest: Manifest, *, num_texts: int) -> float:
    """Return the manifest's count of the FLOPs of CLIP's text tower, scaled to ``num_texts`` texts."""
    assert manifest.clip_text is not None  # else there is no such graph
    counted_texts = io.num_clip_texts(manifest.cost.num_text, length=manifest.clip_text.length)
    return manifest.cost.reduced_flops["clip_text"] * num_texts / counted_texts


def reduce_cost(manifest: Manifest, *, num_visual: int, num_text: int) -> TokenCost:
    """Return the FLOPs and reads of the selection before the decoder."""
    assert manifest.token_method is not None  # else there is no such graph
    assert manifest.token_keep is not None
    widths = input_widths(manifest.graph("reduce"))
    return token_method(manifest.token_method).cost(
        TokenSizes(num_visual, manifest.token_keep, num_text, widths)
    )


def _select_work(manifest: Manifest, stage: int, sizes: Mapping[str, int]) -> Work:
    num_text = sizes["S"] - sizes["N"]
    stage_sizes = StageSizes(
        num_visual=sizes["N"],
        num_keep=manifest.schedule.stages[stage].keep,
        num_text=num_text,
        prompt_visual=sizes.get("F", num_text) - num_text,
        one_size=stage > 0 or len(manifest.visual_sizes) == 1,
    )
    if io.SALIENCY in manifest.selects[stage].input_names:
        return trio_work(manifest.dimensions, manifest.schedule, stage_sizes, pieces=("select",))
    return stage_work(manifest.dimensions, manifest.schedule, stage_sizes, weights="layer")


def _probe_work(manifest: Manifest, sizes: Mapping[str, int], *, is_quantized: bool) -> Work:
    """Return the work of one piece of a probe of a layer, which is quantized or not."""
    letter = "P" if "PS" in sizes else "G"
    visual, rows = sizes.get(f"{letter}N", 0), sizes.get(f"{letter}S", 0)
    stage = StageSizes(visual, num_keep=0, num_text=rows - visual, prompt_visual=0)
    name: TrioPiece = "gradient"
    if rows:
        name = "probe" if letter == "P" else "saliency"
    return trio_work(manifest.dimensions, manifest.schedule, stage, pieces=(name,), is_quantized=is_quantized)


def fixed_sizes(graph: GraphSpec) -> dict[str, int]:
    """Return the sizes of the axes that are fixed in the graph because all profiles agree on them."""
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
    return {
        symbol: size
        for tensor in graph.inputs
        for axis, symbol in names.get(tensor.name, {}).items()
        if isinstance(size := tensor.shape[axis], int)
    }


def input_widths(graph: GraphSpec) -> dict[str, int]:
    """Return the last axis of each graph input whose last axis is fixed."""
    return {tensor.name: size for tensor in graph.inputs if isinstance(size := tensor.shape[-1], int)}
