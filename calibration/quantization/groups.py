"""The linear layers of a decoder layer that read the same input, and where factors on that input can be moved from.

    input_layernorm ──► q, k, v        v ──► attention ──► o        post_attention_layernorm ──► gate, up        up ──► ⊙ ──► down

What a group's weights are multiplied by, column by column, the layer before it is divided by, row by row: the model computes the
same. Attention mixes rows of v but not their elements, and the gate's factor stays outside, so both let factors through.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from trio_edge.export.quantize.assign import int4_block
from trio_edge.export.quantize.scales import Smoothing

if TYPE_CHECKING:
    from torch import Tensor

    from trio_edge.export.checkpoint import Checkpoint

GroupName = Literal["qkv", "o", "gate_up", "down"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Linear layers with one input, by their names in a decoder layer."""

    name: GroupName
    linears: tuple[str, ...]
    before: str
    """Whose outputs, element by element, are the inputs: a norm, or a linear layer."""


GROUPS = (
    Group(
        name="qkv",
        linears=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        before="input_layernorm",
    ),
    Group(name="o", linears=("self_attn.o_proj",), before="self_attn.v_proj"),
    Group(name="gate_up", linears=("mlp.gate_proj", "mlp.up_proj"), before="post_attention_layernorm"),
    Group(name="down", linears=("mlp.down_proj",), before="mlp.up_proj"),
)


def tensor_name(layer: int, module: str, kind: Literal["weight", "bias"] = "weight") -> str:
    """Return the canonical name of a tensor of decoder layer ``layer``."""
    return f"language_model.layers.{layer}.{module}.{kind}"


def block_of(checkpoint: Checkpoint, layer: int, group: Group) -> int | None:
    """Return the inputs of the INT4 blocks of a group's weights; None if one of them cannot be INT4."""
    blocks = [int4_block(checkpoint, tensor_name(layer, linear)) for linear in group.linears]
    return None if None in blocks else blocks[0]


def can_move(checkpoint: Checkpoint, layer: int, group: Group) -> bool:
    """Return whether the group's inputs are the outputs of what is before it, one for one.

    They are not in front of ``o`` with grouped-query attention, where several heads read one row of v.
    """
    num_inputs = checkpoint.tensor(tensor_name(layer, group.linears[0])).shape[1]
    return checkpoint.tensor(tensor_name(layer, group.before)).shape[0] == num_inputs


def moved(checkpoint: Checkpoint, layer: int, factors: dict[GroupName, Tensor]) -> dict[str, Smoothing]:
    """Return what happens to the tensors of a decoder layer, by canonical name.

    Args:
        checkpoint: To see which biases there are.
        layer: Which one.
        factors: By group, [I]: what its weights' columns are multiplied by.
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    for group in GROUPS:
        if group.name in factors:
            inputs |= {tensor_name(layer, linear): factors[group.name] for linear in group.linears}
            outputs[tensor_name(layer, group.before)] = factors[group.name]
            bias = tensor_name(layer, group.before, "bias")
            if bias in checkpoint.tensors:
                outputs[bias] = factors[group.name]
    return {
        name: Smoothing(inputs=inputs.get(name), outputs=outputs.get(name)) for name in (*inputs, *outputs)
    }
