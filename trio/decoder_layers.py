"""What selectors read of transformers' decoder layers: norms, rotations, and the differences between families.

Letters as in ``saliency``.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

_ZERO_CENTERED = ("Qwen3_5RMSNorm",)
"""Norms whose weight is the difference to 1."""
_LLAMA_NAMES = {
    "Lfm2Model": {"norm": "embedding_norm"},
    "Lfm2DecoderLayer": {
        "mlp": "feed_forward",
        "input_layernorm": "operator_norm",
        "post_attention_layernorm": "ffn_norm",
    },
    "Lfm2MLP": {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
    "Lfm2Attention": {"o_proj": "out_proj", "q_norm": "q_layernorm", "k_norm": "k_layernorm"},
}


def name_as_llama(model: nn.Module) -> None:
    """Give the parts of LFM2's modules the names of Llama's and Qwen3's, next to their own; other modules stay as they are."""
    for module in model.modules():
        kind = type(module).__name__
        for name, own in _LLAMA_NAMES.get(kind, {}).items():
            # past nn.Module, so that parameters keep their one name
            vars(module)[name] = getattr(module, own)
        if kind == "Lfm2MLP":
            vars(module)["act_fn"] = nn.SiLU()  # transformers calls the function


def num_heads(attention: Any) -> int:
    """Return H; the query projection may be wider than the heads, see ``split_gate``."""
    return int(attention.o_proj.weight.shape[1]) // int(attention.head_dim)


def split_gate(query_RHX: Float[Tensor, "R H X"], attention: Any) -> tuple[Tensor, Tensor | None]:
    """Return projected queries [R, H, E], and the gate [R, H, E] of the heads' outputs that Qwen3.5 projects with them."""
    size = int(attention.head_dim)
    return query_RHX[..., :size], query_RHX[..., size:] if query_RHX.shape[-1] > size else None


def norm_weight(norm: Any, dtype: torch.dtype) -> Float[Tensor, "D"]:
    """Return the factors of an RMS norm."""
    weight: Tensor = norm.weight.to(dtype)
    return 1.0 + weight if is_zero_centered(norm) else weight


def is_zero_centered(norm: Any) -> bool:
    """Return whether a norm's weight is the difference to 1."""
    return type(norm).__name__ in _ZERO_CENTERED


def _epsilon(norm: Any) -> float:
    return float(norm.eps if is_zero_centered(norm) else norm.variance_epsilon)


def key_norm(attention: Any) -> Any | None:
    """Return Qwen3's RMS norm of the heads of keys; None in other layers."""
    return getattr(attention, "k_norm", None)


def rms_norm(rows: Float[Tensor, "*rows D"], norm: Any | None) -> Float[Tensor, "*rows D"]:
    """Return rows, or each head of queries and keys, after ``norm``, if there is one, in the type of the rows."""
    return rows if norm is None else normalize(rows, norm)[0] * norm_weight(norm, rows.dtype)


def scaled_queries(
    query_RHE: Float[Tensor, "R H E"],
    attention: Any,
    position_S: Int[Tensor, "S"] | None,
    rows_R: Int[Tensor, "R"],
) -> Float[Tensor, "R H E"]:
    """Return the rotated queries of ``rows_R`` times the scale that Ministral 3 gives to their positions; else as they are.

    Source: get_llama_4_attn_scale of transformers 5.23, 1 + β log(1 + ⌊position / original length⌋), in float32.
    """
    if not type(attention).__name__.startswith("Ministral3"):
        return query_RHE
    assert position_S is not None, "the layer scales queries"
    rope = attention.config.rope_parameters
    position_R = position_S.index_select(0, rows_R).to(torch.float32)
    periods_R = torch.floor(position_R / rope["original_max_position_embeddings"])
    scale_R = 1.0 + rope["llama_4_scaling_beta"] * torch.log(1.0 + periods_R)
    scaled_RHE: Tensor = query_RHE * scale_R[:, None, None].to(query_RHE.dtype)
    return scaled_RHE


def sliding_window(attention: Any) -> int | None:
    """Return the attention's window or None; Qwen2 has one per layer, Mistral in its configuration, Llama none."""
    if type(attention).__name__.startswith(("Mistral", "Ministral3")):
        return attention.config.sliding_window  # type: ignore[no-any-return]
    return getattr(attention, "sliding_window", None)


def normalize(rows_D: Float[Tensor, "*rows D"], norm: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return n = x / rms(x) without the norm's weight, then 1 / rms(x) and the mean square of n."""
    mean_square_1 = (rows_D * rows_D).mean(-1, keepdim=True)
    inverse_rms_1 = torch.rsqrt(mean_square_1 + _epsilon(norm))
    return rows_D * inverse_rms_1, inverse_rms_1, mean_square_1 * inverse_rms_1 * inverse_rms_1


def normalize_backward(gradient_RD: Tensor, scaled_RD: Tensor, inverse_rms_R1: Tensor, norm: Any) -> Tensor:
    """Return the gradient at an RMS norm's input, given that at its output."""
    gradient_RD = gradient_RD * norm_weight(norm, gradient_RD.dtype)
    return inverse_rms_R1 * (gradient_RD - scaled_RD * (scaled_RD * gradient_RD).mean(-1, keepdim=True))


def rotate(rows: Float[Tensor, "*rows E"], cos: Tensor, sin: Tensor) -> Float[Tensor, "*rows E"]:
    """Return rows after RoPE. Tables narrower than E rotate the first elements, as Qwen3.5 does."""
    turned, rest = _split_off(rows, cos.shape[-1])
    return _joined(turned * cos + _half_turn(turned) * sin, rest)


def rotate_back(rows: Float[Tensor, "*rows E"], cos: Tensor, sin: Tensor) -> Float[Tensor, "*rows E"]:
    """Return the transpose of ``rotate``; not its inverse if the tables carry a scale."""
    turned, rest = _split_off(rows, cos.shape[-1])
    return _joined(turned * cos - _half_turn(turned * sin), rest)


def _split_off(rows: Tensor, width: int) -> tuple[Tensor, Tensor | None]:
    """Return the first ``width`` elements of each row, and the rest, if there is one."""
    return (rows, None) if rows.shape[-1] == width else (rows[..., :width], rows[..., width:])


def _joined(rows: Tensor, rest: Tensor | None) -> Tensor:
    return rows if rest is None else torch.cat([rows, rest], dim=-1)


def _half_turn(rows: Tensor) -> Tensor:
    first, second = torch.split(rows, rows.shape[-1] // 2, dim=-1)
    return torch.cat([-second, first], dim=-1)
