"""What selections cost: weights that they repeat, and FLOPs where they are not TRIO's, by ``trio_edge.trio.cost.flops``."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec

from trio_edge.runtime.clip_text import num_clip_texts
from trio_edge.runtime.prediction.shapes import layer_matrices, layer_weights

if TYPE_CHECKING:
    from trio_edge.runtime.manifest import Dimensions, GraphSpec, Manifest, TokenMethod
    from trio_edge.runtime.schedule import Method, Schedule


def stage_flops(
    decoder: Dimensions,
    schedule: Schedule,
    *,
    stage: int,
    num_visual: int,
    num_text: int,
    prompt_visual: int,
    one_size: bool = True,
) -> float:
    """Return the FLOPs of one stage of a method that is not "trio".

    Args:
        decoder: Sizes.
        schedule: Names the method and how much is kept.
        stage: Index in ``schedule``.
        num_visual: N, visual tokens that enter the stage.
        num_text: T; the stage has N + T rows.
        prompt_visual: Visual tokens that entered the decoder; only SparseVLM looks at the whole prompt.
        one_size: Whether the graph is made for one N.
    """
    from trio_edge.trio.cost.flops import ModelShape, StageSizes, stage_flops

    sizes = StageSizes(num_visual, schedule.stages[stage].keep, num_text, prompt_visual, one_size)
    return stage_flops(schedule.method, ModelShape(**msgspec.structs.asdict(decoder)), sizes)


class RepeatedWeights(NamedTuple):
    """Elements of weights that a stage's graph holds although other graphs have them."""

    layer: int
    head: int


def repeated_weights(method: Method, decoder: Dimensions) -> RepeatedWeights:
    """Return what each stage of ``method`` repeats: TRIO's probe a layer and the head, others what makes queries and keys."""
    if method == "trio":
        return RepeatedWeights(layer_weights(decoder), decoder.vocab_size * decoder.hidden_size)
    (queries, keys, *_) = (inputs * outputs for inputs, outputs in layer_matrices(decoder))
    return RepeatedWeights(keys if method == "dart" else queries + keys, 0)


def clip_text_flops(manifest: Manifest, *, num_texts: int) -> float:
    """Return the FLOPs of CLIP's text tower, which the manifest says for its own text."""
    assert manifest.clip_text is not None
    counted = num_clip_texts(manifest.cost.num_text, length=manifest.clip_text.length)
    return manifest.cost.reduced_flops["clip_text"] * num_texts / counted


def reduce_flops(
    graph: GraphSpec, method: TokenMethod, *, num_visual: int, num_keep: int, num_text: int
) -> float:
    """Return the FLOPs of the selection before the decoder, its products and its greedy steps.

    Args:
        graph: The ``reduce`` graph; its inputs tell the widths.
        method: What it selects by.
        num_visual: N, visual tokens of the picture.
        num_keep: Tokens that it passes on.
        num_text: T, text tokens that the method reads; not read by those without text.
    """
    from trio_edge.trio.cost.flops import token_flops

    sizes = {"num_visual": num_visual, "num_keep": num_keep, "num_text": num_text}
    flops = token_flops(method, widths=input_widths(graph), **sizes)
    return flops.products + flops.steps


def read_again(method: TokenMethod, *, num_visual: int, num_keep: int) -> float:
    """Return the float32 numbers that the K greedy steps of a selection before the decoder read, together.

    A step of "scope" and "eadp" reads all N² similarities, one of "cdpruner" what earlier steps explained, K N numbers, and one
    of "divprune" a row.
    """
    by_step = {"scope": num_visual, "eadp": num_visual, "cdpruner": num_keep, "divprune": 1}
    return float(num_keep * num_visual * by_step.get(method, 0))


def input_widths(graph: GraphSpec) -> dict[str, int]:
    """Return the last axis of each of a graph's inputs where it is a number."""
    return {tensor.name: size for tensor in graph.inputs if isinstance(size := tensor.shape[-1], int)}
