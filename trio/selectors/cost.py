"""FLOPs of every method's own selection, counted from shapes. TRIO's probe and NMS are in ``trio.cost``.

Inside the decoder, with K = G E and Q = H E, the projected widths of keys and queries:

    attention of R rows     2 S D K  keys,  2 R D Q  queries,  2 R Q S  scores
    fastv, pyramiddrop      attention of 1 row
    dart                    2 S D K  keys for the norms,  2 · 8 N D  pivots against tokens
    sparsevlm               2 F T D + 2 F T  raters,  attention of T rows,  2 T S  their mean,
                            2 P² D  distances in the pool,  2 K' N D  merged rows

In front of it, with N tokens of width D, F of features, E of keys:

    visionzip   2 C N E  keys of targets and tokens,  2 K' N D  merged rows
    holov       2 N² D
    scope       2 N² F  and K' steps of 2 N²
    divprune    2 N² D  and K' steps of N
    cdpruner    2 N² D  and K' steps of 2 K' N
    eadp        2 T N D  text,  2 N² D  and K' steps of 2 N²; with CLIP 2 M L N Z  text
    uniform     nothing

CLIP's text tower, beside them, computes for each of M texts of L tokens, with its own D, I and number of layers n:
    n (2 L (4 D² + 2 D I) + 4 L² D) + 2 L D Z  layers and projection

Products are what a graph's MatMul nodes do, exactly; steps are sums over pairs inside the greedy loop, which no MatMul
shows. Other element-wise work does not count, as everywhere.
Letters: S rows, N visual tokens, K' kept, F rows of the whole prompt, T text rows, P tokens that are clustered, D hidden
size, H query heads, G key/value heads, E head size, C contextual tokens, Z width of CLIP's space.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from trio_edge.runtime.clip_text import num_clip_texts
from trio_edge.trio.selectors.sparse_vlm_split import split_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trio_edge.runtime.manifest import TokenMethod
    from trio_edge.runtime.schedule import Method
    from trio_edge.trio.cost import ModelShape


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
