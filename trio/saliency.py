"""TRIO's saliency in closed form: the influence of each visual token on the model's answer, without autograd.

For hidden states x that enter decoder layer l, the score of visual token i is ‖∂loss/∂x_i‖₂. The loss is the mean
cross-entropy of R probe rows of ``lm_head(final_norm(layer(x)))`` against their own argmax. Only the probe rows carry
loss, and a visual token reaches them only through its key and its value:

    h_i   = w ⊙ n_i,  n_i = x_i r_i,  r_i = 1/rms(x_i)        input norm with weight w
    a     = softmax(q · RoPE(W_k h_i + bias) / √E)            attention of R queries per head
    do    : from ∂loss/∂y on R rows, back through MLP, post-attention norm and W_o
    p_hr  = W_v,hᵀ do_hr                                      pull of one head and probe row on h
    da_i  = p · h_i,  ds = a ⊙ (da − Σ a ⊙ da) / √E
    dk_i  = RoPEᵀ(Σ_r ds q)
    u_i   = w ⊙ (W_kᵀ dk_i + Σ a p)                           gradient of n_i
    c_i   = n_i · u_i = (W_k h_i) · dk_i + Σ a ⊙ da           no D-sized product needed
    ‖g_i‖² = r_i² (‖u_i‖² − 2 c_i²/D + c_i² ‖n_i‖²/D²)        through the norm

Qwen3 normalizes each head of keys and queries before RoPE (QK-norm); dk_i then passes back through that norm, too.
Ministral 3 scales each rotated query by its position; q above is the scaled one. In Qwen3.5 a gate multiplies the heads'
outputs before W_o; do passes back through the same gate.

Three forms of ‖u_i‖² are exact, and ``cheapest_form`` counts their FLOPs; only the last projects V:

    "direct"          u_i itself, D numbers per token, and c_i = n_i · u_i; for multi-head attention
    "key_gram"        keys by the constant Gram matrix W_k w² W_kᵀ, values by the small one of the vectors p;
                      for grouped-query attention
    "key_value_gram"  keys and values by the constant Gram matrix, V projected; for many probe rows and few
                      key/value heads

Precision: row-wise arithmetic (norms, softmax, RoPE, gradients) is float32, or float64 in a float64 model. Products with
a weight run in the weight's own type, and their result is cast. In half precision they use tensor cores; a float32
copy of the weights, which TensorRT would store, needs more memory than the whole stage. Each row of a gradient is
scaled to unit length before such a product and back after it, so nothing underflows and scores carry no loss scale.

Weights are used as they are, never folded or copied: the exporter maps every parameter to the checkpoint.

A quantized layer (``is_quantized``) has one forward product per weight, which the exporter shares with the layer's own, and
its gradient goes around the MLP: ∂loss/∂y stands for the gradient before it. The way back needs another copy of quantized
weights, most of which are the MLP's. docs/quantization.md says what that changes.

Letters: S rows, N visual tokens (padded), D hidden, I intermediate, H query heads, G key/value heads, E head
size, V vocabulary, R probe rows; M = R H/G, P = R H (head, probe row) pairs, K = G E.

Source: arXiv 2602.04657, proxy saliency. The reference computes it by autograd, over all rows and the head.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trio_edge.runtime.bundle.errors import CheckpointError
from trio_edge.trio.cost.selections import ProbeSizes, SaliencyForm, cheapest_form
from trio_edge.trio.decoder_layers import (
    key_norm,
    norm_weight,
    normalize,
    normalize_backward,
    num_heads,
    rms_norm,
    rotate,
    rotate_back,
    scaled_queries,
    sliding_window,
    split_gate,
)

_SILU = {"SiLU", "SiLUActivation"}


class ProbeState(NamedTuple):
    """Values that the probe's forward half passes to its backward half.

    The halves are separate because the head's gradient comes between them, and its weights belong to another graph.
    """

    output_RD: Tensor
    """y, the layer's output on the probe rows."""
    rows_RX: Tensor
    """Values of each probe row for the backward half, concatenated.

    In order: the rotated and scaled queries [H E]; per head Σ_i a h_i, the attention-weighted mean of the normed inputs [H D];
    the sigmoid of the gate [H E], if the attention has one; then, unless the layer is quantized, the residual stream after
    attention [D], and gate and up of the MLP [I, I].
    """
    attention_HRN: Tensor
    """a at the visual tokens."""
    key_NK: Tensor | None
    """W_k h at the visual tokens, before bias, norm and rotation; None unless ``ProxySaliency.needs_keys``."""


class ProbeHead(nn.Module):
    """Gradient of the proxy loss with respect to the probed layer's output on the probe rows."""

    final_norm: Any
    lm_head: Any

    def __init__(self, final_norm: nn.Module, lm_head: nn.Module) -> None:
        super().__init__()
        self.final_norm = final_norm
        self.lm_head = lm_head

    def forward(self, output_RD: Float[Tensor, "R D"]) -> Float[Tensor, "R D"]:
        """Return ∂loss/∂y for the mean cross-entropy of all rows against their own argmax."""
        weight = self.lm_head.weight
        scaled_RD, inverse_rms_R1, _ = normalize(output_RD, self.final_norm)
        normed_RD = (scaled_RD * norm_weight(self.final_norm, scaled_RD.dtype)).to(weight.dtype)
        logits_RV = self.lm_head(normed_RD).to(output_RD.dtype)
        probability_RV = torch.softmax(logits_RV, dim=-1)
        best_R1 = logits_RV.argmax(dim=-1, keepdim=True)
        is_best_RV = torch.arange(logits_RV.shape[-1], device=logits_RV.device)[None, :] == best_R1
        # p - 1 cancels where the model is certain; the sum of the other probabilities does not.
        others_RV = torch.where(is_best_RV, 0.0, probability_RV)
        gradient_RV = (
            torch.where(is_best_RV, -others_RV.sum(-1, keepdim=True), others_RV) / logits_RV.shape[0]
        )
        gradient_RD = _scaled_product(gradient_RV, weight)
        return normalize_backward(gradient_RD, scaled_RD, inverse_rms_R1, self.final_norm)


class CandidateHead(nn.Module):
    """``ProbeHead`` over each row's T likeliest tokens alone, the proxy loss of a quantized head.

    The backward product then needs T rows of the lm_head, which the host reads, and no copy of its weight.
    """

    final_norm: Any

    def __init__(self, final_norm: nn.Module) -> None:
        super().__init__()
        self.final_norm = final_norm

    def forward(
        self,
        output_RD: Float[Tensor, "R D"],
        logits_RT: Float[Tensor, "R T"],
        rows_RTD: Float[Tensor, "R T D"],
    ) -> Float[Tensor, "R D"]:
        """Return ∂loss/∂y for the mean cross-entropy of all rows against their own argmax, the first candidate.

        Args:
            output_RD: y, the probed layer's output on the probe rows.
            logits_RT: Their largest logits, descending.
            rows_RTD: The lm_head's rows of the same tokens.
        """
        scaled_RD, inverse_rms_R1, _ = normalize(output_RD, self.final_norm)
        others_R1U = torch.softmax(logits_RT, dim=-1)[:, None, 1:]
        rows_RTD = rows_RTD.to(output_RD.dtype)
        # Σ p W - W_best, as the sum of the differences to W_best: nothing cancels where the model is certain.
        gradient_R1D = torch.matmul(others_R1U, rows_RTD[:, 1:] - rows_RTD[:, :1]) / output_RD.shape[0]
        return normalize_backward(gradient_R1D[:, 0], scaled_RD, inverse_rms_R1, self.final_norm)


class ProxySaliency(nn.Module):
    """Scores of the visual tokens that enter ``layer``; holds Hugging Face's own modules."""

    layer: Any
    head: ProbeHead
    key_value_gram: Tensor
    """There in the Gram forms only."""
    needs_keys: bool
    """Whether the backward half needs the visual tokens' keys."""

    def __init__(
        self,
        layer: Any,
        final_norm: nn.Module,
        lm_head: nn.Module,
        *,
        max_visual: int,
        num_probe_rows: int = 4,
        last_probe_offset: int = 2,
        form: Literal["auto"] | SaliencyForm = "auto",
        is_quantized: bool = False,
    ) -> None:
        """Choose the cheapest exact form for the layer's shapes.

        Args:
            layer: A Llama, Mistral, Ministral 3, Qwen2, Qwen3 or Qwen3.5 decoder layer with full attention, or LFM2's after
                ``name_as_llama`` (q, k and v may have biases; the MLP is SwiGLU).
            final_norm: The decoder's final RMS norm.
            lm_head: The decoder's head, a linear layer.
            max_visual: Largest N, with padding; the form is chosen for it.
            num_probe_rows: R.
            last_probe_offset: The last probe row is ``length - last_probe_offset``.
            form: "auto" takes the fewest FLOPs. The Gram forms hold a float32 buffer ``key_value_gram`` [2GE, 2GE]. It
                has no values under FakeTensorMode; the exporter fills it in the graph.
            is_quantized: Whether the layer's weights are going to be quantized.

        Raises:
            CheckpointError: If the MLP's activation is not SiLU.
        """
        super().__init__()
        activation = type(layer.mlp.act_fn).__name__
        if activation not in _SILU:
            raise CheckpointError(
                f"mlp.act_fn: expected SiLU, got {activation}; TRIO's saliency needs a SwiGLU decoder, choose another --method"
            )
        attention: Any = layer.self_attn
        self.layer, self.head = layer, ProbeHead(final_norm, lm_head)
        self.num_probe_rows, self.last_probe_offset = num_probe_rows, last_probe_offset
        self.is_quantized = is_quantized
        self.head_size = int(attention.head_dim)
        self.num_kv_heads = attention.k_proj.weight.shape[0] // self.head_size
        self.num_heads = num_heads(attention)
        self.has_gate = attention.q_proj.weight.shape[0] > self.num_heads * self.head_size
        self.sliding_window, has_key_norm = sliding_window(attention), key_norm(attention) is not None
        hidden, heads = attention.k_proj.weight.shape[1], (self.num_heads, self.num_kv_heads, self.head_size)
        sizes = ProbeSizes(max_visual, max_visual, hidden, *heads, num_probe_rows)
        self.form: SaliencyForm = cheapest_form(sizes) if form == "auto" else form
        self.needs_keys = has_key_norm or self.form != "direct"
        if self.form != "direct":
            with torch.no_grad():
                norm = norm_weight(layer.input_layernorm, torch.float32)
                gram = key_value_gram(attention.k_proj.weight, attention.v_proj.weight, norm)
            self.register_buffer("key_value_gram", gram)

    def forward(
        self,
        hidden_SD: Float[Tensor, "S D"],
        cos_SE: Float[Tensor, "S E"],
        sin_SE: Float[Tensor, "S E"],
        visual_rows_N: Int[Tensor, "N"],
        num_visual: Int[Tensor, "*one"],
        length: Int[Tensor, "*one"],
        position_S: Int[Tensor, "S"] | None = None,
    ) -> Float[Tensor, "N"]:
        """Return the saliency of each visual token, and -1 at padding.

        Gradients flow through keys and values only, which is complete as long as all probe rows come after the visual
        tokens. If the text there is too short, the first row after the visual tokens replaces every earlier probe row,
        and its loss counts as often.

        Args:
            hidden_SD: Hidden states that enter the layer, right-padded.
            cos_SE: Rotary table, already merged for M-RoPE.
            sin_SE: Likewise.
            visual_rows_N: Row of each visual token; any row at padding. N may be symbolic.
            num_visual: Number of visual tokens, at most N; 0-d or [1].
            length: Number of real rows, 0-d or [1]; later rows are not read.
            position_S: Positions, for a layer whose queries have a scale.

        Returns:
            Unscaled scores >= 0, float32 (float64 in a float64 model); -1 at padding.
        """
        first = length.to(torch.int64).reshape(1) - self.last_probe_offset
        probe_R = first + torch.arange(1 - self.num_probe_rows, 1, device=hidden_SD.device)
        visible_N = torch.arange(visual_rows_N.shape[0], device=hidden_SD.device) < num_visual.reshape(1)
        first_after = torch.where(visible_N, visual_rows_N.to(torch.int64), -1).amax(0) + 1
        probe_R = torch.maximum(probe_R, first_after)
        state = self.attend(hidden_SD, cos_SE, sin_SE, visual_rows_N, probe_R, length, position_S)
        gradient_RD = self.head(state.output_RD)
        return self.scores(state, gradient_RD, hidden_SD, cos_SE, sin_SE, visual_rows_N, num_visual)

    def attend(
        self,
        hidden_SD: Float[Tensor, "S D"],
        cos_SE: Float[Tensor, "S E"],
        sin_SE: Float[Tensor, "S E"],
        visual_rows_N: Int[Tensor, "N"],
        probe_R: Int[Tensor, "R"],
        length: Int[Tensor, "*one"],
        position_S: Int[Tensor, "S"] | None = None,
    ) -> ProbeState:
        """Return the layer's output on the rows ``probe_R``, and the state for the backward half.

        With S, N and R of 0 nothing is computed; a joined graph skips the probe in this way.
        """
        attention: Any = self.layer.self_attn
        weight_dtype = attention.k_proj.weight.dtype
        dtype = torch.promote_types(weight_dtype, torch.float32)
        index_S = torch.arange(hidden_SD.shape[0], device=hidden_SD.device)
        probe_R = probe_R.to(torch.int64)
        visual_N = visual_rows_N.to(torch.int64).clamp(max=hidden_SD.shape[0] - 1)

        is_real_S = index_S < length.to(torch.int64).reshape(1)
        hidden_SD = torch.where(is_real_S[:, None], hidden_SD, 0.0).to(dtype)
        cos_SE, sin_SE = cos_SE.to(dtype), sin_SE.to(dtype)
        normed_SD = rms_norm(hidden_SD, self.layer.input_layernorm).to(weight_dtype)

        key_SGE = _unflatten(F.linear(normed_SD, attention.k_proj.weight).to(dtype), -1, (-1, self.head_size))
        ready_SGE = rms_norm(_add_bias(key_SGE, attention.k_proj), key_norm(attention))
        rotated_SGE = rotate(ready_SGE, cos_SE[:, None], sin_SE[:, None])
        query_RF = F.linear(normed_SD.index_select(0, probe_R), attention.q_proj.weight).to(dtype)
        query_RHE, gate_RHE = split_gate(
            _add_bias(_unflatten(query_RF, -1, (self.num_heads, -1)), attention.q_proj), attention
        )
        query_RHE = rotate(
            rms_norm(query_RHE, getattr(attention, "q_norm", None)),
            cos_SE.index_select(0, probe_R)[:, None],
            sin_SE.index_select(0, probe_R)[:, None],
        )
        query_RHE = scaled_queries(query_RHE, attention, position_S, probe_R)
        query_GME = self._by_kv_head(query_RHE)

        scores_GMS = torch.matmul(query_GME, rotated_SGE.permute(1, 2, 0)) / math.sqrt(self.head_size)
        visible_RS = index_S[None, :] <= probe_R[:, None]
        if self.sliding_window is not None:
            visible_RS = visible_RS & (index_S[None, :] > probe_R[:, None] - self.sliding_window)
        visible_MS = visible_RS.repeat(self.num_heads // self.num_kv_heads, 1)
        scores_GMS = torch.where(visible_MS[None], scores_GMS, torch.finfo(dtype).min)
        attention_GMS = torch.softmax(scores_GMS, dim=-1)
        attended_PD = _scaled_product(attention_GMS.flatten(0, 1), normed_SD)

        out_GME = (
            self._outputs_from_values(attention_GMS, normed_SD)
            if self.is_quantized
            else self._outputs_from_mean_input(attended_PD)
        )
        out_RHE = out_GME.reshape(self.num_heads, -1, self.head_size).transpose(0, 1)
        gates = [] if gate_RHE is None else [torch.sigmoid(gate_RHE)]
        for gate in gates:
            out_RHE = out_RHE * gate
        middle_RD = hidden_SD.index_select(0, probe_R) + _forward_product(
            out_RHE.flatten(1), attention.o_proj
        )
        output_RD, gate_RI, up_RI = self._mlp(middle_RD)
        attended_RHD = _unflatten(attended_PD, 0, (self.num_heads, -1)).transpose(0, 1)
        rows = [part.flatten(1) for part in (query_RHE, attended_RHD, *gates)]
        rows_RX = torch.cat(rows if self.is_quantized else [*rows, middle_RD, gate_RI, up_RI], dim=-1)
        attention_HRS = _unflatten(attention_GMS.flatten(0, 1), 0, (self.num_heads, -1))
        key_NK = key_SGE.index_select(0, visual_N).flatten(1) if self.needs_keys else None
        return ProbeState(output_RD, rows_RX, attention_HRS.index_select(2, visual_N), key_NK)

    def scores(
        self,
        state: ProbeState,
        gradient_RD: Float[Tensor, "R D"],
        hidden_SD: Float[Tensor, "S D"],
        cos_SE: Float[Tensor, "S E"],
        sin_SE: Float[Tensor, "S E"],
        visual_rows_N: Int[Tensor, "N"],
        num_visual: Int[Tensor, "*one"],
    ) -> Float[Tensor, "N"]:
        """Return the scores, given ∂loss/∂y on the probe rows; other arguments are those of ``forward``."""
        attention: Any = self.layer.self_attn
        weight_dtype = attention.k_proj.weight.dtype
        dtype = torch.promote_types(weight_dtype, torch.float32)
        visual_N = visual_rows_N.to(torch.int64).clamp(max=hidden_SD.shape[0] - 1)
        scaled_ND, inverse_rms_N1, mean_square_N1 = normalize(
            hidden_SD.index_select(0, visual_N).to(dtype), self.layer.input_layernorm
        )
        normed_ND = (scaled_ND * norm_weight(self.layer.input_layernorm, dtype)).to(weight_dtype)
        D = hidden_SD.shape[1]
        query_RF, attended_RF, *rest_RF = torch.split(state.rows_RX, self.state_widths, dim=-1)
        gates, mlp_RF = rest_RF[: self.has_gate], rest_RF[self.has_gate :]
        query_GME = self._by_kv_head(_unflatten(query_RF, -1, (self.num_heads, self.head_size)))
        attended_PD = _unflatten(attended_RF, -1, (self.num_heads, D)).transpose(0, 1).flatten(0, 1)

        # If the model is certain, squares of its gradients underflow in float32: scale the largest to 1, and back at the end.
        # The added 0 gives a gradient without rows a largest element.
        largest = torch.cat([gradient_RD.abs().reshape(-1), gradient_RD.new_zeros(1)]).amax(0)
        scale = torch.where(largest > 0, largest, 1.0)
        gradient_RD = gradient_RD / scale
        if not self.is_quantized:
            gradient_RD = self._before_mlp(gradient_RD, *mlp_RF)
        gradient_RF = _scaled_product(gradient_RD, attention.o_proj.weight)
        for gate_RF in gates:
            gradient_RF = gradient_RF * gate_RF
        gradient_GME = self._by_kv_head(_unflatten(gradient_RF, -1, (self.num_heads, self.head_size)))
        value_GED = _unflatten(attention.v_proj.weight, 0, (-1, self.head_size))
        pull_PD = _scaled_product(gradient_GME, value_GED).flatten(0, 1)
        a_PN = state.attention_HRN.flatten(0, 1)
        a_GMN = _unflatten(a_PN, 0, (self.num_kv_heads, -1))
        if self.form == "key_value_gram":
            value_GNE = F.linear(normed_ND, attention.v_proj.weight).to(dtype)
            value_GNE = _unflatten(value_GNE, -1, (-1, self.head_size)).transpose(0, 1)
            da_GMN = torch.matmul(gradient_GME, value_GNE.transpose(1, 2))
        else:
            da_GMN = _unflatten(_scaled_product(pull_PD, normed_ND.T), 0, (self.num_kv_heads, -1))
        # Σ_S a ⊙ da = p · Σ_S a h; a bias of the values shifts da and its mean alike.
        mean_da_GM1 = _unflatten((pull_PD * attended_PD).sum(-1, keepdim=True), 0, (self.num_kv_heads, -1))
        ds_GMN = a_GMN * (da_GMN - mean_da_GM1) / math.sqrt(self.head_size)
        dk_NGE = torch.matmul(ds_GMN.transpose(1, 2), query_GME).transpose(0, 1)
        cos_NE, sin_NE = (table.index_select(0, visual_N).to(dtype) for table in (cos_SE, sin_SE))
        dk_NK = self._key_gradient(rotate_back(dk_NGE, cos_NE[:, None], sin_NE[:, None]), state.key_NK)

        if self.form == "direct":
            u_ND = self._input_gradient(dk_NK, a_PN.T, pull_PD)
            c_N, square_N = (scaled_ND * u_ND).sum(-1), (u_ND * u_ND).sum(-1)
        else:
            assert state.key_NK is not None, "needs_keys"
            c_N = (state.key_NK * dk_NK).sum(-1) + (a_GMN * da_GMN).sum((0, 1))
            if self.form == "key_value_gram":
                dv_NK = torch.matmul(a_GMN.transpose(1, 2), gradient_GME).transpose(0, 1).flatten(1)
                e_NK = torch.cat([dk_NK, dv_NK], dim=-1)
                square_N = ((e_NK @ self.key_value_gram) * e_NK).sum(-1)
            else:
                square_N = self._square_by_key_gram(dk_NK, a_PN.T, pull_PD)
        square_N = square_N - c_N * c_N * (2.0 - mean_square_N1[:, 0]) / D
        scores_N = torch.sqrt(square_N.clamp(min=0.0)) * (inverse_rms_N1[:, 0] * scale)
        index_N = torch.arange(scores_N.shape[0], device=scores_N.device)
        return torch.where(index_N < num_visual.reshape(1), scores_N, -1.0)

    @property
    def state_widths(self) -> list[int]:
        """Widths of the parts of ``ProbeState.rows_RX``."""
        heads, inner = self.num_heads * self.head_size, self.layer.mlp.up_proj.weight.shape[0]
        hidden = self.layer.self_attn.k_proj.weight.shape[1]
        widths = [heads, self.num_heads * hidden, *([heads] * self.has_gate)]
        return widths if self.is_quantized else [*widths, hidden, inner, inner]

    def _by_kv_head(self, rows_RHE: Tensor) -> Tensor:
        """[R, H, E] -> [G, M, E]; M runs over the heads of a group and the probe rows."""
        return rows_RHE.transpose(0, 1).reshape(self.num_kv_heads, -1, self.head_size)

    def _outputs_from_values(self, attention_GMS: Tensor, normed_SD: Tensor) -> Tensor:
        """Return the outputs of the heads [G, M, E] from the values of all rows, as the layer itself computes them."""
        attention: Any = self.layer.self_attn
        value_SF = F.linear(normed_SD, attention.v_proj.weight).to(attention_GMS.dtype)
        value_SGE = _add_bias(_unflatten(value_SF, -1, (-1, self.head_size)), attention.v_proj)
        return torch.matmul(attention_GMS, value_SGE.transpose(0, 1))

    def _outputs_from_mean_input(self, attended_PD: Tensor) -> Tensor:
        """Return the outputs of the heads [G, M, E] as W_v Σ a h, which needs no value of a row."""
        attention: Any = self.layer.self_attn
        value_GED = _unflatten(attention.v_proj.weight, 0, (-1, self.head_size))
        out_GME = _scaled_product(
            _unflatten(attended_PD, 0, (self.num_kv_heads, -1)), value_GED.transpose(1, 2)
        )
        if attention.v_proj.bias is None:
            return out_GME
        # Attention sums to one, so the bias passes unchanged.
        return out_GME + _unflatten(attention.v_proj.bias.to(out_GME.dtype), 0, (-1, 1, self.head_size))

    def _mlp(self, middle_RD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mlp: Any = self.layer.mlp
        normed_RD = rms_norm(middle_RD, self.layer.post_attention_layernorm)
        gate_RI = _forward_product(normed_RD, mlp.gate_proj)
        # TensorRT would fuse two products of the same rows into one and store both weights again, next to those of the
        # backward half. Halving the rows is exact and prevents that; a quantized layer has no such backward half.
        half = 1.0 if self.is_quantized else 0.5
        up_RI = F.linear((half * normed_RD).to(mlp.up_proj.weight.dtype), mlp.up_proj.weight)
        up_RI = up_RI.to(normed_RD.dtype) / half
        if mlp.up_proj.bias is not None:
            up_RI = up_RI + mlp.up_proj.bias.to(up_RI.dtype)
        return middle_RD + _forward_product(F.silu(gate_RI) * up_RI, mlp.down_proj), gate_RI, up_RI

    def _before_mlp(self, gradient_RD: Tensor, middle_RD: Tensor, gate_RI: Tensor, up_RI: Tensor) -> Tensor:
        """Return the gradient taken back through MLP and post-attention norm."""
        mlp: Any = self.layer.mlp
        sigmoid_RI = torch.sigmoid(gate_RI)
        silu_RI = gate_RI * sigmoid_RI
        slope_RI = sigmoid_RI + silu_RI * (1.0 - sigmoid_RI)
        inner_RI = _scaled_product(gradient_RD, mlp.down_proj.weight)
        normed_RD = _scaled_product(inner_RI * silu_RI, mlp.up_proj.weight) + _scaled_product(
            inner_RI * up_RI * slope_RI, mlp.gate_proj.weight
        )
        norm = self.layer.post_attention_layernorm
        scaled_RD, inverse_rms_R1, _ = normalize(middle_RD, norm)
        return gradient_RD + normalize_backward(normed_RD, scaled_RD, inverse_rms_R1, norm)

    def _key_gradient(self, dk_NGE: Tensor, key_NK: Tensor | None) -> Tensor:
        """Return the gradient [N, K] of W_k h, given that of the keys before their rotation."""
        attention: Any = self.layer.self_attn
        if (norm := key_norm(attention)) is not None:
            assert key_NK is not None, "needs_keys"
            key_NGE = _add_bias(_unflatten(key_NK, -1, (-1, self.head_size)), attention.k_proj)
            unit_NGE, inverse_NG1, _ = normalize(key_NGE, norm)
            dk_NGE = normalize_backward(dk_NGE, unit_NGE, inverse_NG1, norm)
        return dk_NGE.flatten(1)

    def _input_gradient(self, dk_NK: Tensor, a_NP: Tensor, pull_PD: Tensor) -> Tensor:
        """Return u [N, D], the gradient of the visual tokens' n."""
        weight: Tensor = self.layer.self_attn.k_proj.weight
        unit_PD, norm_P1 = _unit_rows(pull_PD)
        unweighted_ND = _scaled_product(dk_NK, weight) + _scaled_product(
            a_NP * norm_P1[:, 0], unit_PD.to(weight.dtype)
        )
        u_ND: Tensor = unweighted_ND * norm_weight(self.layer.input_layernorm, unweighted_ND.dtype)
        return u_ND

    def _square_by_key_gram(self, dk_NK: Tensor, a_NP: Tensor, pull_PD: Tensor) -> Tensor:
        weight: Tensor = self.layer.self_attn.k_proj.weight
        weighted_PD = pull_PD * norm_weight(self.layer.input_layernorm, pull_PD.dtype)
        cross_PK = _scaled_product(
            weighted_PD * norm_weight(self.layer.input_layernorm, pull_PD.dtype), weight.T
        )
        key_gram_KK = self.key_value_gram[: weight.shape[0], : weight.shape[0]]
        key_part_N = ((dk_NK @ key_gram_KK + 2.0 * (a_NP @ cross_PK)) * dk_NK).sum(-1)
        square_N: Tensor = key_part_N + ((a_NP @ (weighted_PD @ weighted_PD.T)) * a_NP).sum(-1)
        return square_N


def key_value_gram(
    key_weight: Float[Tensor, "GE D"], value_weight: Float[Tensor, "GE D"], norm_weight: Float[Tensor, "D"]
) -> Float[Tensor, "2*GE 2*GE"]:
    """Return W Wᵀ of W = [W_k; W_v] with the input norm's weight folded in, float32 (float64 for float64 weights).

    ``eᵀ (W Wᵀ) e`` is the squared length of ``Wᵀ e``, for e = [dk; dv] of one token. The upper left block is W_k's own.
    """
    dtype = torch.promote_types(key_weight.dtype, torch.float32)
    weight = torch.cat([key_weight, value_weight]).to(dtype) * norm_weight.to(dtype)
    return weight @ weight.T


def _add_bias(rows_SGE: Tensor, linear: Any) -> Tensor:
    if linear.bias is None:
        return rows_SGE
    bias_GE = _unflatten(linear.bias.to(rows_SGE.dtype), 0, (-1, rows_SGE.shape[-1]))
    return rows_SGE + bias_GE


def _forward_product(rows: Tensor, linear: Any) -> Tensor:
    """Apply a linear layer in its own type; the result has the type of ``rows``."""
    result: Tensor = linear(rows.to(linear.weight.dtype)).to(rows.dtype)
    return result


def _unflatten(rows: Tensor, axis: int, sizes: tuple[int, ...]) -> Tensor:
    """``Tensor.unflatten`` with the size of -1 worked out, since rows may have no elements."""
    axis %= rows.dim()
    rest = rows.shape[axis] // math.prod(size for size in sizes if size != -1)
    return rows.reshape(
        *rows.shape[:axis], *(rest if size == -1 else size for size in sizes), *rows.shape[axis + 1 :]
    )


def _unit_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows scaled to length 1 and their lengths; a zero row stays zero."""
    largest = rows.abs().amax(-1, keepdim=True)
    safe = torch.where(largest > 0, largest, 1.0)
    rows = rows / safe
    length = torch.where(largest > 0, (rows * rows).sum(-1, keepdim=True).sqrt(), 1.0)
    return rows / length, length * safe


def _scaled_product(rows: Tensor, weight: Tensor) -> Tensor:
    """Return ``rows @ weight`` in the type of ``rows``; for a narrower weight, rows are scaled to length 1 before."""
    if rows.dtype == weight.dtype:
        return rows @ weight
    unit, length = _unit_rows(rows)
    return torch.matmul(unit.to(weight.dtype), weight).to(rows.dtype) * length
