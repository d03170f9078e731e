"""Selection on the host instead of a select graph: exact NMS if its rounds were too few, or the caller's own choice."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, TypeAlias, final

import numpy as np

from trio_edge.runtime.bundle import graph_io as io

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from trio_edge.runtime.bundle.manifest import Launch
    from trio_edge.runtime.devices.interface import DeviceTensor
    from trio_edge.runtime.model.decoder_prompt import Span, VisualTokens
    from trio_edge.runtime.model.programs import Programs

SelectorOverride: TypeAlias = "Callable[[int, NDArray[np.int32], int], NDArray[np.int32]]"
"""Selects on the host instead of a select graph. Gets the stage, the original indices of the tokens that enter it, and K;
returns the kept tokens as ascending indices into the entering tokens."""


def drop_all(_stage: int, _entering: NDArray[np.int32], _num_keep: int) -> NDArray[np.int32]:
    """A ``SelectorOverride`` that keeps no visual token, a control: later layers see text only."""
    return np.empty(0, np.int32)


@final
class HostSelection:
    """Does the work of a select graph on the host, between two layer ranges of a prefill."""

    def __init__(self, programs: Programs) -> None:
        self._manifest, self._device, self._memory = programs.manifest, programs.device, programs.memory

    def exact(self, launch: Launch, tokens: VisualTokens, span: Span) -> NDArray[np.int32]:
        """Return the tokens that exact NMS keeps: [K] ascending indices into ``tokens``, all that enter the stage."""
        hidden = self._download(self._memory.tensor(launch.inputs[io.HIDDEN]).rows(0, span.length))
        schedule, keep = self._manifest.schedule, self._keep(launch)
        return greedy_nms(
            hidden[tokens.rows],
            self._memory.host(launch.outputs[io.SCORES], (span.num_visual,)),
            num_keep=min(keep, span.num_visual),
            threshold=schedule.nms_threshold,
            images=tokens.images if schedule.budget == "image" else None,
            image_share=keep // self._manifest.max_images,
        )

    def replace(
        self, launch: Launch, kept: NDArray[np.int32], tokens: VisualTokens, span: Span, *, num_text: int
    ) -> None:
        """Write the outputs of the select graph that ``launch`` replaces, which keeps ``kept``.

        Args:
            launch: Of a stage; it has the graph's inputs and outputs.
            kept: [K], ascending indices into ``tokens``.
            tokens: Enter the stage, as ``span`` does.
            span: Its rows.
            num_text: Rows reserved for text.
        """
        keep = self._keep(launch)
        num_rows = keep + num_text
        rows = np.delete(np.arange(span.length), np.delete(tokens.rows, kept))
        for name, place in launch.outputs.items():
            source = launch.inputs.get(name.removeprefix("kept_"))
            if source is not None and (name == io.KEPT_HIDDEN or name.startswith(io.KEPT_DEEPSTACK)):
                entering = self._memory.tensor(source).rows(0, int(rows[-1]) + 1)
                gathered = np.zeros((num_rows, entering.shape[1]), entering.dtype)
                gathered[: len(rows)] = self._download(entering)[rows]
                self._upload(place, gathered)
        # The position ids of the kept rows: counted again ("compact") or unchanged ("preserved").
        axes = self._manifest.position_axes
        positions = np.broadcast_to(np.arange(num_rows, dtype=np.int32), (axes, num_rows)).copy()
        if self._manifest.schedule.positions == "preserved":
            shape = (axes, span.rows + num_text)
            ids = self._download(self._memory.tensor(launch.inputs[io.POSITIONS], shape))
            positions[:, : len(rows)] = ids[:, rows]
        self._upload(launch.outputs[io.KEPT_POSITIONS], positions)
        # Rows and images of the kept visual tokens; padding gets the last rows.
        visual = tokens.kept(kept)
        visual_rows = num_rows - keep + np.arange(keep, dtype=np.int32)
        visual_rows[: len(visual.rows)] = visual.rows
        self._upload(launch.outputs[io.KEPT_VISUAL_ROWS], visual_rows)
        if io.KEPT_VISUAL_IMAGES in launch.outputs:
            images = np.zeros(keep, np.int32)
            images[: len(visual.rows)] = visual.images
            self._upload(launch.outputs[io.KEPT_VISUAL_IMAGES], images)

    def _keep(self, launch: Launch) -> int:
        return self._manifest.schedule.stages[launch.stage].keep

    def _upload(self, place: str, array: NDArray[Any]) -> None:
        self._device.upload(self._memory.tensor(place, array.shape), array)
        self._device.synchronize()  # the array is not pinned

    def _download(self, source: DeviceTensor) -> NDArray[Any]:
        array = np.empty(source.shape, source.dtype)
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
