"""Saliency of visual tokens in closed form: the gradient of the probe's proxy loss without any backward pass.

One probe of decoder layer l runs for R rows only. Their loss reaches a visual token through the layer's keys and
values alone, so its gradient norm follows from R rows of attention (``docs/how-it-works.md``). No row but the R probe
rows goes through the MLP or the head, values are never projected for S rows, and nothing needs autograd.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int, Shaped
from torch import Tensor, nn

from trio_edge.runtime.errors import CheckpointError

Form = Literal["direct", "gram"]
PADDING_SCORE = -1.0
"""Score of rows that hold no visual token: below every real one, which is a norm."""
_MASKED = -1e30


def key_value_gram(
    key_weight: Shaped[Tensor, "GE D"], value_weight: Shaped[Tensor, "GE D"], norm_weight: Shaped[Tensor, " D"]
) -> Float32[Tensor, "GE2 GE2"]:
    """Return W diag(w²) Wᵀ with W = [W_k; W_v] and w the input norm's weight, float32.

    With it the squared norm of Wᵀe costs (2GE)² instead of 2GE·D: cheaper for grouped-query layers.
    """
    stacked = torch.cat([key_weight, value_weight]).double() * norm_weight.double()
    return (stacked @ stacked.T).float()


def form_flops(*, hidden: int, kv_size: int, num_rows_heads: int) -> dict[Form, int]:
    """Return multiply-add FLOPs per visual token of each form's gradient norm.

    "direct": keys back through W_kᵀ and values as a mixture of R·H vectors. "gram": dv gathered per kv head, and eᵀ G e.
    """
    return {
        "direct": 2 * kv_size * hidden + 2 * num_rows_heads * hidden,
        "gram": 2 * (2 * kv_size) ** 2 + 2 * num_rows_heads * kv_size,
    }


class ProxySaliency(nn.Module):
    """Gradient norm of the proxy loss with respect to every visual token entering a decoder layer.

    Products over S rows run in the layer's own dtype, which is where tensor cores help; everything of the R probe rows
    and the final sums run in float32.
    """

    key_value_gram: Tensor

    def __init__(
        self,
        layer: nn.Module,
        final_norm: nn.Module,
        lm_head: nn.Module,
        *,
        max_visual: int,
        num_probe_rows: int,
        last_probe_offset: int,
        form: Literal["auto", "direct", "gram"] = "auto",
    ) -> None:
        """Wrap a Hugging Face decoder layer (Llama, Mistral, Qwen2).

        Args:
            layer: The layer that the probe runs; its parameters are used where they are.
            final_norm: The model's final RMS norm.
            lm_head: The model's head.
            max_visual: N, rows of the visual span.
            num_probe_rows: R.
            last_probe_offset: The last probe row is ``length - last_probe_offset``.
            form: How the gradient norm is computed; "auto" takes the one with fewer FLOPs for these shapes.

        Raises:
            CheckpointError: If the MLP's activation is not SiLU.
        """
        super().__init__()
        self.layer, self.final_norm, self.lm_head = layer, final_norm, lm_head
        self.max_visual, self.num_probe_rows, self.last_probe_offset = max_visual, num_probe_rows, last_probe_offset
        attention: Any = layer.self_attn
        self.head_size = int(attention.head_dim)
        self.num_kv_heads = attention.k_proj.out_features // self.head_size
        self.num_heads = attention.q_proj.out_features // self.head_size
        self.scaling = float(attention.scaling)
        activation = type(layer.mlp.act_fn).__name__
        if activation not in ("SiLUActivation", "SiLU"):
            raise CheckpointError(f"probe layer: expected a SiLU MLP, got {activation}; this decoder cannot be probed")
        hidden, kv_size = attention.k_proj.in_features, attention.k_proj.out_features
        costs = form_flops(hidden=hidden, kv_size=kv_size, num_rows_heads=num_probe_rows * self.num_heads)
        self.form: Form = min(costs, key=lambda name: costs[name]) if form == "auto" else form
        if self.form == "gram":
            gram = key_value_gram(
                attention.k_proj.weight.detach(), attention.v_proj.weight.detach(), layer.input_layernorm.weight.detach()
            )
            self.register_buffer("key_value_gram", gram)

    def forward(
        self,
        hidden_SD: Float[Tensor, "S D"],
        cos_SE: Float[Tensor, "S E"],
        sin_SE: Float[Tensor, "S E"],
        visual_start: Int[Tensor, "..."],
        num_visual: Int[Tensor, "..."],
        length: Int[Tensor, "..."],
    ) -> Float[Tensor, " N"]:
        """Return the saliency of the N rows from ``visual_start`` on; rows without a token get ``PADDING_SCORE``.

        Args:
            hidden_SD: Hidden states entering the layer, right-padded.
            cos_SE: Rotary tables of the rows' positions (M-RoPE already merged).
            sin_SE: Likewise.
            visual_start: First visual row.
            num_visual: Visual tokens, at most N.
            length: Real rows. Probe rows before row 0 of a very short prompt repeat row 0.

        Source:
            arXiv 2602.04657, proxy loss; closed form in ``docs/how-it-works.md``.
        """
        S = hidden_SD.shape[0]
        start, count = visual_start.reshape(1).long(), num_visual.reshape(1).long()
        last = length.reshape(1).long() - self.last_probe_offset
        row_R = (last + torch.arange(1 - self.num_probe_rows, 1)).clamp(min=0)
        visual_N = (start + torch.arange(self.max_visual)).clamp(max=S - 1)

        attention: Any = self.layer.self_attn
        inverse_rms_S1 = inverse_rms(hidden_SD, self.layer.input_layernorm)
        normed_SD = apply_norm(hidden_SD, inverse_rms_S1, self.layer.input_layernorm)
        key_SGE = self._heads(F.linear(normed_SD, attention.k_proj.weight, attention.k_proj.bias), self.num_kv_heads)
        rotated_SGE = rotate(key_SGE, cos_SE, sin_SE)
        query_RHE = self._heads(
            F.linear(normed_SD.index_select(0, row_R), attention.q_proj.weight, attention.q_proj.bias), self.num_heads
        )
        query_RHE = rotate(query_RHE, cos_SE.index_select(0, row_R), sin_SE.index_select(0, row_R)) * self.scaling

        weights_QS = self._attention(query_RHE, rotated_SGE, row_R)  # Q = G * (H/G) * R rows
        mixed_QD = torch.matmul(weights_QS.to(normed_SD.dtype), normed_SD).to(normed_SD.dtype)
        gradient_RHE = self._output_gradient(hidden_SD.index_select(0, row_R), mixed_QD)
        carrier_QD = self._through_values(gradient_RHE)

        weights_QN = weights_QS.index_select(1, visual_N)
        visual_ND = normed_SD.index_select(0, visual_N)
        value_gradient_QN = torch.matmul(carrier_QD.to(visual_ND.dtype), visual_ND.T).float()
        mean_Q1 = (carrier_QD.float() * mixed_QD.float()).sum(dim=-1, keepdim=True)
        score_gradient_QN = weights_QN * (value_gradient_QN - mean_Q1)
        key_gradient_NGE = self._key_gradient(score_gradient_QN, query_RHE, cos_SE, sin_SE, visual_N)

        plain_NGE = key_SGE.index_select(0, visual_N).float()
        if attention.k_proj.bias is not None:
            plain_NGE = plain_NGE - self._heads(attention.k_proj.bias[None], self.num_kv_heads).float()
        inverse_rms_N = inverse_rms_S1.index_select(0, visual_N)[:, 0]
        dot_N = (plain_NGE * key_gradient_NGE).sum(dim=(1, 2)) + (weights_QN * value_gradient_QN).sum(dim=0)
        dot_N = dot_N / inverse_rms_N
        if self.form == "gram":
            square_N = self._gram_square(key_gradient_NGE, weights_QN, gradient_RHE)
        else:
            square_N = self._direct_square(key_gradient_NGE, weights_QN, carrier_QD)
        D = hidden_SD.shape[1]
        energy_N = hidden_SD.index_select(0, visual_N).float().square().sum(dim=-1)
        squared = inverse_rms_N**2 * square_N
        squared = squared - 2.0 / D * inverse_rms_N**4 * dot_N**2 + inverse_rms_N**6 * dot_N**2 * energy_N / D**2
        scores_N = squared.clamp(min=0.0).sqrt()
        return torch.where(torch.arange(self.max_visual) < count, scores_N, PADDING_SCORE)

    def _heads(self, rows: Tensor, num_heads: int) -> Tensor:
        return rows.unflatten(-1, (num_heads, self.head_size))

    def _grouped(self, rows_RHE: Tensor) -> Tensor:
        """[R, H, X] to [G, H/G * R, X]: query rows beside the kv head that they read."""
        R, H, X = rows_RHE.shape
        return rows_RHE.reshape(R, self.num_kv_heads, H // self.num_kv_heads, X).permute(1, 2, 0, 3).reshape(
            self.num_kv_heads, -1, X
        )

    def _attention(self, query_RHE: Tensor, key_SGE: Tensor, row_R: Tensor) -> Tensor:
        """Return the causal attention of the probe rows over all rows: [Q, S], wide."""
        grouped_GQE = self._grouped(query_RHE)
        scores_GQS = wide(torch.matmul(grouped_GQE, key_SGE.permute(1, 2, 0)))
        S, heads_per_group = key_SGE.shape[0], self.num_heads // self.num_kv_heads
        mask_RS = torch.where(torch.arange(S) <= row_R[:, None], 0.0, _MASKED)
        scores_GQS = scores_GQS + mask_RS.repeat(heads_per_group, 1)
        return torch.softmax(scores_GQS, dim=-1).flatten(0, 1)

    def _output_gradient(self, rows_RD: Tensor, mixed_QD: Tensor) -> Tensor:
        """Run the probe rows through layer, norm and head, and the loss back to the attention output: [R, H, E]."""
        layer, attention = self.layer, self.layer.self_attn
        R, G = self.num_probe_rows, self.num_kv_heads
        value_GED = attention.v_proj.weight.unflatten(0, (G, self.head_size))
        output_GQE = torch.matmul(mixed_QD.unflatten(0, (G, -1)), value_GED.transpose(-1, -2))
        if attention.v_proj.bias is not None:  # attention weights add up to one
            output_GQE = output_GQE + attention.v_proj.bias.reshape(G, 1, self.head_size)
        output_RHE = output_GQE.unflatten(1, (-1, R)).permute(2, 0, 1, 3).reshape(R, -1)
        middle_RD = rows_RD + F.linear(output_RHE, attention.o_proj.weight, attention.o_proj.bias)

        post, mlp = layer.post_attention_layernorm, layer.mlp
        normed_RD = apply_norm(middle_RD, inverse_rms(middle_RD, post), post)
        gate, up = mlp.gate_proj(normed_RD), mlp.up_proj(normed_RD)
        probe_RD = middle_RD + mlp.down_proj(F.silu(gate) * up)

        last_RD = apply_norm(probe_RD, inverse_rms(probe_RD, self.final_norm), self.final_norm)
        logits_RV = wide(self.lm_head(last_RD))
        top_RV = torch.nn.functional.one_hot(logits_RV.argmax(dim=-1), logits_RV.shape[-1])
        gradient_RV = (torch.softmax(logits_RV, dim=-1) - top_RV) / R

        gradient_RD = norm_gradient(probe_RD, backward(gradient_RV, self.lm_head.weight), self.final_norm)
        inner = backward(gradient_RD, mlp.down_proj.weight)
        sigmoid = torch.sigmoid(wide(gate))
        slope = sigmoid * (1.0 + wide(gate) * (1.0 - sigmoid))
        through = backward(inner * wide(up) * slope, mlp.gate_proj.weight)
        through = through + backward(inner * wide(F.silu(gate)), mlp.up_proj.weight)
        gradient_RD = gradient_RD + norm_gradient(middle_RD, through, post)
        return self._heads(backward(gradient_RD, attention.o_proj.weight), self.num_heads)

    def _through_values(self, gradient_RHE: Tensor) -> Tensor:
        """Return W_vᵀ of the output gradient, one row per probe row and head: [Q, D]."""
        value_GED = self.layer.self_attn.v_proj.weight.unflatten(0, (self.num_kv_heads, self.head_size))
        return torch.matmul(self._grouped(gradient_RHE), wide(value_GED)).flatten(0, 1)

    def _key_gradient(
        self, score_gradient_QN: Tensor, query_RHE: Tensor, cos_SE: Tensor, sin_SE: Tensor, visual_N: Tensor
    ) -> Tensor:
        """Return the gradient of the keys before rotation: [N, G, E]. The query already carries the scaling."""
        grouped_GQE = wide(self._grouped(query_RHE))
        rotated_GNE = torch.matmul(score_gradient_QN.unflatten(0, (self.num_kv_heads, -1)).transpose(-1, -2), grouped_GQE)
        return rotate_back(
            rotated_GNE.transpose(0, 1), cos_SE.index_select(0, visual_N), sin_SE.index_select(0, visual_N)
        )

    def _direct_square(self, key_gradient_NGE: Tensor, weights_QN: Tensor, carrier_QD: Tensor) -> Tensor:
        key_weight, norm_weight = self.layer.self_attn.k_proj.weight, self.layer.input_layernorm.weight
        back_ND = wide(torch.matmul(key_gradient_NGE.flatten(1).to(key_weight.dtype), key_weight))
        back_ND = back_ND + torch.matmul(weights_QN.T, carrier_QD)
        return (back_ND * wide(norm_weight)).square().sum(dim=-1)

    def _gram_square(self, key_gradient_NGE: Tensor, weights_QN: Tensor, gradient_RHE: Tensor) -> Tensor:
        grouped_GQE = self._grouped(gradient_RHE)
        value_gradient_GNE = torch.matmul(weights_QN.unflatten(0, (self.num_kv_heads, -1)).transpose(-1, -2), grouped_GQE)
        stacked = torch.cat([key_gradient_NGE.flatten(1), value_gradient_GNE.transpose(0, 1).flatten(1)], dim=-1)
        gram = self.key_value_gram.to(stacked.dtype)
        return (torch.matmul(stacked, gram) * stacked).sum(dim=-1)


def wide(values: Tensor) -> Tensor:
    """Return ``values`` in float32, or float64 if they are float64."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def inverse_rms(rows_SD: Tensor, norm: Any) -> Tensor:
    """Return 1 / rms of each row, [S, 1], wide."""
    return torch.rsqrt(wide(rows_SD).square().mean(dim=-1, keepdim=True) + norm.variance_epsilon)


def apply_norm(rows_SD: Tensor, inverse_rms_S1: Tensor, norm: Any) -> Tensor:
    """Return the RMS norm of the rows in their own dtype, as Hugging Face computes it."""
    return norm.weight * (wide(rows_SD) * inverse_rms_S1).to(rows_SD.dtype)


def norm_gradient(rows_RD: Tensor, gradient_RD: Tensor, norm: Any) -> Tensor:
    """Return the gradient before an RMS norm from the gradient behind it, wide."""
    values, inverse = wide(rows_RD), inverse_rms(rows_RD, norm)
    weighted = gradient_RD * wide(norm.weight)
    mean = (weighted * values).mean(dim=-1, keepdim=True)
    return inverse * weighted - inverse**3 * values * mean


def backward(gradient: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient before a linear layer, wide; the product runs in the gradient's dtype."""
    return torch.matmul(gradient, wide(weight))


def rotate(heads_SGE: Tensor, cos_SE: Tensor, sin_SE: Tensor) -> Tensor:
    """Return the rows turned to their positions, as Hugging Face's apply_rotary_pos_emb does, in their own dtype."""
    cos, sin = cos_SE[:, None].to(heads_SGE.dtype), sin_SE[:, None].to(heads_SGE.dtype)
    first, second = heads_SGE.chunk(2, dim=-1)
    return heads_SGE * cos + torch.cat([-second, first], dim=-1) * sin


def rotate_back(heads_NGE: Tensor, cos_NE: Tensor, sin_NE: Tensor) -> Tensor:
    """Return the transpose of ``rotate``: gradients of rotated rows become gradients of plain ones."""
    cos, sin = cos_NE[:, None].to(heads_NGE.dtype), sin_NE[:, None].to(heads_NGE.dtype)
    first, second = (heads_NGE * sin).chunk(2, dim=-1)
    return heads_NGE * cos + torch.cat([second, -first], dim=-1)
