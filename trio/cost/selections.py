"""The work of every selection, counted from shapes. ``trio_edge.trio.methods`` names each method's formula.

Inside the decoder, with the projected widths K = G E of keys and Q = H E of queries:

    attention of R rows     2 S D K  keys,  2 R D Q  queries,  2 R Q S  scores
    trio                    R rows forward and backward through layer and head, the saliency's cheapest form,
                            2 N² D  similarities (5/8 of it from 1024 tokens on if N is fixed), 2 N² per round
    fastv, pyramiddrop      attention of 1 row
    dart                    2 S D K  keys for the norms,  2 · 8 N D  pivots against tokens
    sparsevlm               2 F T D + 2 F T  raters,  attention of T rows,  2 T S  their mean,
                            2 P² D  distances in the pool of P tokens,  2 K' N D  merged rows

Before the decoder, with N tokens of width D, features of width F and keys of width E:

    visionzip   2 C N E  keys of targets and tokens,  2 K' N D  merged rows
    holov       2 N² D
    scope       2 N² F  and K' steps of 2 N²
    divprune    2 N² D  and K' steps of N
    cdpruner    2 N² D  and K' steps of 2 K' N
    eadp        2 T N D  text,  2 N² D  and K' steps of 2 N²; with CLIP 2 M L N Z  text
    evs         nothing: its one cosine per token is element-wise
    uniform     nothing

Products are exactly a graph's MatMul nodes. Steps are sums over pairs inside the greedy loop, which is no MatMul. Other
element-wise work is not counted.
Letters: S rows, N visual tokens, K' kept, R probe rows, F rows of the whole prompt, T text rows, D hidden size, H query
heads, G key/value heads, E head size, C contextual tokens, M texts of L tokens, Z width of CLIP's space.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Literal, NamedTuple

from trio_edge.runtime.bundle.graph_io import num_candidates, num_clip_texts
from trio_edge.trio.cost.work import LAUNCHES_PER_PROBE, Product, Work, flops_of, layer_matrices

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from trio_edge.runtime.bundle.manifest import Dimensions
    from trio_edge.runtime.bundle.schedule import Schedule

TrioPiece = Literal["probe", "gradient", "saliency", "select"]
SaliencyForm = Literal["direct", "key_gram", "key_value_gram"]
SALIENCY_FORMS: tuple[SaliencyForm, ...] = ("direct", "key_gram", "key_value_gram")
NMS_BLOCKS = 4
NMS_MIRRORED_FROM = 1024
"""``nms`` computes the similarities in ``NMS_BLOCKS`` blocks and mirrors them, if N is fixed and at least this."""
_LAUNCHES_PER_ROUND = 3
NUM_DART_PIVOTS = 4
"""Pivots among visual tokens, and as many among text rows."""


class StageSizes(NamedTuple):
    """Sizes of one stage."""

    num_visual: int
    """N, before the stage."""
    num_keep: int
    """K'."""
    num_text: int
    """T; S = N + T."""
    prompt_visual: int
    """Visual tokens that entered layer 0; F is their number plus T."""
    one_size: bool = True
    """Whether the graph's N is fixed. Only then TRIO mirrors similarities, and SparseVLM clusters only some tokens."""

    @property
    def num_rows(self) -> int:
        """S."""
        return self.num_visual + self.num_text


class TokenSizes(NamedTuple):
    """Sizes of a selection before the decoder."""

    num_visual: int
    """N, tokens of the image."""
    num_keep: int
    """K'."""
    num_text: int
    """T, text tokens; read only for methods that look at text."""
    widths: Mapping[str, int]
    """Last axis of the ``reduce`` graph's inputs, by name."""


class TokenCost(NamedTuple):
    """FLOPs and greedy reads of a selection before the decoder."""

    products: float = 0.0
    """FLOPs of matrix products."""
    steps: float = 0.0
    """FLOPs of sums over pairs inside the greedy loop."""
    read_again: float = 0.0
    """Float32 numbers that all greedy steps read in total."""

    @property
    def flops(self) -> float:
        """FLOPs of products and steps."""
        return self.products + self.steps


class ProbeSizes(NamedTuple):
    """Sizes that decide the form of TRIO's saliency."""

    num_rows: int
    num_visual: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    num_probe_rows: int


# TRIO


def trio_work(
    decoder: Dimensions,
    schedule: Schedule,
    sizes: StageSizes,
    *,
    pieces: Sequence[TrioPiece] = ("probe", "gradient", "saliency", "select"),
    is_quantized: bool = False,
) -> Work:
    """Return the work of one of TRIO's stages, or of the given ``pieces`` of it; the head counts as one that is not quantized.

    ``is_quantized`` means the stage's layer, whose gradient goes around the MLP then.
    """
    rows, hidden, half = schedule.num_probe_rows, decoder.hidden_size, LAUNCHES_PER_PROBE // 2
    heads = decoder.num_heads, decoder.num_kv_heads, decoder.head_size
    probe = ProbeSizes(sizes.num_rows, sizes.num_visual, hidden, *heads, rows)
    form = cheapest_form(probe)
    # output projection, then the MLP; both directions have the same
    layer = [
        Product(rows=rows, inner=inputs, columns=outputs, weights="layer")
        for inputs, outputs in layer_matrices(decoder)[3:]
    ]
    visual, rounds, width = sizes.num_visual, schedule.nms_rounds, decoder.num_heads * decoder.head_size
    queries = Product(rows=rows, inner=hidden, columns=width, weights="layer")
    loss = Product(rows=rows, inner=hidden, columns=decoder.vocab_size, count=2, weights="head")
    forward = [*layer, queries, *_attention_products(probe, is_quantized=is_quantized)]
    backward = [*(layer[:1] if is_quantized else layer), *_gradient_products(form, probe)]
    nms = nms_products(visual, hidden_size=hidden, rounds=rounds, one_size=sizes.one_size)
    counted: dict[TrioPiece, tuple[list[Product], int, int]] = {  # products, other elements, launches
        "probe": (forward, 6 * sizes.num_rows * hidden, half),
        "gradient": ([loss], 0, 0),
        "saliency": (backward, 0, LAUNCHES_PER_PROBE - half),
        "select": (nms, 4 * visual**2, rounds * _LAUNCHES_PER_ROUND),
    }
    products, others, launches = zip(*(counted[piece] for piece in pieces))
    return Work(
        products=tuple(itertools.chain(*products)), other_elements=float(sum(others)), launches=sum(launches)
    )


def candidate_work(decoder: Dimensions, schedule: Schedule) -> Work:
    """Return the work of a quantized head's gradient, for which the head has run on the probe rows."""
    rows, count = schedule.num_probe_rows, num_candidates(decoder)
    product = Product(rows=1, inner=count - 1, columns=decoder.hidden_size, count=rows)
    return Work(products=(product,), other_elements=2.0 * rows * count * decoder.hidden_size)


def trio_flops(decoder: Dimensions, schedule: Schedule, sizes: StageSizes) -> float:
    """Return the FLOPs of one of TRIO's stages."""
    return trio_work(decoder, schedule, sizes).flops


def saliency_products(form: SaliencyForm, sizes: ProbeSizes) -> list[Product]:
    """Return the products of the closed form that grow with S: those shared by all forms, and the form's own."""
    return [*_attention_products(sizes), *_gradient_products(form, sizes)]


def _attention_products(sizes: ProbeSizes, *, is_quantized: bool = False) -> list[Product]:
    hidden, size = sizes.hidden_size, sizes.head_size
    probes = sizes.num_probe_rows * sizes.num_heads
    keys = Product(rows=sizes.num_rows, inner=hidden, columns=sizes.num_kv_heads * size, weights="layer")
    values = [Product(rows=probes, inner=size, columns=hidden)]
    if is_quantized:  # the layer's own product, on all rows
        values = [keys, Product(rows=probes, inner=sizes.num_rows, columns=size)]
    return [
        keys,
        Product(rows=probes, inner=size, columns=sizes.num_rows),
        Product(rows=probes, inner=sizes.num_rows, columns=hidden),
        *values,
    ]


def _gradient_products(form: SaliencyForm, sizes: ProbeSizes) -> list[Product]:
    num_visual, hidden, size = sizes.num_visual, sizes.hidden_size, sizes.head_size
    keys, probes = sizes.num_kv_heads * size, sizes.num_probe_rows * sizes.num_heads
    shared = [
        Product(rows=probes, inner=num_visual, columns=size),
        Product(rows=probes, inner=size, columns=hidden),
    ]
    from_rows = Product(rows=num_visual, inner=hidden, columns=probes)
    if form == "direct":
        return [*shared, from_rows, Product(rows=num_visual, inner=keys + probes, columns=hidden)]
    if form == "key_gram":
        return [
            *shared,
            from_rows,
            Product(rows=probes, inner=hidden, columns=keys + probes),
            Product(rows=num_visual, inner=keys, columns=keys + probes),
            Product(rows=num_visual, inner=probes, columns=probes),
        ]
    return [
        *shared,
        Product(rows=num_visual, inner=hidden, columns=keys, weights="layer"),
        Product(rows=num_visual, inner=probes, columns=size, count=2),
        Product(rows=num_visual, inner=2 * keys, columns=2 * keys),
    ]


def cheapest_form(sizes: ProbeSizes) -> SaliencyForm:
    """Return the form with the fewest FLOPs; of equals, the first."""
    return min(SALIENCY_FORMS, key=lambda form: flops_of(saliency_products(form, sizes)))


def nms_products(num_visual: int, *, hidden_size: int, rounds: int, one_size: bool = True) -> list[Product]:
    """Return the product of the similarities, and that of all rounds."""
    is_mirrored = one_size and num_visual >= NMS_MIRRORED_FROM
    share = (NMS_BLOCKS + 1) / (2 * NMS_BLOCKS) if is_mirrored else 1.0
    return [
        Product(rows=num_visual, inner=hidden_size, columns=num_visual, count=share),
        Product(rows=1, inner=num_visual, columns=num_visual, count=rounds),
    ]


# The other methods inside the decoder


def one_row_flops(decoder: Dimensions, _schedule: Schedule, sizes: StageSizes) -> float:
    """Return the FLOPs of a stage that reads the attention of one row."""
    return _attention_flops(decoder, num_rows=sizes.num_rows, num_queries=1)


def dart_flops(decoder: Dimensions, _schedule: Schedule, sizes: StageSizes) -> float:
    """Return the FLOPs of one of DART's stages."""
    pivots = 2.0 * 2 * NUM_DART_PIVOTS * sizes.num_visual * decoder.hidden_size
    return _key_flops(decoder, num_rows=sizes.num_rows) + pivots


def sparse_vlm_flops(decoder: Dimensions, _schedule: Schedule, sizes: StageSizes) -> float:
    """Return the FLOPs of one of SparseVLM's stages."""
    N, T, D = sizes.num_visual, sizes.num_text, decoder.hidden_size
    S, F = N + T, sizes.prompt_visual + T
    raters = 2.0 * F * T * (D + 1)
    attention = _attention_flops(decoder, num_rows=S, num_queries=T) + 2.0 * T * S
    if sizes.num_keep == 1 or (sizes.one_size and sizes.num_keep >= N):
        return raters + attention
    pooled = split_of(N, sizes.num_keep)[2] if sizes.one_size else N
    return raters + attention + 2.0 * pooled * pooled * D + 2.0 * sizes.num_keep * N * D


def split_of(num_visual: int, num_keep: int) -> tuple[int, int, int]:
    """Return the split of SparseVLM's K rows: tokens kept, clusters, and tokens that are clustered.

    ``trio_edge.trio.selectors.stages.sparse_vlm`` derives it.
    """
    excess = num_visual - num_keep
    if excess <= 0:
        return num_keep, 0, 0
    num_merged = min((100 * excess + 10) // 97 + 1 - excess, num_keep // 2)
    num_removed = num_visual - (num_keep - num_merged)
    return num_keep - num_merged, num_merged, 3 * num_removed // 10 + 1


def _key_flops(decoder: Dimensions, *, num_rows: int) -> float:
    return 2.0 * num_rows * decoder.hidden_size * decoder.num_kv_heads * decoder.head_size


def _attention_flops(decoder: Dimensions, *, num_rows: int, num_queries: int) -> float:
    width = decoder.num_heads * decoder.head_size
    queries = 2.0 * num_queries * decoder.hidden_size * width
    return _key_flops(decoder, num_rows=num_rows) + queries + 2.0 * num_queries * width * num_rows


# Before the decoder


def vision_zip_cost(sizes: TokenSizes) -> TokenCost:
    """Return VisionZip's cost."""
    contextual = sizes.num_keep * 10 // 64
    keys = 2.0 * contextual * sizes.num_visual * sizes.widths.get("keys", 0)
    merged = 2.0 * sizes.num_keep * sizes.num_visual * sizes.widths["visual_tokens"] if contextual else 0.0
    return TokenCost(keys + merged)


def holo_v_cost(sizes: TokenSizes) -> TokenCost:
    """Return HoloV's cost."""
    return TokenCost(_similarity_flops(sizes))


def scope_cost(sizes: TokenSizes) -> TokenCost:
    """Return SCOPE's cost; each step reads all similarities."""
    pairs = float(sizes.num_keep * sizes.num_visual * sizes.num_visual)
    return TokenCost(_similarity_flops(sizes, "features"), 2.0 * pairs, pairs)


def div_prune_cost(sizes: TokenSizes) -> TokenCost:
    """Return DivPrune's cost; each step reads a row of the similarities."""
    rows = float(sizes.num_keep * sizes.num_visual)
    return TokenCost(_similarity_flops(sizes), rows, rows)


def cd_pruner_cost(sizes: TokenSizes) -> TokenCost:
    """Return CDPruner's cost; each step reads the K' Cholesky rows."""
    rows = float(sizes.num_keep * sizes.num_keep * sizes.num_visual)
    return TokenCost(_similarity_flops(sizes), 2.0 * rows, rows)


def eadp_cost(sizes: TokenSizes) -> TokenCost:
    """Return EADP's cost; each step reads all similarities."""
    text = 2.0 * sizes.num_text * sizes.num_visual * sizes.widths["visual_tokens"]
    if "clip_patches" in sizes.widths:
        L = sizes.widths["text_marks"]
        num_tokens = num_clip_texts(sizes.num_text, length=L) * L
        text = 2.0 * num_tokens * sizes.num_visual * sizes.widths["clip_patches"]
    pairs = float(sizes.num_keep * sizes.num_visual * sizes.num_visual)
    return TokenCost(text + _similarity_flops(sizes), 2.0 * pairs, pairs)


def no_cost(_sizes: TokenSizes) -> TokenCost:
    """Return the cost of a method that computes no product."""
    return TokenCost()


def clip_text_flops(
    *, num_layers: int, hidden_size: int, intermediate_size: int, projection_size: int, length: int
) -> float:
    """Return the FLOPs of CLIP's text tower for one text of L tokens: n (2 L (4 D² + 2 D I) + 4 L² D) + 2 L D Z."""
    L, D = length, hidden_size
    layer = 2.0 * L * (4 * D * D + 2 * D * intermediate_size) + 4.0 * L * L * D
    return num_layers * layer + 2.0 * L * D * projection_size


def _similarity_flops(sizes: TokenSizes, rows: str = "visual_tokens") -> float:
    return 2.0 * sizes.num_visual * sizes.num_visual * sizes.widths[rows]
