"""What one run of a graph computes and moves: its products, its attention, and the rest, from shapes alone.

    range     per layer the seven products of S rows, and attention of S rows to C + S
    select    TRIO: keys of S rows, R probe rows forwards and backwards through layer and head, the saliency's
              cheapest form, similarities of N tokens and the rounds of the NMS
    head      one row
    vision    per layer the products of all patches, and attention inside tiles or windows; the projector per token that it sees

A multiplication and an addition are two FLOPs; only products count, as in ``trio_edge.trio.cost.flops``, whose sums are these.
``moved_bytes`` is the least that must pass through memory: every operand and every result once, weights once, and
attention scores never, as in a fused kernel; ``score_elements`` says how many scores there are where they are not.
Letters as in ``runtime.manifest``; R probe rows, P = R H, K = G E.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import msgspec

from trio_edge.runtime.bundle.graph_io import num_clip_texts
from trio_edge.trio.cost.shapes import layer_matrices, layer_weights, tiles_and_patches

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trio_edge.runtime.bundle.manifest import (
        Dimensions,
        GraphSpec,
        Manifest,
        Profile,
        TokenMethod,
        VisionDimensions,
    )
    from trio_edge.runtime.bundle.schedule import Method, Schedule

WeightKind = Literal["layer", "head", "vision", "none"]
"""Which weights a product reads; "none" if both factors are activations. Quantization differs by kind."""
_MIRRORED_FROM = 1024
_MIRROR_SHARE = 5 / 8
"""Of the similarities that the NMS computes in a graph for one N of at least ``_MIRRORED_FROM``."""
_VISION_HEAD_SIZE = 64
_LAUNCHES_PER_LAYER = 10
"""Kernels of a fused decoder or vision layer: two norms with their sums, four products, rotation, attention, gate, sum."""
_LAUNCHES_PER_HEAD = 3
_LAUNCHES_PER_PROBE = 60
_LAUNCHES_PER_ROUND = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """``count`` products [rows, inner] x [inner, columns]."""

    rows: int
    inner: int
    columns: int
    count: float = 1.0
    """Not whole where only a share of a product is computed."""
    weights: WeightKind = "none"

    @property
    def flops(self) -> float:
        """Two for each multiplication and addition."""
        return 2.0 * self.rows * self.inner * self.columns * self.count

    @property
    def matrix_elements(self) -> float:
        """Elements of the second factors."""
        return self.inner * self.columns * self.count

    @property
    def row_elements(self) -> float:
        """Elements of the first factors and the results."""
        return self.rows * (self.inner + self.columns) * self.count


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """``count`` times attention of ``rows`` to ``context`` rows in each of ``num_heads``."""

    rows: int
    context: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    count: int = 1
    past: int = 0
    """Rows of the context that are read from the KV cache."""

    @property
    def flops(self) -> float:
        """Scores and weighted sum, without leaving out what a causal mask hides."""
        return 4.0 * self.rows * self.context * self.num_heads * self.head_size * self.count

    def moved_bytes(self, *, bytes_per_element: float, bytes_per_cached: float) -> float:
        """Return the bytes of queries and outputs, and of keys and values of the whole context."""
        queries = 2 * self.rows * self.num_heads
        new, cached = (2 * rows * self.num_kv_heads for rows in (self.context - self.past, self.past))
        row_bytes = (queries + new) * bytes_per_element + cached * bytes_per_cached
        return row_bytes * self.head_size * self.count

    @property
    def score_elements(self) -> float:
        """Scores, which a fused kernel never writes."""
        return float(self.rows * self.context * self.num_heads * self.count)


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """One run of one graph."""

    products: tuple[Product, ...]
    attention: tuple[Attention, ...] = ()
    other_elements: float = 0.0
    """Of activations that element-wise kernels read and write: norms, sums, rotations, gates."""
    launches: int = 1

    @property
    def flops(self) -> float:
        """Of all products and attentions."""
        return sum(part.flops for part in self.products) + sum(part.flops for part in self.attention)

    @property
    def num_weights(self) -> float:
        """Weights that are read, each as often as it is."""
        return sum(self.weights_of(kind) for kind in ("layer", "head", "vision"))

    @property
    def score_elements(self) -> float:
        """Attention scores."""
        return sum(part.score_elements for part in self.attention)

    def weights_of(self, kind: WeightKind) -> float:
        """Return how many weights of one kind are read."""
        return sum(part.matrix_elements for part in self.products if part.weights == kind)

    def moved_bytes(
        self, bytes_per_weight: Mapping[WeightKind, float], *, bytes_per_element: int, bytes_per_cached: int
    ) -> float:
        """Return the bytes that must pass through memory.

        Args:
            bytes_per_weight: By kind of weight.
            bytes_per_element: Of activations.
            bytes_per_cached: Of an element of the KV cache.
        """
        elements = self.other_elements
        moved = sum(
            part.moved_bytes(bytes_per_element=bytes_per_element, bytes_per_cached=bytes_per_cached)
            for part in self.attention
        )
        for part in self.products:
            elements += part.row_elements
            if part.weights == "none":
                elements += part.matrix_elements
            else:
                moved += part.matrix_elements * bytes_per_weight[part.weights]
        return moved + elements * bytes_per_element


def range_work(decoder: Dimensions, *, num_layers: int, rows: int, past: int) -> Work:
    """Return the work of ``num_layers`` decoder layers.

    Args:
        decoder: Sizes.
        num_layers: Of the range.
        rows: S, new rows.
        past: C, rows of the KV buffers that are read.
    """
    products = tuple(
        Product(rows=rows, inner=inner, columns=columns, count=num_layers, weights="layer")
        for inner, columns in layer_matrices(decoder)
    )
    attention = Attention(
        rows=rows,
        context=past + rows,
        num_heads=decoder.num_heads,
        num_kv_heads=decoder.num_kv_heads,
        head_size=decoder.head_size,
        count=num_layers,
        past=past,
    )
    rotated = (decoder.num_heads + decoder.num_kv_heads) * decoder.head_size
    around = rows * (8 * decoder.hidden_size + 2 * rotated + 3 * decoder.intermediate_size)
    return Work(
        products=products,
        attention=(attention,),
        other_elements=float(num_layers * around),
        launches=num_layers * _LAUNCHES_PER_LAYER,
    )


def head_work(decoder: Dimensions) -> Work:
    """Return the work of the final norm and the head on one row."""
    product = Product(rows=1, inner=decoder.hidden_size, columns=decoder.vocab_size, weights="head")
    return Work(products=(product,), launches=_LAUNCHES_PER_HEAD)


def select_work(
    decoder: Dimensions, schedule: Schedule, *, rows: int, num_visual: int, one_size: bool = True
) -> Work:
    """Return the work of one of TRIO's stages: the probe and the NMS.

    Args:
        decoder: Sizes.
        schedule: For the probe rows and the rounds.
        rows: S, text and visual.
        num_visual: N.
        one_size: Whether the graph is made for one N; it computes fewer similarities then.
    """
    probe_rows, hidden, heads = schedule.num_probe_rows, decoder.hidden_size, decoder.num_heads
    share = _MIRROR_SHARE if one_size and num_visual >= _MIRRORED_FROM else 1.0
    queries = heads * decoder.head_size
    there_and_back = (
        (queries, hidden),
        (hidden, decoder.intermediate_size),
        (hidden, decoder.intermediate_size),
        (decoder.intermediate_size, hidden),
    )
    products = [
        Product(rows=probe_rows, inner=inner, columns=columns, count=2, weights="layer")
        for inner, columns in there_and_back
    ]
    products += [
        Product(rows=probe_rows, inner=hidden, columns=queries, weights="layer"),
        Product(rows=probe_rows, inner=hidden, columns=decoder.vocab_size, count=2, weights="head"),
    ]
    products += _saliency(decoder, rows=rows, num_visual=num_visual, probes=probe_rows * heads)
    products.append(Product(rows=num_visual, inner=hidden, columns=num_visual, count=share))
    products.append(Product(rows=1, inner=num_visual, columns=num_visual, count=schedule.nms_rounds))
    return Work(
        products=tuple(products),
        other_elements=float(6 * rows * hidden + 4 * num_visual**2),
        launches=_LAUNCHES_PER_PROBE + schedule.nms_rounds * _LAUNCHES_PER_ROUND,
    )


def _saliency(decoder: Dimensions, *, rows: int, num_visual: int, probes: int) -> list[Product]:
    """Return what grows with S: what all forms do, and the form with the fewest FLOPs."""
    hidden, size = decoder.hidden_size, decoder.head_size
    keys = decoder.num_kv_heads * size
    shared = [
        Product(rows=rows, inner=hidden, columns=keys, weights="layer"),
        Product(rows=probes, inner=size, columns=rows),
        Product(rows=probes, inner=num_visual, columns=size),
        Product(rows=probes, inner=rows, columns=hidden),
        Product(rows=probes, inner=size, columns=hidden, count=2),
    ]
    from_rows = Product(rows=num_visual, inner=hidden, columns=probes)
    direct = [from_rows, Product(rows=num_visual, inner=keys + probes, columns=hidden)]
    key_gram = [
        from_rows,
        Product(rows=probes, inner=hidden, columns=keys + probes),
        Product(rows=num_visual, inner=keys, columns=keys + probes),
        Product(rows=num_visual, inner=probes, columns=probes),
    ]
    key_value_gram = [
        Product(rows=num_visual, inner=hidden, columns=keys, weights="layer"),
        Product(rows=num_visual, inner=probes, columns=size, count=2),
        Product(rows=num_visual, inner=2 * keys, columns=2 * keys),
    ]
    forms = (direct, key_gram, key_value_gram)
    return shared + min(forms, key=lambda form: sum(product.flops for product in form))


def vision_work(tower: VisionDimensions, sizes: Mapping[str, int]) -> Work:
    """Return the work of the vision tower and the projector.

    Args:
        tower: Sizes of both.
        sizes: Of the profile: B tiles or P patches, and N visual tokens.
    """
    tiles, patches = tiles_and_patches(tower, sizes)
    rows, width, inner = tiles * patches, tower.hidden_size, tower.intermediate_size
    projected = sizes["N"]
    if tower.projected_per_tile is not None:
        projected = tiles * tower.projected_per_tile
    elif tower.patches_per_token is not None:
        projected = patches // tower.patches_per_token
    products = [
        Product(rows=rows, inner=width, columns=width, count=4 * tower.num_layers, weights="vision"),
        Product(
            rows=rows,
            inner=width,
            columns=inner,
            count=tower.mlp_matrices * tower.num_layers,
            weights="vision",
        ),
        _square(projected, tower.projector_weights, weights="vision"),
    ]
    if tower.merged_weights:
        products.append(_square(projected, tower.merged_weights, weights="none"))
    return Work(
        products=tuple(products),
        attention=_vision_attention(tower, tiles=tiles, patches=patches),
        other_elements=float(tower.num_layers * rows * (10 * width + 2 * inner)),
        launches=(tower.num_layers + 1) * _LAUNCHES_PER_LAYER,
    )


def _vision_attention(tower: VisionDimensions, *, tiles: int, patches: int) -> tuple[Attention, ...]:
    windows = tower.patches_per_window
    full = tower.num_layers if windows is None else tower.num_full_layers
    layers = {patches: full} if windows is None else {patches: full, windows: tower.num_layers - full}
    heads = max(1, tower.hidden_size // _VISION_HEAD_SIZE)
    return tuple(
        Attention(
            rows=patches,
            context=context,
            num_heads=heads,
            num_kv_heads=heads,
            head_size=tower.hidden_size // heads,
            count=count * tiles,
        )
        for context, count in layers.items()
    )


def counted_work(flops: float, *, rows: int, weights: WeightKind = "none", other: float = 0.0) -> Work:
    """Return work of which only the FLOPs are known, as one product of ``rows`` rows.

    Args:
        flops: Of the graph.
        rows: That it works on.
        weights: What its second factor is.
        other: Elements that it reads beside the product's.
    """
    product = _square(rows, flops / (2 * rows), weights=weights)
    return Work(products=(product,), other_elements=other, launches=_LAUNCHES_PER_PROBE)


def _square(rows: int, elements: float, *, weights: WeightKind) -> Product:
    """Return a product with as many elements in its second factor, about as wide as high."""
    side = max(1, math.isqrt(round(elements)))
    return Product(rows=rows, inner=side, columns=side, count=elements / side**2, weights=weights)


# What one run of a bundle's graph computes and moves, from its manifest.
#
# All of it is counted from shapes, but for vision graphs of bundles that say nothing of their tower: these have the manifest's
# ``cost``, which is for one picture and is scaled by its tokens.


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


# What selections cost: weights that they repeat, and FLOPs where they are not TRIO's, by ``trio_edge.trio.cost.flops``.


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
