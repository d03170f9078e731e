"""The interface of selectors: their inputs and their result.

Inside the decoder a selector reads the rows that enter a layer (``StageInputs``), before the decoder an image's tokens
(``TokenInputs``). Both return a ``Selection`` of exactly K rows. N and K fix all shapes; real counts are scalars. Of equal
scores the lower index comes first. If there are at most K real tokens, all are kept, in order.

Letters: S rows, N visual tokens (padded), K kept, D hidden size, E head size, F rows of the whole prompt, T text tokens;
for CLIP M texts, L tokens per text, Z width of the space that texts and images share.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import nn

from trio_edge.runtime.bundle.errors import ScheduleError
from trio_edge.trio.methods import stage_method

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from trio_edge.runtime.bundle.schedule import Schedule


class PromptInputs(NamedTuple):
    """The prompt as it entered layer 0, for selectors that read its embeddings."""

    embeds_FD: Tensor
    """[F, D], right-padded."""
    is_visual_F: Tensor
    """[F] int32, 1 at visual tokens."""
    length: Tensor
    """[1] int32, real rows."""


class OtherInput(NamedTuple):
    """A further input of a select graph. The runtime gives it what lies at ``place`` and need not know what it means."""

    dtype: str
    shape: tuple[int | str, ...]
    """Symbols as in the manifest: N, S, R and F at the stage."""
    place: str
    """What an earlier graph wrote, such as ``prefix.hidden_states_out``; see ``trio_edge.runtime.bundle.programs``."""


class StageInputs(NamedTuple):
    """The inputs of a selector before decoder layer l."""

    hidden_SD: Tensor
    """[S, D], input of layer l, right-padded."""
    cos_SE: Tensor
    """[S, E] float32 rotary table of the rows, already merged for M-RoPE."""
    sin_SE: Tensor
    visual_rows_N: Tensor
    """[N] int32, row of each visual token, ascending; any row at padding."""
    num_visual: Tensor
    """[1] int32, real visual tokens, at most N."""
    length: Tensor
    """[1] int32, real rows."""
    previous_SD: Tensor | None = None
    """[S, D], input of layer l - 1; for methods with ``reads_previous``."""
    prompt: PromptInputs | None = None
    """For methods with ``reads_prompt``."""
    saliency_N: Tensor | None = None
    """[N] float32, scores of a probe that has run before, -1 at padding."""
    image_N: Tensor | None = None
    """[N] int32, image of each token, if each image has a share of the kept tokens."""
    others: Mapping[str, Tensor] = MappingProxyType({})
    """By name, for selectors with ``other_inputs``."""
    position_S: Tensor | None = None
    """[S] int32, for decoders whose queries have a scale that depends on the position."""


class ClipInputs(NamedTuple):
    """An image and a question in CLIP's space. CLIP's texts are short, so a long question is several texts."""

    patches_NZ: Tensor
    """[N, Z], patch of each visual token; 0 at newlines."""
    texts_MLZ: Tensor
    """[M, L, Z], every token of every text."""
    marks_ML: Tensor
    """[M, L] int32: 1 at words, 2 at the end token, whose row stands for the text, 0 at the start token and padding."""


class TokenInputs(NamedTuple):
    """The inputs of a selector before the decoder."""

    tokens_ND: Tensor
    """[N, D], visual tokens after the projector, in the order in which the decoder reads them."""
    num_visual: Tensor
    """[1] int32, real tokens."""
    is_newline_N: Tensor | None = None
    """[N] bool, whether a token shows no part of the image."""
    features_NF: Tensor | None = None
    """[N, F], vision encoder's features before the projector; 0 at newlines. With ``reads_features``."""
    keys_NE: Tensor | None = None
    """[N, E], encoder's attention keys, mean over heads, of the layer before the last. With ``reads_features``."""
    attention_N: Tensor | None = None
    """[N] float32, attention of the class row (or attention received), mean over heads; 0 at newlines. With
    ``reads_features``."""
    text_TD: Tensor | None = None
    """[T, D], embeddings of the user's text after the image. With ``reads_text``."""
    num_text: Tensor | None = None
    """[1] int32, real text tokens."""
    clip: ClipInputs | None = None
    """With ``--clip``."""
    previous_ND: Tensor | None = None
    """[N, D], visual tokens at the same places in the previous pair of frames. With ``reads_previous``."""
    has_previous: Tensor | None = None
    """[1] int32; 0 for an image and a video's first pair of frames, where ``previous_ND`` is not read. With
    ``reads_previous``."""


class Selection(NamedTuple):
    """The tokens that a selector keeps."""

    kept_K: Tensor
    """[K] int64 indices into the N axis, ascending; rows that merge others come last, each with the index of the token
    that stands for it. Entries from ``num_visual`` on are padding."""
    scores_N: Tensor
    """[N] float32, higher is better; -1 at padding."""
    unsettled: Tensor
    """[1] int32; 0 if the result is exact, else the fixed number of rounds was too small."""
    weights_KN: Tensor | None = None
    """[K, N] float32, weights of rows that are sums of tokens; None if each row is the kept token itself."""


class StageParts(NamedTuple):
    """The decoder's modules at a stage, and the stage's settings."""

    previous_layer: Any
    """Decoder layer l - 1."""
    layer: Any
    """Decoder layer l."""
    final_norm: Any
    lm_head: Any
    num_keep: int
    """K."""
    max_visual: int
    """Largest N."""
    settings: Schedule
    """Probe rows and NMS."""
    image_share: int | None = None
    """Least number of tokens kept per image, if it has as many; None if all images share one budget."""
    is_quantized: bool = False
    """Whether the weights of layer l are going to be quantized."""


class StageSelector(Protocol):
    """A selector before a decoder layer; a ``torch.nn.Module``. Its row in ``trio_edge.trio.methods`` says what it reads.

    It may have ``other_inputs``, a mapping of names to ``OtherInput``: inputs that it adds to its select graph.
    """

    num_keep: int
    """K."""

    @classmethod
    def for_stage(cls, parts: StageParts) -> StageSelector:
        """Return the selector of a stage, holding the model's own modules."""

    def __call__(self, inputs: StageInputs) -> Selection:
        """Return the selection."""


class TokenSelector(Protocol):
    """A selector before the decoder; a ``torch.nn.Module`` without parameters, made from ``num_keep``.

    It also takes ``clip`` and ``grid`` if its row in ``trio_edge.trio.methods`` says so.
    """

    num_keep: int
    """K."""

    def __call__(self, inputs: TokenInputs) -> Selection:
        """Return the selection."""


class KeepingModule(nn.Module):
    """A module that keeps exactly ``num_keep`` tokens; the base of our selectors."""

    def __init__(self, *, num_keep: int) -> None:
        """Fix K; raise ScheduleError if it is below 1."""
        super().__init__()
        check_num_keep(num_keep)
        self.num_keep = num_keep


def stage_selector(
    model: Any,
    schedule: Schedule,
    *,
    stage: int,
    max_visual: int,
    max_images: int = 1,
    is_quantized: bool = False,
) -> Any:
    """Return the ``StageSelector`` of stage number ``stage``, which holds layers, final norm and head of ``model``.

    ``max_visual`` is its largest N; ``is_quantized`` tells whether the weights of its layer are going to be quantized.
    """
    keep, layer = schedule.stages[stage].keep, schedule.stages[stage].layer
    parts = StageParts(
        previous_layer=model.layers[layer - 1],
        layer=model.layers[layer],
        final_norm=model.final_norm,
        lm_head=model.lm_head,
        num_keep=keep,
        max_visual=max_visual,
        settings=schedule,
        image_share=keep // max_images if schedule.budget == "image" else None,
        is_quantized=is_quantized,
    )
    return stage_method(schedule.method).load().for_stage(parts)


def best_tokens(
    scores_N: Tensor,
    num_visual: Tensor,
    *,
    num_keep: int,
    image_N: Tensor | None = None,
    image_share: int | None = None,
) -> Tensor:
    """Return the ``num_keep`` best of the first ``num_visual`` tokens as ascending indices, int64 [K].

    ``scores_N`` are finite and not read at padding; other arguments are those of ``first_in_order``.
    """
    index_N = torch.arange(scores_N.shape[0], device=scores_N.device)
    real_N = index_N < num_visual.reshape(1)
    order_N = ranks(scores_N, real_N)
    return first_in_order(order_N, real_N, num_keep=num_keep, image_N=image_N, image_share=image_share)


def first_in_order(
    order_N: Tensor,
    real_N: Tensor,
    *,
    num_keep: int,
    image_N: Tensor | None = None,
    image_share: int | None = None,
) -> Tensor:
    """Return the first ``num_keep`` real tokens as ascending indices, int64 [K]; padding comes after all of them.

    Args:
        order_N: Place of each real token, float32, unique, below 4 N.
        real_N: False at padding.
        num_keep: K, at most N.
        image_N: Image of each token, int32. With it, the first ``image_share`` tokens of each image come first.
        image_share: Tokens per image.
    """
    N = order_N.shape[0]
    if image_N is not None and image_share is not None:
        same_NN = (image_N[:, None] == image_N[None, :]) & real_N[:, None]
        place_N = ((order_N[:, None] < order_N[None, :]) & same_NN).to(torch.float32).sum(0)
        order_N = order_N + 4 * N * (place_N >= image_share).to(torch.float32)
    order_N = order_N + 8 * N * (1.0 - real_N.to(torch.float32))
    return ascending(torch.topk(order_N, num_keep, largest=False).indices)


def ranks(scores_N: Tensor, real_N: Tensor) -> Tensor:
    """Return the rank of each token by descending score, float32; of equal scores the lower index comes first.

    ``scores_N`` is [..., N]; tokens where ``real_N`` is False come last.
    """
    index_N = torch.arange(scores_N.shape[-1], device=scores_N.device)
    scores_N = torch.where(real_N, scores_N, torch.finfo(scores_N.dtype).min)
    return comes_before(scores_N, index_N).to(torch.float32).sum(-2)


def comes_before(scores_N: Tensor, index_N: Tensor) -> Tensor:
    """Return [..., N, N] bool: whether the row's token ranks before the column's."""
    first, second = scores_N[..., :, None], scores_N[..., None, :]
    return (first > second) | ((first == second) & (index_N[:, None] < index_N[None, :]))


def ascending(index_K: Tensor) -> Tensor:
    """Return indices in ascending order, int64; float32 is exact, and every TopK kernel supports it."""
    ordered = torch.topk(index_K.to(torch.float32), index_K.shape[0], largest=False, sorted=True).values
    return ordered.to(torch.int64)


def indices_by_group(group_N: Tensor, *, num_keep: int) -> Tensor:
    """Return the first ``num_keep`` indices, int64, ordered by group and then by index.

    ``group_N`` holds small integers >= 0 as float32.
    """
    index_N = torch.arange(group_N.shape[0], device=group_N.device)
    place_N = group_N * group_N.shape[0] + index_N.to(torch.float32)
    return torch.topk(place_N, num_keep, largest=False, sorted=True).indices


def check_num_keep(num_keep: int, num_tokens: int | torch.SymInt | None = None) -> None:
    """Raise ScheduleError unless 1 <= K <= N; a symbolic N is not checked."""
    if num_keep < 1:
        raise ScheduleError(f"num_keep: expected >= 1, got {num_keep}; keep at least one token")
    if isinstance(num_tokens, int) and num_keep > num_tokens:
        raise ScheduleError(
            f"num_keep: expected <= {num_tokens} (all tokens of the span), got {num_keep}; keep fewer"
        )
