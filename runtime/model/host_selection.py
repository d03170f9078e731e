"""Selection on the host instead of a select graph: exact NMS if its rounds were too few, or the caller's own choice."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, TypeAlias, final

import numpy as np

from trio_edge.runtime.bundle.graph_io import SCORES

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from trio_edge.runtime.buffers.decoder import DecoderBuffers
    from trio_edge.runtime.bundle.manifest import Manifest
    from trio_edge.runtime.devices.interface import Device, DeviceTensor
    from trio_edge.runtime.model.decoder_prompt import DecoderPrompt, Span, VisualTokens

SelectorOverride: TypeAlias = "Callable[[int, NDArray[np.int32], int], NDArray[np.int32]]"
"""Selects on the host instead of a select graph. Gets the stage, the original indices of the tokens that enter it, and K;
returns the kept tokens as ascending indices into the entering tokens."""


@final
class HostSelection:
    """Does the work of a select graph on the host, between two layer ranges of a prefill."""

    def __init__(self, manifest: Manifest, device: Device, buffers: DecoderBuffers) -> None:
        self._manifest, self._device, self._buffers = manifest, device, buffers

    def exact(self, stage: int, tokens: VisualTokens, span: Span) -> NDArray[np.int32]:
        """Return the tokens that exact NMS keeps: [K] ascending indices into ``tokens``, all that enter the stage."""
        hidden = self._download(self._buffers.hidden_out[stage].rows(0, span.length))
        schedule, keep = self._manifest.schedule, self._keep(stage)
        return greedy_nms(
            hidden[tokens.rows],
            self._buffers.results.host(f"{SCORES}.{stage}", (span.num_visual,)),
            num_keep=min(keep, span.num_visual),
            threshold=schedule.nms_threshold,
            images=tokens.images if schedule.budget == "image" else None,
            image_share=keep // self._manifest.max_images,
        )

    def replace(
        self, stage: int, kept: NDArray[np.int32], tokens: VisualTokens, span: Span, prompt: DecoderPrompt
    ) -> None:
        """Write the outputs of the select graph of ``stage``, which keeps ``kept``, where the next range reads them.

        ``kept`` [K] are ascending indices into ``tokens``. ``tokens`` and ``span`` enter the stage.
        """
        buffers, num_rows = self._buffers, self._keep(stage) + prompt.text_bucket
        rows = np.delete(np.arange(span.length), np.delete(tokens.rows, kept))
        self._gather(buffers.hidden_out[stage], rows, buffers.kept_hidden[stage], num_rows=num_rows)
        for layer, plane in buffers.planes[stage + 1].items():
            self._gather(buffers.planes[stage][layer], rows, plane, num_rows=num_rows)
        positions = self._positions(stage, rows, span, prompt, num_rows=num_rows)
        self._device.upload(buffers.kept_positions[stage], positions)
        self._send_marks(stage, tokens.kept(kept), num_rows=num_rows)

    def _keep(self, stage: int) -> int:
        return self._manifest.schedule.stages[stage].keep

    def _positions(
        self, stage: int, rows: NDArray[np.intp], span: Span, prompt: DecoderPrompt, *, num_rows: int
    ) -> NDArray[np.int32]:
        """Return the position ids of the kept rows: counted again ("compact") or unchanged ("preserved")."""
        axes = self._manifest.position_axes
        positions = np.broadcast_to(np.arange(num_rows, dtype=np.int32), (axes, num_rows)).copy()
        if self._manifest.schedule.positions == "preserved":
            entering = prompt.positions.ids
            if stage > 0:
                shape = axes, span.rows + prompt.text_bucket
                entering = self._download(self._buffers.kept_positions[stage - 1], shape=shape)
            positions[:, : len(rows)] = entering[:, rows]
        return positions

    def _send_marks(self, stage: int, kept: VisualTokens, *, num_rows: int) -> None:
        """Enqueue copies of the kept visual tokens' rows and images; padding gets the last rows."""
        buffers, keep = self._buffers, self._keep(stage)
        rows = num_rows - keep + np.arange(keep, dtype=np.int32)
        rows[: len(kept.rows)] = kept.rows
        self._device.upload(buffers.kept_visual_rows[stage], rows)
        if buffers.kept_visual_images:
            images = np.zeros(keep, np.int32)
            images[: len(kept.rows)] = kept.images
            self._device.upload(buffers.kept_visual_images[stage], images)
        self._device.synchronize()  # the arrays are not pinned

    def _gather(
        self, source: DeviceTensor, rows: NDArray[np.intp], target: DeviceTensor, *, num_rows: int
    ) -> None:
        """Copy ``rows`` of ``source`` to the first rows of ``target``, and zeros to the rest of its ``num_rows`` rows."""
        entering = self._download(source.rows(0, int(rows[-1]) + 1))
        kept = np.zeros((num_rows, entering.shape[1]), entering.dtype)
        kept[: len(rows)] = entering[rows]
        self._device.upload(target, kept)
        self._device.synchronize()  # the array is not pinned

    def _download(self, source: DeviceTensor, *, shape: tuple[int, ...] | None = None) -> NDArray[Any]:
        array = np.empty(source.shape if shape is None else shape, source.dtype)
        self._device.download(array, source)
        self._device.synchronize()
        return array


def greedy_nms(
    features: NDArray[Any],
    scores: NDArray[np.float32],
    *,
    num_keep: int,
    threshold: float,
    images: NDArray[np.int32] | None = None,
    image_share: int = 0,
) -> NDArray[np.int32]:
    """Return the K kept tokens in ascending order: the select graph's NMS, but exact for suppression chains of any length.

    Tokens are taken by descending score (ties: lower index first). Each suppresses the later tokens whose cosine similarity
    is at least ``threshold``. If too few survive, suppressed tokens fill up in the same order.

    Args:
        features: [N, D].
        scores: [N].
        num_keep: K <= N.
        threshold: τ.
        images: [N], image of each token if each image has a share; the first tokens of each image then come first.
        image_share: Number of first tokens of each image.

    Source:
        arXiv 2602.04657, the reference code's selection.
    """
    features = features.astype(np.float32)
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    # Rows of zeros, such as padding, stay zeros and are similar to no token.
    unit = features / np.maximum(norms, np.finfo(np.float32).tiny)
    order = np.argsort(-scores, kind="stable")  # ties: lower index first, as in the graph
    suppressed = np.zeros(len(scores), dtype=bool)
    survivors: list[int] = []
    for token in order:
        if len(survivors) == num_keep and images is None:
            break
        if suppressed[token]:
            continue
        survivors.append(int(token))
        suppressed |= unit @ unit[token] >= threshold
    taken = set(survivors)
    first = survivors + [int(token) for token in order if int(token) not in taken]
    if images is not None:
        seen: Counter[int] = Counter()
        is_beyond = []
        for token in first:
            is_beyond.append(seen[int(images[token])] >= image_share)
            seen[int(images[token])] += 1
        first = [first[place] for place in np.argsort(is_beyond, kind="stable")]
    return np.sort(np.array(first[:num_keep], dtype=np.int32))
