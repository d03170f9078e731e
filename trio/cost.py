"""Counts the FLOPs and KV bytes of an answer's prefill, with and without reduction. Needs no torch.

One multiply-add is two FLOPs. Counted are the matrix products of every decoder layer (q, k, v, o, the three MLP
matrices) and its attention, the vision tower and projector, the head on one row, the probe and the NMS. Norms,
softmax, RoPE and activations are left out: they are below 1 % and memory-bound.

Attention is counted in full (4 S² H E): an exported graph masks with a softmax and computes the upper half as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trio_edge.runtime.schedule import Schedule


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderShape:
    """Sizes of a decoder."""

    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    intermediate: int
    vocab: int

    @property
    def query_size(self) -> int:
        """H E."""
        return self.num_heads * self.head_size

    @property
    def kv_size(self) -> int:
        """G E."""
        return self.num_kv_heads * self.head_size

    @property
    def layer_weights(self) -> int:
        """Weights of the seven matrices of one layer."""
        attention = self.hidden * (2 * self.query_size + 2 * self.kv_size)
        return attention + 3 * self.hidden * self.intermediate


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionShape:
    """Sizes of a CLIP tower and its projector."""

    num_layers: int
    """Layers that run."""
    hidden: int
    intermediate: int
    patch_size: int
    rows: int
    """Patches of a tile and the CLS row."""
    features: int
    """Width of what enters the projector."""


def layer_flops(shape: DecoderShape, *, num_tokens: int) -> int:
    """Return FLOPs of one decoder layer on S tokens: 2 S (weights) + 4 S² H E."""
    return 2 * num_tokens * shape.layer_weights + 4 * num_tokens**2 * shape.query_size


def head_flops(shape: DecoderShape, *, num_rows: int = 1) -> int:
    """Return FLOPs of lm_head on some rows: 2 R D V."""
    return 2 * num_rows * shape.hidden * shape.vocab


def vision_flops(shape: VisionShape, decoder: DecoderShape, *, num_tiles: int) -> int:
    """Return FLOPs of tower and projector on B tiles.

    Per tile: patches 2 P F (3 p²); per layer 2 F-wide products (4 F² + 2 F I) on all rows and 4 rows² F of attention;
    projector 2 P (F' D + D²).
    """
    rows, hidden, patches = shape.rows, shape.hidden, shape.rows - 1
    embed = 2 * patches * hidden * 3 * shape.patch_size**2
    layer = 2 * rows * (4 * hidden**2 + 2 * hidden * shape.intermediate) + 4 * rows**2 * hidden
    project = 2 * patches * (shape.features * decoder.hidden + decoder.hidden**2)
    return num_tiles * (embed + shape.num_layers * layer + project)


def probe_flops(shape: DecoderShape, *, num_tokens: int, num_visual: int, num_rows: int) -> int:
    """Return FLOPs of the closed-form saliency, in its cheaper form.

    All S rows: keys 2 S D GE; probe attention 2 HR S E and the mix of normed rows 2 HR S D. R rows, forward and back:
    4 R (layer without k) + 4 R D V. N visual rows: da 2 HR N D, dk 2 HR N E, and the norm, either direct
    2 N (GE D + HR D) or by the Gram matrix 2 N (2 GE)² + 2 HR N E.
    """
    heads_rows = shape.num_heads * num_rows
    keys = 2 * num_tokens * shape.hidden * shape.kv_size
    attention = 2 * heads_rows * num_tokens * (shape.head_size + shape.hidden)
    rows = 4 * num_rows * (shape.layer_weights + shape.hidden * shape.vocab)
    back = 2 * heads_rows * num_visual * (shape.hidden + shape.head_size)
    direct = 2 * num_visual * (shape.kv_size * shape.hidden + heads_rows * shape.hidden)
    gram = 2 * num_visual * (2 * shape.kv_size) ** 2 + 2 * heads_rows * num_visual * shape.head_size
    return keys + attention + rows + back + min(direct, gram)


def reference_probe_flops(shape: DecoderShape, *, num_tokens: int) -> int:
    """Return FLOPs of the paper's code: the layer and the head on all S rows, forward, and back for the input.

    Backward for the activations costs as much as forward (no weight gradients); attention's backward costs twice.
    """
    forward = layer_flops(shape, num_tokens=num_tokens) + head_flops(shape, num_rows=num_tokens)
    return 2 * forward + 4 * num_tokens**2 * shape.query_size


def nms_flops(shape: DecoderShape, *, num_visual: int, num_rounds: int) -> int:
    """Return FLOPs of the similarities, 2 N² D, and of the rounds, 2 N² each."""
    return 2 * num_visual**2 * (shape.hidden + num_rounds)


def select_flops(shape: DecoderShape, schedule: Schedule, *, num_visual: int, num_text: int) -> int:
    """Return FLOPs of all stages' probes and NMS."""
    total = 0
    tokens = schedule.tokens_per_layer(num_layers=shape.num_layers, num_visual=num_visual)
    for stage in schedule.stages:
        entering = tokens[stage.layer - 1]
        total += probe_flops(
            shape, num_tokens=entering + num_text, num_visual=entering, num_rows=schedule.num_probe_rows
        )
        total += nms_flops(shape, num_visual=entering, num_rounds=schedule.nms_rounds)
    return total


def decoder_flops(shape: DecoderShape, schedule: Schedule, *, num_visual: int, num_text: int) -> int:
    """Return FLOPs of all decoder layers under a schedule, without selection."""
    tokens = schedule.tokens_per_layer(num_layers=shape.num_layers, num_visual=num_visual)
    return sum(layer_flops(shape, num_tokens=count + num_text) for count in tokens)


def kv_bytes(
    shape: DecoderShape, schedule: Schedule, *, num_visual: int, num_text: int, element_bytes: int
) -> int:
    """Return bytes of the KV rows after a prefill: sum over layers of 2 S GE elements."""
    tokens = schedule.tokens_per_layer(num_layers=shape.num_layers, num_visual=num_visual)
    return sum(2 * (count + num_text) * shape.kv_size * element_bytes for count in tokens)
