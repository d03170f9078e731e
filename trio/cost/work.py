"""The work of one run of a graph, counted from shapes: products, attention, and the rest.

    range     per layer the seven products of S rows, and attention of S rows to C + S; with linear attention eight products,
              and those of the delta rule
    head      one row
    vision    per layer the products of all patches, and attention inside tiles or windows; the projector for each of
              its tokens; 2 weights per token if the encoder itself merges tokens

A multiplication and an addition are two FLOPs. Element-wise work is not counted. Attention counts the full S² and not its
causal half, because a padded graph and most kernels of this size compute all of it. The row of class attention that some
selections read is not counted; it is below 1e-4 of the tower.

``moved_bytes`` is the least memory traffic: operands, results and weights once, and attention scores never, as in a fused
kernel; ``score_elements`` counts the scores for other kernels. Letters as in ``runtime.bundle.manifest``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from trio_edge.runtime.bundle.manifest import Dimensions, LinearAttention, VisionDimensions

WeightKind = Literal["layer", "head", "vision", "none"]
"""Kind of weights that a product reads, which decides their format; "none" if both factors are activations."""
ELEMENT_BYTES = {"float16": 2, "float32": 4, "int8": 1}
VISION_HEAD_SIZE = 64
"""Attention head size of all supported towers; manifests do not hold it."""
# Kernels of a fused layer: two norms with their sums, four products, rotation, attention, gate, sum.
_LAUNCHES_PER_LAYER = 10
_LAUNCHES_PER_HEAD = 3
LAUNCHES_PER_PROBE = 60
_CHUNK_ROWS, _CHUNK_LEVELS = 64, 6
"""Rows of a chunk of linear attention, and levels of its inverse."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """``count`` products [rows, inner] x [inner, columns]."""

    rows: int
    inner: int
    columns: int
    count: int | float = 1
    """A fraction if only a share of a product is computed."""
    weights: WeightKind = "none"

    @property
    def flops(self) -> float:
        """Two for each multiplication and addition."""
        return 2.0 * self.rows * self.inner * self.columns * self.count

    @property
    def matrix_elements(self) -> float:
        """Elements of the second factors."""
        return float(self.inner * self.columns * self.count)

    @property
    def row_elements(self) -> float:
        """Elements of the first factors and the results."""
        return float(self.rows * (self.inner + self.columns) * self.count)


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """``count`` attentions of ``rows`` to ``context`` rows in ``num_heads`` heads."""

    rows: int
    context: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    count: int = 1
    past: int = 0
    """Rows of the context that come from the KV cache."""

    @property
    def flops(self) -> float:
        """FLOPs of scores and weighted sum, including those that a causal mask hides."""
        return 4.0 * self.rows * self.context * self.num_heads * self.head_size * self.count

    def moved_bytes(self, *, bytes_per_element: int, bytes_per_cached: int) -> float:
        """Return the bytes of queries, outputs, and the whole context's keys and values."""
        queries = 2 * self.rows * self.num_heads
        new, cached = (2 * rows * self.num_kv_heads for rows in (self.context - self.past, self.past))
        row_bytes = (queries + new) * bytes_per_element + cached * bytes_per_cached
        return float(row_bytes * self.head_size * self.count)

    @property
    def score_elements(self) -> float:
        """Number of scores; a fused kernel never writes them."""
        return float(self.rows * self.context * self.num_heads * self.count)


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """One run of one graph."""

    products: tuple[Product, ...]
    attention: tuple[Attention, ...] = ()
    other_elements: float = 0.0
    """Elements that norms, sums, rotations and gates read and write."""
    launches: int = 1

    @property
    def flops(self) -> float:
        """FLOPs of all products and attentions."""
        return sum(part.flops for part in self.products) + sum(part.flops for part in self.attention)

    def moved_bytes(self, *, bytes_per_element: int, bytes_per_cached: int) -> float:
        """Return the least memory traffic of activations and KV caches, without weights."""
        elements = self.other_elements + sum(part.row_elements for part in self.products)
        elements += sum(part.matrix_elements for part in self.products if part.weights == "none")
        cached = sum(
            part.moved_bytes(bytes_per_element=bytes_per_element, bytes_per_cached=bytes_per_cached)
            for part in self.attention
        )
        return cached + elements * bytes_per_element


def sum_of(works: Iterable[Work]) -> Work:
    """Return the work of several graphs together."""
    parts = list(works)
    return Work(
        products=tuple(product for part in parts for product in part.products),
        attention=tuple(attention for part in parts for attention in part.attention),
        other_elements=sum(part.other_elements for part in parts),
        launches=sum(part.launches for part in parts),
    )


def flops_of(products: Iterable[Product]) -> float:
    """Return the FLOPs of all ``products``."""
    return sum(product.flops for product in products)


def layer_matrices(decoder: Dimensions, linear: LinearAttention | None = None) -> tuple[tuple[int, int], ...]:
    """Return inputs and outputs of a decoder layer's matrices: queries, keys, values, output, gate, up, down.

    With ``linear``, of a layer with linear attention: queries, keys and values in one, gate, two of a number for each head, and
    from the output on the same; or of one with a short convolution: the rows and their two gates in one, and the same.
    """
    hidden, inner = decoder.hidden_size, decoder.intermediate_size
    mlp = (hidden, inner), (hidden, inner), (inner, hidden)
    if linear is not None and linear.width:
        return (hidden, 3 * linear.width), (linear.width, hidden), *mlp
    if linear is not None:
        heads, width = linear.num_value_heads, linear.num_value_heads * linear.value_size
        return (hidden, linear.channels), (hidden, width), *(((hidden, heads),) * 2), (width, hidden), *mlp
    queries, keys = (heads * decoder.head_size for heads in (decoder.num_heads, decoder.num_kv_heads))
    projected = 2 * queries if decoder.has_attention_gate else queries
    return (hidden, projected), (hidden, keys), (hidden, keys), (queries, hidden), *mlp


def layer_weights(decoder: Dimensions, *, layer: int | None = None) -> int:
    """Return the elements of one decoder layer's matrices: those of ``layer``, by default one with attention."""
    linear = decoder.linear if layer in decoder.linear_layers else None
    return sum(inputs * outputs for inputs, outputs in layer_matrices(decoder, linear))


def tower_weights(tower: VisionDimensions) -> int:
    """Return the elements of the vision tower's and the projector's matrices."""
    width = tower.hidden_size
    layer = 4 * width**2 + tower.mlp_matrices * width * tower.intermediate_size
    merger = bool(tower.num_merged_layers) * (4 * width**2 + 20 * width * tower.intermediate_size)
    return tower.num_layers * layer + merger + tower.projector_weights


def tiles_and_patches(tower: VisionDimensions, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Return the number of tiles, and of patches per tile, for ``sizes`` of a vision profile."""
    if tower.patches_per_tile is None:
        return 1, sizes["P"]
    return sizes["B"], tower.patches_per_tile


def range_work(decoder: Dimensions, *, layers: Sequence[int], rows: int, past: int = 0) -> Work:
    """Return the work of decoder ``layers`` on ``rows`` new rows (S) and ``past`` cached ones (C)."""
    num_layers, cached = len(layers), decoder.num_cached(layers)
    counts = {None: cached} if decoder.linear is None else {None: cached, decoder.linear: num_layers - cached}
    products = tuple(
        Product(rows=rows, inner=inner, columns=columns, count=count, weights="layer")
        for kind, count in counts.items()
        for inner, columns in layer_matrices(decoder, kind)
    )
    if decoder.linear is not None and not decoder.linear.width:
        products += _delta_rule(decoder.linear, rows=rows, count=num_layers - cached)
    attention = Attention(
        rows=rows,
        context=past + rows,
        num_heads=decoder.num_heads,
        num_kv_heads=decoder.num_kv_heads,
        head_size=decoder.head_size,
        count=cached,
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


def _delta_rule(linear: LinearAttention, *, rows: int, count: int) -> tuple[Product, ...]:
    """Return the products of ``count`` gated delta rules, in chunks of C rows; see ``export/graphs/state_layers.py``.

    For each row and value head of sizes K and V: 3 K V with the state, which is read or written three times, C (3 K + 2 V) within
    the chunk, and 12 C² / 2 for the inverse of its triangular matrix, block by block.
    """
    chunk, size, value = min(rows, _CHUNK_ROWS), linear.key_size, linear.value_size
    heads = count * linear.num_value_heads
    within = 3 * size + 2 * value + 2 * _CHUNK_LEVELS * chunk
    return (
        Product(rows=rows, inner=size, columns=3 * value, count=heads),
        Product(rows=rows, inner=chunk, columns=within, count=heads),
    )


def head_work(decoder: Dimensions, *, rows: int = 1) -> Work:
    """Return the work of the final norm and the head."""
    product = Product(rows=rows, inner=decoder.hidden_size, columns=decoder.vocab_size, weights="head")
    return Work(products=(product,), launches=_LAUNCHES_PER_HEAD)


def vision_work(tower: VisionDimensions, sizes: Mapping[str, int]) -> Work:
    """Return the work of vision tower and projector; ``sizes`` are a profile's: B tiles or P patches, N visual tokens."""
    tiles, patches = tiles_and_patches(tower, sizes)
    rows, width, inner = tiles * patches, tower.hidden_size, tower.intermediate_size
    projected = sizes["N"]
    if tower.projected_per_tile is not None:
        projected = tiles * tower.projected_per_tile
    elif tower.patches_per_token is not None:
        projected = patches // tower.patches_per_token
    layers, merged = tower.num_layers, tower.num_merged_layers
    products = [_square(projected, tower.projector_weights, weights="vision")]
    for count, factor in ((layers - merged, 1), (merged, 4)):
        mlp = tower.mlp_matrices * count
        products += [
            Product(rows=rows // factor, inner=width, columns=width, count=4 * count, weights="vision"),
            Product(rows=rows // factor, inner=width, columns=inner, count=mlp, weights="vision"),
        ]
    if merged:  # a window's attention, and an MLP of four times the widths
        products += [
            Product(rows=rows, inner=width, columns=width, count=4, weights="vision"),
            Product(rows=rows // 4, inner=4 * width, columns=5 * inner, count=1, weights="vision"),
        ]
    if tower.merged_weights:
        products.append(_square(projected, tower.merged_weights, weights="none"))
    return Work(
        products=tuple(products),
        attention=_vision_attention(tower, tiles=tiles, patches=patches),
        other_elements=float(layers * rows * (10 * width + 2 * inner)),
        launches=(layers + 1) * _LAUNCHES_PER_LAYER,
    )


def _vision_attention(tower: VisionDimensions, *, tiles: int, patches: int) -> tuple[Attention, ...]:
    windows, merged = tower.patches_per_window, tower.num_merged_layers
    full = tower.num_layers - merged if windows is None else tower.num_full_layers
    layers = {(patches, patches): full}
    if windows is not None:
        layers[patches, windows] = tower.num_layers - full
    if merged:
        layers |= {(patches // 4, patches // 4): merged, (patches, 4): 1}
    heads = max(1, tower.hidden_size // VISION_HEAD_SIZE)
    return tuple(
        Attention(
            rows=rows,
            context=context,
            num_heads=heads,
            num_kv_heads=heads,
            head_size=tower.hidden_size // heads,
            count=count * tiles,
        )
        for (rows, context), count in layers.items()
    )


def counted_work(flops: float, *, rows: int, weights: WeightKind = "none", other: float = 0.0) -> Work:
    """Return the work of a graph whose FLOPs alone are known, as one product of ``rows`` rows.

    ``weights`` is the kind of its second factor; ``other`` counts elements that it reads besides.
    """
    product = _square(rows, flops / (2 * rows), weights=weights)
    return Work(products=(product,), other_elements=other, launches=LAUNCHES_PER_PROBE)


def _square(rows: int, elements: int | float, *, weights: WeightKind) -> Product:
    """Return a product whose second factor is nearly square and has ``elements`` elements."""
    side = max(1, math.isqrt(round(elements)))
    return Product(rows=rows, inner=side, columns=side, count=elements / side**2, weights=weights)
