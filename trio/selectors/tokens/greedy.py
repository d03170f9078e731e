"""Greedy selection in a fixed number of steps: each step takes the token with the largest gain and updates a state.

There are up to a few hundred dependent steps, so an exported graph holds them once, as the body of a ``Scan`` over the
step's number: K steps, no early exit, states of fixed shapes, float only (TensorRT's support table lists float types alone
for Scan). Outside of an export the same steps run in a plain loop.

Ties are common: two tokens that cover only each other gain the same, but rounding differs between runtimes. So gains
within 1e-5 (relative) of the best one are ties.

``Scan`` and not ``Loop``: torch.onnx writes a ``while_loop`` as a Loop that ends by a condition, so its number of steps
is unknown to a build. ``ArgMax`` is avoided: it has no tolerance, and TensorRT's takes no vector. torch.onnx translates
``scan`` since pytorch/pytorch#154513 (mid-2025); tried with torch 2.13.
Letters: N visual tokens (padded), K kept = steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trio_edge.trio.selectors.tokens.candidates import selection_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from trio_edge.trio.selectors.interface import Selection

State = tuple[Tensor, ...]

_TIE = 1e-5


def greedy_selection(
    candidate_N: Bool[Tensor, "N"],
    real_N: Bool[Tensor, "N"],
    *,
    num_keep: int,
    state: State,
    constants: State,
    gain: Callable[[State, State], Tensor],
    update: Callable[[State, State, Tensor, Tensor], State],
) -> Selection:
    """Return the tokens that ``num_keep`` greedy steps take.

    Of equal gains the lower index is taken. If no candidate is left, the other real tokens follow in order, then padding.
    A token's score is K if the first step takes it, 1 if the last one does, and 0 if none does.

    Args:
        candidate_N: Tokens that a step may take.
        real_N: False at padding.
        num_keep: K.
        state: Float tensors of fixed shapes.
        constants: Other tensors that the steps read. The functions must not capture tensors.
        gain: Maps state and constants to the gain of every token, finite; read at free candidates only.
        update: Maps state, constants, the index of the taken token (int64, [1]) and the step's number (0-d) to the next
            state, new tensors of the same shapes.
    """
    index_N = torch.arange(candidate_N.shape[0], device=candidate_N.device).to(torch.float32)

    def step(*values: Tensor) -> tuple[Tensor, ...]:
        free_N, inner = values[0], values[1 : 1 + len(state)]
        number, places_N, fixed = values[1 + len(state)], values[2 + len(state)], values[3 + len(state) :]
        best = _first_best(gain(inner, fixed), free_N > 0, places_N)
        free_N = torch.where(places_N == best, 0.0, free_N)
        return (free_N, *update(inner, fixed, best.to(torch.int64), number), best)

    first = (candidate_N.to(torch.float32), *state)
    picks_K1 = _repeat(step, first, (index_N, *constants), num_steps=num_keep)
    worth_K1 = torch.arange(num_keep, 0, -1, device=index_N.device).to(torch.float32)[:, None]
    # Steps without a candidate take a token a second time; its first step counts.
    place_N = torch.where(picks_K1 == index_N[None, :], worth_K1, 0.0).amax(0)
    place_N = torch.where(candidate_N, place_N, 0.0)
    return selection_of(place_N > 0, place_N, real_N, num_keep=num_keep)


def cover(
    similarity_NN: Float[Tensor, "N N"],
    weight_N: Float[Tensor, "N"],
    candidate_N: Bool[Tensor, "N"],
    real_N: Bool[Tensor, "N"],
    *,
    num_keep: int,
) -> Selection:
    """Return the greedy solution of a weighted facility location.

    gain_i = w_i Σ_j max(0, s_ij − max over taken t of s_tj), starting from a cover of 0.

    Args:
        similarity_NN: s of the taken token (row) and the covered one (column); 0 in columns of tokens not to cover.
        weight_N: w >= 0.
        candidate_N: Tokens that may be taken.
        real_N: False at padding.
        num_keep: K.
    """
    return greedy_selection(
        candidate_N,
        real_N,
        num_keep=num_keep,
        state=(torch.zeros_like(weight_N),),
        constants=(similarity_NN, weight_N),
        gain=_newly_covered,
        update=_covered,
    )


def _newly_covered(state: State, constants: State) -> Tensor:
    (cover_N,), (similarity_NN, weight_N) = state, constants
    return weight_N * torch.relu(similarity_NN - cover_N[None, :]).sum(-1)


def _covered(state: State, constants: State, best: Tensor, _number: Tensor) -> State:
    return (torch.maximum(state[0], row_at(constants[0], best)),)


def row_at(matrix_XN: Tensor, index: Int[Tensor, "1"]) -> Tensor:
    """Return one row, [N]."""
    return matrix_XN.index_select(0, index).reshape(-1)


def _first_best(
    gain_N: Float[Tensor, "N"], free_N: Bool[Tensor, "N"], index_N: Float[Tensor, "N"]
) -> Float[Tensor, "1"]:
    gain_N = torch.where(free_N, gain_N, torch.finfo(gain_N.dtype).min)
    best = gain_N.amax(0, keepdim=True)
    is_best_N = gain_N >= best - _TIE * best.abs()
    # The last index and not N: with a gain of NaN the result must still be a valid index.
    return torch.where(is_best_N, index_N, index_N[-1:]).amin(0, keepdim=True)


def _repeat(
    step: Callable[..., tuple[Tensor, ...]], state: State, constants: State, *, num_steps: int
) -> Float[Tensor, "K 1"]:
    """Run ``step`` on state, step number and constants; return each step's result besides the next state."""
    numbers = torch.arange(num_steps, device=state[0].device).to(torch.float32)
    if torch.compiler.is_exporting():
        # Not torch's scan(), which compiles the step; the tests' type checks cannot be compiled.
        from torch._higher_order_ops.scan import scan_op

        traced_scan: Any = scan_op  # has no types
        picks: Tensor = traced_scan(step, list(state), [numbers], tuple(constants))[-1]
        return picks
    taken = []
    for number in numbers:
        *following, best = step(*state, number, *constants)
        state = tuple(following)
        taken.append(best)
    return torch.stack(taken)
