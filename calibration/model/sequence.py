"""One sequence between decoder layers: it advances by layers, and stages remove visual tokens.

The first rows are the prompt's, text and visual. Known answer tokens follow and go through every layer with the prompt: the
causal mask makes this equal to decoding them one by one, so one pass gives a whole answer's logits. Selections look at the prompt
only. Saliency and NMS give one order of the visual tokens, from which every budget takes the first ones. The NMS runs until it
has settled. That is exact, and its number of rounds is what a graph needs: a chain of t suppressions takes t + 1 rounds, the
last of which changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from trio_edge.export.graphs.attention import causal_mask, scale_positions
from trio_edge.export.graphs.state_layers import is_linear
from trio_edge.export.plan import dimensions_of
from trio_edge.trio.nms import similar_tokens
from trio_edge.trio.selectors.interface import comes_before

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from trio_edge.calibration.model.torch_model import TorchModel
    from trio_edge.runtime.bundle.schedule import Positions, Schedule

    KeysAndValues = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """Hidden states about to enter a layer."""

    hidden_SD: Tensor
    positions_AS: Tensor
    """int32."""
    visual_rows_N: Tensor
    """int64, rows of the visual tokens that are left, ascending."""
    original_N: Tensor
    """int64, their indices in the image."""
    next_position: int
    """Position of the first answer token with "preserved" positions."""
    num_answer: int = 0
    planes_ND: tuple[Tensor, ...] = ()
    """DeepStack's features, [N, D] each: plane i is added to the visual rows after layer i."""

    @property
    def num_visual(self) -> int:
        """Visual rows that are left."""
        return len(self.original_N)

    @property
    def prompt_length(self) -> int:
        """Rows without those of the answer."""
        return len(self.hidden_SD) - self.num_answer

    def after(self, layer: int, hidden_SD: Tensor) -> Sequence:
        """Return the sequence after ``layer`` with the output ``hidden_SD``, and DeepStack's plane added."""
        if layer < len(self.planes_ND):
            hidden_SD = hidden_SD.index_add(0, self.visual_rows_N, self.planes_ND[layer])
        return replace(self, hidden_SD=hidden_SD)

    def with_answer_row(self, row_1D: Tensor, *, position: int) -> Sequence:
        """Return the sequence with one more answer row at its end."""
        axes = len(self.positions_AS)
        more_A1 = torch.full((axes, 1), position, dtype=torch.int32, device=row_1D.device)
        return replace(
            self,
            hidden_SD=torch.cat([self.hidden_SD, row_1D]),
            positions_AS=torch.cat([self.positions_AS, more_A1], dim=1),
            num_answer=self.num_answer + 1,
        )


class Order(NamedTuple):
    """Visual tokens in the order in which a stage takes them."""

    tokens_N: Tensor
    """int64, best first: those that the NMS left, then suppressed ones."""
    rounds: int
    """NMS rounds until nothing changed."""

    def kept(self, num_keep: int) -> Tensor:
        """Return the best ``num_keep`` tokens (all, if there are fewer), ascending."""
        return self.tokens_N[:num_keep].sort().values


def advanced(model: TorchModel, sequence: Sequence, layers: range) -> Sequence:
    """Return the sequence after ``layers``."""
    for layer in layers:
        rows, _ = run_layer(model, sequence.hidden_SD, sequence.positions_AS, layer)
        sequence = sequence.after(layer, rows)
    return sequence


def run_layer(
    model: TorchModel,
    hidden_SD: Tensor,
    positions_AS: Tensor,
    layer: int,
    *,
    past: KeysAndValues | None = None,
    as_cached: Callable[[Tensor, Tensor], KeysAndValues] | None = None,
) -> tuple[Tensor, KeysAndValues]:
    """Return the hidden states of new rows after one layer, and their keys and values, or the layer's states after them.

    Keys and values are [1, G, S, E]; ``past`` has those of earlier rows, or the states. ``as_cached`` rounds keys and values as
    KV caches do.
    """
    past = past or _no_past(model, hidden_SD, layer)
    module: Any = model.parts.layers[layer]
    present: list[Tensor] = []
    if is_linear(module):
        with torch.device(model.device):
            num_rows = torch.tensor([len(hidden_SD)])
            hidden = module(hidden_SD[None], num_rows=num_rows, past=past, present=present)
        return hidden[0], tuple(present)
    cos, sin = model.rotary(positions_AS)
    num_past = past[0].shape[2]
    with torch.device(model.device):
        mask = causal_mask(len(hidden_SD), num_past, torch.tensor([num_past]))
    tables = cos.to(hidden_SD.dtype), sin.to(hidden_SD.dtype)
    caching = {"past": past, "present": present, "as_cached": as_cached}
    hidden = module(
        hidden_SD[None],
        attention_mask=mask,
        position_embeddings=tables,
        position_ids=scale_positions(positions_AS),
        **caching,
    )
    return hidden[0], (present[0], present[1])


def with_kept(sequence: Sequence, kept_K: Tensor, *, positions: Positions) -> Sequence:
    """Return the sequence with only the visual tokens ``kept_K``, ascending indices into those that are left."""
    all_S = torch.arange(len(sequence.hidden_SD), device=kept_K.device)
    stays_S = torch.ones_like(all_S, dtype=torch.bool)
    stays_S[sequence.visual_rows_N] = False
    stays_S[sequence.visual_rows_N[kept_K]] = True
    rows_R = all_S[stays_S]
    positions_AS = sequence.positions_AS[:, rows_R]
    if positions == "compact":
        positions_AS = all_S[: len(rows_R)].to(torch.int32).expand(len(positions_AS), -1)
    return replace(
        sequence,
        hidden_SD=sequence.hidden_SD[rows_R],
        positions_AS=positions_AS,
        visual_rows_N=torch.searchsorted(rows_R, sequence.visual_rows_N[kept_K]),
        original_N=sequence.original_N[kept_K],
        planes_ND=tuple(plane_ND[kept_K] for plane_ND in sequence.planes_ND),
    )


def answer_logits(model: TorchModel, sequence: Sequence) -> Tensor:
    """Return the logits of the prompt's last row and of each answer row, float32 [1 + answer rows, V]."""
    return logits_of(model, sequence.hidden_SD[sequence.prompt_length - 1 :])


def logits_of(model: TorchModel, rows: Tensor) -> Tensor:
    """Return the logits of ``rows`` after final norm and head, float32."""
    logits: Tensor = model.head(rows).to(torch.float32)
    return logits


def _no_past(model: TorchModel, hidden_SD: Tensor, layer: int) -> KeysAndValues:
    """Return empty keys and values, or states of 0."""
    sizes = dimensions_of(model.parts)
    if sizes.linear is not None and layer in sizes.linear_layers:
        conv, *delta = sizes.linear.shapes().values()
        return hidden_SD.new_zeros(*conv), *(hidden_SD.new_zeros(*one, dtype=torch.float32) for one in delta)
    empty = hidden_SD.new_empty((1, sizes.num_kv_heads, 0, sizes.head_size))
    return empty, empty


def appended(model: TorchModel, layer: int, past: KeysAndValues, new: KeysAndValues) -> KeysAndValues:
    """Return a layer's keys and values [1, G, S, E] with the new rows at the end, or its new states."""
    if is_linear(model.parts.layers[layer]):
        return new
    return torch.cat([past[0], new[0]], dim=2), torch.cat([past[1], new[1]], dim=2)


def saliency(model: TorchModel, layer: int, schedule: Schedule, sequence: Sequence) -> Tensor:
    """Return the scores of the visual tokens that are left from the probe before ``layer``, float32 [N]."""
    length = sequence.prompt_length
    cos, sin = model.rotary(sequence.positions_AS[:, :length])
    scores: Tensor = model.probe(layer, schedule)(
        sequence.hidden_SD[:length],
        cos[0],
        sin[0],
        sequence.visual_rows_N,
        torch.tensor([sequence.num_visual], device=model.device),
        torch.tensor([length], device=model.device),
        sequence.positions_AS[0, :length],
    )
    return scores


def order_of(sequence: Sequence, scores_N: Tensor, *, threshold: float) -> Order:
    """Return the order of the visual tokens by saliency and NMS."""
    N = sequence.num_visual
    features_ND = sequence.hidden_SD[sequence.visual_rows_N]
    index_N = torch.arange(N, device=scores_N.device)
    before_NN = comes_before(scores_N, index_N)
    similar_NN = similar_tokens(features_ND, torch.ones_like(index_N, dtype=torch.bool), threshold=threshold)
    kept_N, rounds = _settled((before_NN & similar_NN).to(torch.float32))
    rank_N = before_NN.to(torch.int64).sum(0)
    return Order(torch.argsort(rank_N + N * (~kept_N).to(torch.int64)), rounds)


def _settled(adjacency_NN: Tensor) -> tuple[Tensor, int]:
    kept_N = torch.ones_like(adjacency_NN[0], dtype=torch.bool)
    rounds = 0
    while True:
        earlier_N, rounds = kept_N, rounds + 1
        kept_N = (earlier_N.to(adjacency_NN.dtype) @ adjacency_NN) == 0
        if torch.equal(kept_N, earlier_N):
            return kept_N, rounds
