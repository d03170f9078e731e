"""Groups the linear layers that read one input, with the layer before them, which can absorb smoothing factors.

    norm ──► q, k, v        v ──► attention ──► o        norm ──► gate, up        up ──► ⊙ ──► down

The columns of a group's weights are multiplied by the factors, and the rows of the layer before are divided by them, so
the model computes the same. Attention mixes rows of v but not their elements, and the product with the gate is
element-wise, so factors pass through both; they do not pass through an activation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
        """Whether each output of ``before`` is one input.

        With grouped-query attention this is not so for ``o``: several heads read one row of v.
        """
        if self.before is None:
            return False
        return self.before.get_parameter("weight").shape[0] - self.start == self.num_inputs


def decoder_groups(layer: Any, *, index: int) -> tuple[LinearGroup, ...]:
    """Return the groups of a Llama-like decoder layer."""
    attention, mlp = layer.self_attn, layer.mlp
    return (
        LinearGroup(
            name="qkv",
            layer=index,
            linears=(attention.q_proj, attention.k_proj, attention.v_proj),
            before=layer.input_layernorm,
        ),
        LinearGroup(name="o", layer=index, linears=(attention.o_proj,), before=attention.v_proj),
        *gated_mlp_groups(mlp, norm=layer.post_attention_layernorm, index=index),
    )


def gated_mlp_groups(mlp: Any, *, norm: nn.Module, index: int) -> tuple[LinearGroup, LinearGroup]:
    """Return the groups of an MLP that computes down(act(gate) ⊙ up) after ``norm``."""
    return (
        LinearGroup(name="gate_up", layer=index, linears=(mlp.gate_proj, mlp.up_proj), before=norm),
        LinearGroup(name="down", layer=index, linears=(mlp.down_proj,), before=mlp.up_proj),
    )


def mlp_groups(mlp: Any, *, norm: nn.Module, index: int) -> tuple[LinearGroup, LinearGroup]:
    """Return the groups of an MLP that computes fc2(act(fc1)) after ``norm``."""
    return (
        LinearGroup(name="fc1", layer=index, linears=(mlp.fc1,), before=norm),
        LinearGroup(name="fc2", layer=index, linears=(mlp.fc2,), before=None),
    )


def projector_groups(
    first: nn.Module, second: nn.Module, *, norm: nn.Module | None
) -> tuple[LinearGroup, LinearGroup]:
    """Return the groups of a projector of two layers with an activation between them.

    ``norm`` precedes the first one; None if its elements are not the inputs one for one.
    """
    return (
        LinearGroup(name="projector_1", layer=None, linears=(first,), before=norm),
        LinearGroup(name="projector_2", layer=None, linears=(second,), before=None),
    )
