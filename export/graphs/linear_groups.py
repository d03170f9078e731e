"""Groups the linear layers that read one input, with the layer before them, which can absorb smoothing factors.

    norm ──► q, k, v        v ──► attention ──► o        norm ──► gate, up        up ──► ⊙ ──► down

The columns of a group's weights are multiplied by the factors, and the rows of the layer before are divided by them, so
the model computes the same. Attention mixes rows of v but not their elements, and the product with the gate is
element-wise, so factors pass through both; they do not pass through an activation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trio_edge.export.graphs.state_layers import is_linear
from trio_edge.trio.decoder_layers import is_zero_centered

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearGroup:
    """Linear layers with one input."""

    name: str
    """Unique in its layer."""
    layer: int | None
    """Index in the decoder or the vision tower; None outside of both."""
    linears: tuple[nn.Module, ...]
    before: nn.Module | None
    """The norm or linear layer whose outputs are the inputs; None if no layer can absorb factors."""
    start: int = 0
    """Index of the output of ``before`` that is the first input; fused layers may come first."""

    @property
    def num_inputs(self) -> int:
        """I, the number of inputs."""
        return int(self.linears[0].get_parameter("weight").shape[1])

    @property
    def can_smooth(self) -> bool:
        """Whether each output of ``before`` is one input, and a product with its weights.

        With grouped-query attention this is not so for ``o``: several heads read one row of v.
        """
        if self.before is None or is_zero_centered(self.before):
            return False
        return self.before.get_parameter("weight").shape[0] - self.start == self.num_inputs


def decoder_groups(layer: Any, *, index: int) -> tuple[LinearGroup, ...]:
    """Return the groups of a Llama-like decoder layer, or of one with linear attention."""
    norm, mlp = layer.input_layernorm, layer.post_attention_layernorm
    if hasattr(layer, "conv"):
        module = layer.conv
        attention = (
            LinearGroup(name="in", layer=index, linears=(module.in_proj,), before=norm),
            LinearGroup(name="out", layer=index, linears=(module.out_proj,), before=None),
        )
    elif is_linear(layer):
        module = layer.linear_attn
        products, out = (module.in_proj_qkv, module.in_proj_z), (module.out_proj,)
        attention = (
            LinearGroup(name="qkvz", layer=index, linears=products, before=norm),
            LinearGroup(name="out", layer=index, linears=out, before=None),
        )
    else:
        attention = attention_groups(layer.self_attn, layer.self_attn.o_proj, norm=norm, index=index)
    return (*attention, *gated_mlp_groups(layer.mlp, norm=mlp, index=index))


def attention_groups(
    attention: Any, output: nn.Module, *, norm: nn.Module, index: int
) -> tuple[LinearGroup, LinearGroup]:
    """Return the groups of an attention with separate q, k and v after ``norm``; ``output`` is its last linear layer."""
    products = attention.q_proj, attention.k_proj, attention.v_proj
    return (
        LinearGroup(name="qkv", layer=index, linears=products, before=norm),
        LinearGroup(name="o", layer=index, linears=(output,), before=attention.v_proj),
    )


def fused_attention_groups(attention: Any, *, norm: nn.Module, index: int) -> tuple[LinearGroup, LinearGroup]:
    """Return the groups of a Qwen vision encoder's attention, where q, k and v are one linear layer."""
    qkv, values = attention.qkv, 2 * attention.dim
    return (
        LinearGroup(name="qkv", layer=index, linears=(qkv,), before=norm),
        LinearGroup(name="o", layer=index, linears=(attention.proj,), before=qkv, start=values),
    )


def gated_mlp_groups(mlp: Any, *, norm: nn.Module, index: int) -> tuple[LinearGroup, LinearGroup]:
    """Return the groups of an MLP that computes down(act(gate) ⊙ up) after ``norm``."""
    return (
        LinearGroup(name="gate_up", layer=index, linears=(mlp.gate_proj, mlp.up_proj), before=norm),
        LinearGroup(name="down", layer=index, linears=(mlp.down_proj,), before=mlp.up_proj),
    )


def mlp_groups(
    first: nn.Module, second: nn.Module, *, norm: nn.Module, index: int
) -> tuple[LinearGroup, LinearGroup]:
    """Return the groups of an MLP that computes second(act(first)) after ``norm``."""
    return (
        LinearGroup(name="fc1", layer=index, linears=(first,), before=norm),
        LinearGroup(name="fc2", layer=index, linears=(second,), before=None),
    )


def projector_groups(
    first: nn.Module, second: nn.Module, *, norm: nn.Module | None, name: str = "projector"
) -> tuple[LinearGroup, LinearGroup]:
    """Return the groups of a projector of two layers with an activation between them.

    ``norm`` precedes the first one; None if its elements are not the inputs one for one.
    """
    return (
        LinearGroup(name=f"{name}_1", layer=None, linears=(first,), before=norm),
        LinearGroup(name=f"{name}_2", layer=None, linears=(second,), before=None),
    )
