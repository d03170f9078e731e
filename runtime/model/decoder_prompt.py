"""The rows that enter the reduced decoder, and the host's record of the visual tokens at each stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from trio_edge.runtime.bundle.errors import ShapeError
from trio_edge.runtime.bundle.graph_io import gradient_graph

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from trio_edge.runtime.bundle.manifest import Manifest
    from trio_edge.runtime.bundle.schedule import Schedule
    from trio_edge.runtime.devices.interface import DeviceTensor
    from trio_edge.runtime.prompts.tokenizer import PromptPositions


class VisualTokens(NamedTuple):
    """The visual tokens that enter a stage."""

    rows: NDArray[np.int32]
    """Row of each token, ascending."""
    images: NDArray[np.int32]
    """Image of each token."""

    def kept(self, indices: NDArray[np.int32]) -> VisualTokens:
        """Return the tokens at ``indices``, ascending, with their rows in the sequence without the other tokens."""
        rows = (self.rows[indices] - indices + np.arange(len(indices))).astype(np.int32)
        return VisualTokens(rows, self.images[indices])


class Span(NamedTuple):
    """The rows that enter a layer range."""

    num_visual: int
    """Visual tokens."""
    rows: int
    """Rows reserved for visual tokens."""
    length: int
    """Rows of the sequence without padding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderPrompt:
    """The rows of a prefill: text and visual tokens in the prompt's order, and padding up to ``max_visual + text_bucket``."""

    text: NDArray[Any]
    """[T, D], embeddings of all text."""
    visual: DeviceTensor | NDArray[Any]
    """[M, D], visual tokens, on the device or on the host; M = 0 without an image."""
    visual_rows: NDArray[np.int32]
    """[M], row of each visual token, ascending; text has the other rows of the T + M."""
    max_visual: int
    """N, rows reserved for the visual tokens: one of the manifest's visual sizes, at least M."""
    text_bucket: int
    """Rows reserved for the text: one of the manifest's buckets, at least T."""
    positions: PromptPositions
    """Positions of all N + bucket rows."""
    images: NDArray[np.int32] | None = None
    """[M], image of each visual token; None if all belong to one image."""
    planes: Sequence[DeviceTensor | NDArray[Any]] = ()
    """DeepStack planes, [M, D] each: plane i is added to the visual tokens after layer i; none without an image."""
    key: bytes = b""
    """Digest of the prompt up to its last visual token; empty if no rows are kept."""

    @property
    def num_visual(self) -> int:
        """M."""
        return self.visual.shape[0]

    @property
    def num_text(self) -> int:
        """T."""
        return len(self.text)

    @property
    def length(self) -> int:
        """Rows without padding."""
        return self.num_text + self.num_visual

    @property
    def num_after(self) -> int:
        """Text tokens after the last visual token; all of them without an image."""
        return self.length - 1 - int(self.visual_rows[-1]) if self.num_visual else self.length

    @property
    def visual_runs(self) -> list[range]:
        """The runs of consecutive rows of visual tokens."""
        starts = np.flatnonzero(np.diff(self.visual_rows, prepend=-2) > 1)
        counts = np.diff(starts, append=self.num_visual)
        return [range(int(row), int(row + count)) for row, count in zip(self.visual_rows[starts], counts)]

    @property
    def visual_tokens(self) -> VisualTokens:
        """The visual tokens that enter the first stage."""
        images = np.zeros(self.num_visual, np.int32) if self.images is None else self.images
        return VisualTokens(self.visual_rows, images)

    @property
    def num_before(self) -> int:
        """Rows up to the last visual token."""
        return self.length - self.num_after if self.num_visual else 0

    def spans(self, schedule: Schedule) -> list[Span]:
        """Return the rows that enter each layer range. They follow from the K's, without asking the device."""
        spans = [Span(self.num_visual, self.max_visual, self.length)]
        for stage in schedule.stages:
            last = spans[-1]
            kept = min(stage.keep, last.num_visual)
            spans.append(Span(kept, stage.keep, last.length - last.num_visual + kept))
        return spans

    def values(self, schedule: Schedule) -> dict[str, NDArray[np.int32]]:
        """Return what the host sends, by place: ``prompt`` in ``trio_edge.runtime.bundle.programs.sent_by_host``."""
        *entering, last = self.spans(schedule)
        rows = self.num_text + np.arange(self.max_visual, dtype=np.int32)  # rows of padding tokens
        rows[: self.num_visual] = self.visual_rows
        images = np.zeros(self.max_visual, np.int32)
        images[: self.num_visual] = 0 if self.images is None else self.images
        is_visual = np.zeros(self.max_visual + self.text_bucket, np.int32)
        is_visual[self.visual_rows] = 1
        found = {
            "prompt.position_ids": self.positions.ids,
            "prompt.visual_rows": rows,
            "prompt.visual_images": images,
            "prompt.is_visual": is_visual,
            "prompt.length": _one(self.length),
            "prompt.last_row": _one(last.length - 1),
        }
        for stage, span in enumerate(entering):
            found[f"prompt.length.{stage}"] = _one(span.length)
            found[f"prompt.num_visual.{stage}"] = _one(span.num_visual)
            found[f"prompt.probe_rows.{stage}"] = self._probe_rows(span.length, schedule)
        return found

    def _probe_rows(self, length: int, schedule: Schedule) -> NDArray[np.int32]:
        """Return the rows that carry a probe's loss. Rows up to the last image's end are replaced by the first row after it.

        The graphs would not count a visual token's direct contribution to the loss at its own row.
        """
        last = length - schedule.last_probe_offset
        rows = np.arange(last - schedule.num_probe_rows + 1, last + 1, dtype=np.int32)
        return np.maximum(rows, length - self.num_after)

    def check(self, manifest: Manifest) -> None:
        """Raise ShapeError if the rows do not fit each other or the bundle."""
        if not 1 <= self.num_text <= self.text_bucket:
            raise ShapeError(
                f"prompt: expected 1..{self.text_bucket} text tokens (the bucket), got {self.num_text}; use a larger one"
            )
        if self.num_visual > self.max_visual:
            raise ShapeError(
                f"prompt: expected at most {self.max_visual} visual tokens, got {self.num_visual}; use more rows"
            )
        rows = self.visual_rows
        steps = np.diff(rows, prepend=-1, append=self.length)
        if len(rows) != self.num_visual or (steps <= 0).any():
            raise ShapeError(
                f"prompt: expected {self.num_visual} ascending rows below {self.length} for the visual tokens, got"
                f" {len(rows)} others"
            )
        if self.num_after == 0 and gradient_graph(manifest) is not None:
            raise ShapeError(
                "prompt: expected text after the image, as the probes need it, got none; use a chat template that ends with"
                " the start of an answer"
            )
        shape = (manifest.position_axes, self.max_visual + self.text_bucket)
        if self.positions.ids.shape != shape:
            raise ShapeError(
                f"prompt: expected position ids {list(shape)}, got {list(self.positions.ids.shape)}; count all rows"
            )
        width, dtype = manifest.dimensions.hidden_size, np.dtype(manifest.dtype)
        if any(plane.shape[0] != self.num_visual for plane in self.planes):
            raise ShapeError(
                f"prompt: expected {self.num_visual} rows in each plane of DeepStack, as many as visual tokens, got"
                f" {[plane.shape[0] for plane in self.planes]}"
            )
        for values in (self.text, self.visual, *self.planes):
            if tuple(values.shape[1:]) != (width,) or np.dtype(values.dtype) != dtype:
                raise ShapeError(
                    f"prompt: expected {dtype} rows of {width} numbers, got {values.dtype} {list(values.shape)}"
                )


def _one(value: int) -> NDArray[np.int32]:
    return np.array([value], np.int32)
