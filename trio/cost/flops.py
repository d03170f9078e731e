"""What a prefill costs with and without token reduction: FLOPs and KV bytes, counted from shapes.

A multiplication and an addition are two FLOPs; only matrix products and the pairwise work of the NMS count,
element-wise work does not. ``S`` is the rows of a layer, text and visual.

    decoder layer   2 S (D H E + 2 D G E + H E D + 3 D I) + 4 S² H E
    vision tower    per tile of P patches: L (2 P (4 D² + m D I) + 4 P A D), m matrices in the MLP, each
                    patch attending to A others: all P, or those of its window
    projector       2 N weights, of two layers D_vision D + D D, for every token that the tower gives
    merging         4 N T D where the encoder itself reduces to T tokens: similarity to them, and sums
    head            2 D V for the one row that is answered
    KV cache        2 G E bytes_per_element per layer and row

Where a class row's attention is looked at, that one row is not counted: it is below 1e-4 of the tower.
Attention counts the full S², not its causal half: that is what a padded graph and most kernels of this size
compute, and what the paper counts. Selections are counted here for TRIO, in ``selectors.cost`` for the other methods.
Letters as in ``saliency``; I intermediate size, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from trio_edge.runtime.bundle.graph_io import num_clip_texts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trio_edge.runtime.bundle.manifest import TokenMethod
    from trio_edge.runtime.bundle.schedule import Method, Schedule

SaliencyForm = Literal["direct", "key_gram", "key_value_gram"]
SALIENCY_FORMS: tuple[SaliencyForm, ...] = ("direct", "key_gram", "key_value_gram")
_MIRROR_SHARE = {
    True: 5 / 8,
    False: 1.0,
}  # of the similarity matrix that ``nms`` computes, from 1024 tokens on


@dataclass(frozen=True, kw_only=True)
class VisionShape:
    """Sizes of a vision tower and its projector."""

    num_layers: int
    """Layers that run: the feature layer's and those before."""
    hidden_size: int
    intermediate_size: int
    patches_per_tile: int
    """With the class token, where there is one."""
    num_tiles: int
    mlp_matrices: int = 2
    """m: 2, or 3 where the MLP has a gate."""
    patches_per_window: int | None = None
    """A in layers with window attention; None if all layers attend to the whole tile."""
    num_full_layers: int = 0
    """Layers that attend to the whole tile beside those with windows."""
    projector_weights: int | None = None
    """Weights that each visual token is multiplied with; None for LLaVA's two layers."""
    projected_tokens: int | None = None
    """Tokens that the projector sees, of all tiles; None for the decoder's."""
    merged_into: int = 0
    """Tokens of a tile that the encoder's own reduction keeps; 0 without one."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a vision-language model, as far as they decide its cost."""

    num_layers: int
    hidden_size: int
    """D."""
    num_heads: int
    """H."""
    num_kv_heads: int
    """G."""
    head_size: int
    """E."""
    intermediate_size: int
    """I."""
    vocab_size: int
    """V."""
    vision: VisionShape | None = None
    bytes_per_element: int = 2
    """Of the KV cache."""


LLAVA_NEXT_7B = ModelShape(
    num_layers=32,
    hidden_size=4096,
    num_heads=32,
    num_kv_heads=32,
    head_size=128,
    intermediate_size=11008,
    vocab_size=32064,
    vision=VisionShape(
        num_layers=23, hidden_size=1024, intermediate_size=4096, patches_per_tile=577, num_tiles=5
    ),
)
"""CLIP ViT-L/14-336 up to its second-to-last layer on five tiles, and Vicuna-7B."""


@dataclass(frozen=True, kw_only=True)
class ReductionCost:
    """One prefill with a schedule, beside the same prefill with every token."""

    full_flops: float
    """Vision, decoder and head with every visual token."""
    decoder_flops: float
    """Decoder layers and head under the schedule."""
    vision_flops: float
    """Vision tower and projector, the same with and without reduction."""
    select_flops: float
    """Selections of all stages."""
    full_kv_bytes: int
    kv_bytes: int

    @property
    def reduced_flops(self) -> float:
        """FLOPs of the whole prefill under the schedule."""
        return self.vision_flops + self.decoder_flops + self.select_flops

    @property
    def flops_ratio(self) -> float:
        """How many times fewer FLOPs the schedule takes."""
        return self.full_flops / self.reduced_flops

    @property
    def decoder_flops_ratio(self) -> float:
        """``flops_ratio`` of the decoder alone, its stages included, without the vision tower."""
        return (self.full_flops - self.vision_flops) / (self.decoder_flops + self.select_flops)

    @property
    def kv_ratio(self) -> float:
        """How many times fewer bytes of KV cache the schedule leaves after prefill."""
        return self.full_kv_bytes / self.kv_bytes

    @property
    def select_share(self) -> float:
        """Share of the stages in the reduced prefill."""
        return self.select_flops / self.reduced_flops


def reduction_cost(
    shape: ModelShape, schedule: Schedule, *, num_visual: int, num_text: int, one_size: bool = True
) -> ReductionCost:
    """Return the cost of one prefill with every token, and of the same one under the schedule.

    Args:
        shape: Of the model.
        schedule: With its method.
        num_visual: Visual tokens that enter the decoder.
        num_text: Text tokens of the prompt.
        one_size: Whether the first stage's graph is made for one number of visual tokens; it computes less then.
    """
    kept = schedule.tokens_per_layer(num_layers=shape.num_layers, num_visual=num_visual)
    rows = [count + num_text for count in kept]
    vision = vision_flops(shape, num_visual=num_visual)
    select = 0.0
    for place, stage in enumerate(schedule.stages):
        entering = StageSizes(kept[stage.layer - 1], stage.keep, num_text, num_visual, one_size or place > 0)
        select += selection_flops(shape, schedule, entering)
    row_bytes = 2 * shape.num_kv_heads * shape.head_size * shape.bytes_per_element
    return ReductionCost(
        full_flops=vision
        + shape.num_layers * decoder_layer_flops(shape, num_rows=num_visual + num_text)
        + head_flops(shape),
        decoder_flops=sum(decoder_layer_flops(shape, num_rows=count) for count in rows) + head_flops(shape),
        vision_flops=vision,
        select_flops=select,
        full_kv_bytes=row_bytes * shape.num_layers * (num_visual + num_text),
        kv_bytes=row_bytes * sum(rows),
    )


def selection_flops(shape: ModelShape, schedule: Schedule, sizes: StageSizes) -> float:
    """Return the FLOPs of one stage's selection, by the schedule's method."""
    if schedule.method != "trio":
        return stage_flops(schedule.method, shape, sizes)
    suppression = nms_flops(
        sizes.num_visual,
        hidden_size=shape.hidden_size,
        rounds=schedule.nms_rounds,
        one_size=sizes.one_size,
    )
    return suppression + probe_flops(
        shape,
        num_rows=sizes.num_visual + sizes.num_text,
        num_visual=sizes.num_visual,
        num_probe_rows=schedule.num_probe_rows,
    )


def decoder_layer_flops(shape: ModelShape, *, num_rows: int) -> float:
    """Return ``2 S weights + 4 S² H E``."""
    attention = 4 * num_rows**2 * shape.num_heads * shape.head_size
    return 2.0 * num_rows * layer_weights(shape) + attention


def vision_flops(shape: ModelShape, *, num_visual: int) -> float:
    """Return the vision tower's and the projector's FLOPs; 0 without a vision shape."""
    vision = shape.vision
    if vision is None:
        return 0.0
    tokens, width = vision.patches_per_tile, vision.hidden_size
    weights = 4 * width**2 + vision.mlp_matrices * width * vision.intermediate_size
    full_layers, window = vision.num_layers, 0
    if vision.patches_per_window is not None:
        full_layers, window = vision.num_full_layers, vision.patches_per_window
    attended = full_layers * tokens + (vision.num_layers - full_layers) * window
    tower = vision.num_tiles * (vision.num_layers * 2 * tokens * weights + 4 * tokens * attended * width)
    projector = vision.projector_weights
    if projector is None:
        projector = width * shape.hidden_size + shape.hidden_size**2
    projected = num_visual if vision.projected_tokens is None else vision.projected_tokens
    merging = 4.0 * projected * vision.merged_into * shape.hidden_size
    return tower + 2.0 * projected * projector + merging


def head_flops(shape: ModelShape, *, num_rows: int = 1) -> float:
    """Return ``2 rows D V``."""
    return 2.0 * num_rows * shape.hidden_size * shape.vocab_size


def probe_flops(
    shape: ModelShape,
    *,
    num_rows: int,
    num_visual: int,
    num_probe_rows: int = 4,
    form: SaliencyForm | None = None,
) -> float:
    """Return the FLOPs of one closed-form probe: saliency of ``num_visual`` of ``num_rows`` rows.

    The R probe rows pass output projection, MLP and head forwards and backwards, ``4 R weights``, and queries forwards
    only; the rest is ``saliency_flops`` of the form, the cheapest one by default.
    """
    sizes = {
        "num_rows": num_rows,
        "num_visual": num_visual,
        "hidden_size": shape.hidden_size,
        "num_heads": shape.num_heads,
        "num_kv_heads": shape.num_kv_heads,
        "head_size": shape.head_size,
        "num_probe_rows": num_probe_rows,
    }
    queries = shape.hidden_size * shape.num_heads * shape.head_size
    weights = queries + 3 * shape.hidden_size * shape.intermediate_size
    head = 2 * head_flops(shape, num_rows=num_probe_rows)
    rows = 4.0 * num_probe_rows * weights + 2.0 * num_probe_rows * queries
    return rows + head + saliency_flops(form or cheapest_form(**sizes), **sizes)


def saliency_flops(
    form: SaliencyForm,
    *,
    num_rows: int,
    num_visual: int,
    hidden_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    num_probe_rows: int,
) -> float:
    """Return the FLOPs of everything in the closed form that grows with S, by form.

    With P = R H and K = G E:

        all             2 S D K  keys,  2 P E S  scores,  2 P E N  dk,  2 P S D  Σ a h,  4 P E D  p and W_v Σ a h
        direct          + 2 N P D  da,   2 N D (K + P)  u
        key_gram        + 2 N P D  da,   2 P D (K + P)  the small Gram matrices,  2 N (K² + P K + P²)
        key_value_gram  + 2 N D K  V,    4 N P E  da and dv,  2 N (2K)²
    """
    S, N, D, P = num_rows, num_visual, hidden_size, num_probe_rows * num_heads
    K = num_kv_heads * head_size
    common = 2 * S * D * K + 2 * P * head_size * (S + N) + 2 * P * S * D + 4 * P * head_size * D
    if form == "direct":
        return float(common + 2 * N * P * D + 2 * N * D * (K + P))
    if form == "key_gram":
        return float(common + 2 * N * P * D + 2 * P * D * (K + P) + 2 * N * (K * K + P * K + P * P))
    return float(common + 2 * N * D * K + 4 * N * P * head_size + 8 * N * K * K)


def cheapest_form(
    *,
    num_rows: int,
    num_visual: int,
    hidden_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    num_probe_rows: int,
) -> SaliencyForm:
    """Return the form with the fewest FLOPs; of equals the one without a Gram matrix."""

    def flops(form: SaliencyForm) -> float:
        return saliency_flops(
            form,
            num_rows=num_rows,
            num_visual=num_visual,
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            num_probe_rows=num_probe_rows,
        )

    return min(SALIENCY_FORMS, key=flops)


def nms_flops(num_visual: int, *, hidden_size: int, rounds: int = 16, one_size: bool = True) -> float:
    """Return ``2 N² D`` for the similarities (5/8 of it from 1024 tokens on in a graph for one N), and 2 N² a round."""
    similarity = 2 * num_visual**2 * hidden_size * _MIRROR_SHARE[one_size and num_visual >= 1024]
    return similarity + 2.0 * rounds * num_visual**2


def reference_probe_flops(shape: ModelShape, *, num_rows: int) -> float:
    """Return the reference's probe: the layer and the whole head over all rows, forwards and backwards.

    Only the input's gradient is counted (the weights of a frozen model get none), so backwards costs what
    forwards costs for the weights, and twice that for the attention, where both factors of each product
    depend on the input.
    """
    attention = 4 * num_rows**2 * shape.num_heads * shape.head_size
    return 4.0 * num_rows * layer_weights(shape) + 3.0 * attention + 2 * head_flops(shape, num_rows=num_rows)


def reference_nms_flops(num_visual: int, *, num_keep: int, hidden_size: int) -> float:
    """Return the greedy host loop's: similarity of at most K kept tokens to all, ``2 K N D``."""
    return 2.0 * num_keep * num_visual * hidden_size


def layer_weights(shape: ModelShape) -> int:
    """Return the elements of one decoder layer's products."""
    queries, keys = shape.num_heads * shape.head_size, shape.num_kv_heads * shape.head_size
    return shape.hidden_size * (2 * queries + 2 * keys + 3 * shape.intermediate_size)


# FLOPs of every method's own selection, counted from shapes. TRIO's probe and NMS are in ``trio.cost``.
#
# Inside the decoder, with K = G E and Q = H E, the projected widths of keys and queries:
#
#     attention of R rows     2 S D K  keys,  2 R D Q  queries,  2 R Q S  scores
#     fastv, pyramiddrop      attention of 1 row
#     dart                    2 S D K  keys for the norms,  2 · 8 N D  pivots against tokens
#     sparsevlm               2 F T D + 2 F T  raters,  attention of T rows,  2 T S  their mean,
#                             2 P² D  distances in the pool,  2 K' N D  merged rows
#
# In front of it, with N tokens of width D, F of features, E of keys:
#
#     visionzip   2 C N E  keys of targets and tokens,  2 K' N D  merged rows
#     holov       2 N² D
#     scope       2 N² F  and K' steps of 2 N²
#     divprune    2 N² D  and K' steps of N
#     cdpruner    2 N² D  and K' steps of 2 K' N
#     eadp        2 T N D  text,  2 N² D  and K' steps of 2 N²; with CLIP 2 M L N Z  text
#     uniform     nothing
#
# CLIP's text tower, beside them, computes for each of M texts of L tokens, with its own D, I and number of layers n:
#     n (2 L (4 D² + 2 D I) + 4 L² D) + 2 L D Z  layers and projection
#
# Products are what a graph's MatMul nodes do, exactly; steps are sums over pairs inside the greedy loop, which no MatMul
# shows. Other element-wise work does not count, as everywhere.
# Letters: S rows, N visual tokens, K' kept, F rows of the whole prompt, T text rows, P tokens that are clustered, D hidden
# size, H query heads, G key/value heads, E head size, C contextual tokens, Z width of CLIP's space.


class StageSizes(NamedTuple):
    """What one stage works on."""

    num_visual: int
    """N, entering."""
    num_keep: int
    """K'."""
    num_text: int
    """T; S = N + T."""
    prompt_visual: int
    """Visual tokens that entered layer 0; F = these + T."""
    one_size: bool = True
    """Whether the graph is made for one N; SparseVLM clusters all tokens, masked, where it is not."""


class TokenFlops(NamedTuple):
    """What a selection in front of the decoder computes."""

    products: float
    """In matrix products."""
    steps: float
    """In sums over pairs inside the greedy loop."""


def stage_flops(method: Method, shape: ModelShape, sizes: StageSizes) -> float:
    """Return the FLOPs of one stage of a method that is not "trio"."""
    if method == "dart":
        pivots = 2 * 8 * sizes.num_visual * shape.hidden_size
        return _key_flops(shape, num_rows=sizes.num_visual + sizes.num_text) + float(pivots)
    if method == "sparsevlm":
        return _sparse_vlm_flops(shape, sizes)
    if method in ("fastv", "pyramiddrop"):
        return _attention_flops(shape, num_rows=sizes.num_visual + sizes.num_text, num_queries=1)
    raise ValueError(f"stage_flops: expected a method other than trio, got {method!r}")


def token_flops(
    method: TokenMethod, *, num_visual: int, num_keep: int, num_text: int, widths: Mapping[str, int]
) -> TokenFlops:
    """Return the FLOPs of a selection in front of the decoder.

    Args:
        method: Which one.
        num_visual: N, tokens of the picture.
        num_keep: K'.
        num_text: T, text tokens that the method reads; not read by those without text.
        widths: Last axis of the ``reduce`` graph's inputs, by name: visual_tokens, and where the method reads them
            features and keys, or clip_patches and text_marks.
    """
    N, K, D = num_visual, num_keep, widths["visual_tokens"]
    similarity = 2.0 * N * N * D
    if method == "visionzip":
        contextual = K * 10 // 64
        merged = 2.0 * K * N * D if contextual else 0.0
        return TokenFlops(2.0 * contextual * N * widths.get("keys", 0) + merged, 0.0)
    if method == "holov":
        return TokenFlops(similarity, 0.0)
    if method == "scope":
        return TokenFlops(2.0 * N * N * widths["features"], 2.0 * K * N * N)
    if method == "divprune":
        return TokenFlops(similarity, float(K * N))
    if method == "cdpruner":
        return TokenFlops(similarity, 2.0 * K * K * N)
    if method == "eadp":
        text = 2.0 * num_text * N * D
        if "clip_patches" in widths:
            L = widths["text_marks"]
            text = 2.0 * num_clip_texts(num_text, length=L) * L * N * widths["clip_patches"]
        return TokenFlops(text + similarity, 2.0 * K * N * N)
    return TokenFlops(0.0, 0.0)


def clip_text_flops(
    *, num_layers: int, hidden_size: int, intermediate_size: int, projection_size: int, length: int
) -> float:
    """Return the FLOPs of CLIP's text tower for one text."""
    L, D = length, hidden_size
    layer = 2.0 * L * (4 * D * D + 2 * D * intermediate_size) + 4.0 * L * L * D
    return num_layers * layer + 2.0 * L * D * projection_size


def _key_flops(shape: ModelShape, *, num_rows: int) -> float:
    return 2.0 * num_rows * shape.hidden_size * shape.num_kv_heads * shape.head_size


def _attention_flops(shape: ModelShape, *, num_rows: int, num_queries: int) -> float:
    width = shape.num_heads * shape.head_size
    queries = 2.0 * num_queries * shape.hidden_size * width
    return _key_flops(shape, num_rows=num_rows) + queries + 2.0 * num_queries * width * num_rows


def _sparse_vlm_flops(shape: ModelShape, sizes: StageSizes) -> float:
    N, T, D = sizes.num_visual, sizes.num_text, shape.hidden_size
    S, F = N + T, sizes.prompt_visual + T
    raters = 2.0 * F * T * (D + 1)
    attention = _attention_flops(shape, num_rows=S, num_queries=T) + 2.0 * T * S
    if sizes.num_keep == 1 or (sizes.one_size and sizes.num_keep >= N):
        return raters + attention
    pooled = split_of(N, sizes.num_keep)[2] if sizes.one_size else N
    return raters + attention + 2.0 * pooled * pooled * D + 2.0 * sizes.num_keep * N * D


# How SparseVLM's K rows split into kept tokens and clusters; the derivation is in ``sparse_vlm``. Needs no torch.


def split_of(num_visual: int, num_keep: int) -> tuple[int, int, int]:
    """Return how many tokens are kept, how many clusters there are and how many tokens are in one.

    Args:
        num_visual: V.
        num_keep: K, rows that go on.
    """
    excess = num_visual - num_keep
    if excess <= 0:
        return num_keep, 0, 0
    num_merged = min((100 * excess + 10) // 97 + 1 - excess, num_keep // 2)
    num_removed = num_visual - (num_keep - num_merged)
    return num_keep - num_merged, num_merged, 3 * num_removed // 10 + 1
