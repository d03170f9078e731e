"""The rows that enter the reduced decoder, and the host's record of the visual tokens at each stage."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from trio_edge.runtime.bundle.errors import ShapeError
from trio_edge.runtime.bundle.graph_io import gradient_graph
from trio_edge.runtime.prompts.tokenizer import (
    PromptPositions,
    RunPositions,
    mrope_positions,
    plain_positions,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from trio_edge.runtime.bundle.manifest import Manifest
    from trio_edge.runtime.bundle.reader import TokenTable
    from trio_edge.runtime.bundle.schedule import Schedule
    from trio_edge.runtime.devices.interface import DeviceTensor
    from trio_edge.runtime.model.vision import PreparedImage, VisualInput
    from trio_edge.runtime.prompts.tokenizer import PromptIds


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


class PromptRows(NamedTuple):
    """Everything that follows from a prompt's rows. It needs no answer from the device."""

    length: int
    """Rows without padding."""
    padded: int
    """Rows with padding."""
    num_before: int
    """Rows up to the last visual token."""
    runs: list[range]
    """The runs of consecutive rows of visual tokens."""
    spans: list[Span]
    """The rows that enter each layer range."""
    tokens: VisualTokens
    """The visual tokens that enter the first stage."""
    values: dict[str, NDArray[np.int32]]
    """The arrays that the host sends, by place: ``prompt`` in ``trio_edge.runtime.bundle.checks.SENT_BY_HOST``."""


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

    def rows(self, manifest: Manifest, *, keep_none: bool = False) -> PromptRows:
        """Return what follows from the rows. With ``keep_none`` no visual token passes a stage.

        Raises:
            ShapeError: If the rows do not fit each other or the bundle.
        """
        num_visual, length = self.visual.shape[0], len(self.text) + self.visual.shape[0]
        # Text tokens after the last visual token; all of them without an image.
        num_after = length - 1 - int(self.visual_rows[-1]) if len(self.visual_rows) else length
        self._check(manifest, num_visual=num_visual, length=length, num_after=num_after)
        spans = [Span(num_visual, self.max_visual, length)]
        for stage in manifest.schedule.stages:
            last = spans[-1]
            kept = 0 if keep_none else min(stage.keep, last.num_visual)
            spans.append(Span(kept, stage.keep, last.length - last.num_visual + kept))
        starts = np.flatnonzero(np.diff(self.visual_rows, prepend=-2) > 1)
        firsts, counts = self.visual_rows[starts], np.diff(starts, append=num_visual)
        images = np.zeros(num_visual, np.int32) if self.images is None else self.images
        return PromptRows(
            length=length,
            padded=self.max_visual + self.text_bucket,
            num_before=length - num_after,
            runs=[range(int(row), int(row + count)) for row, count in zip(firsts, counts)],
            spans=spans,
            tokens=VisualTokens(self.visual_rows, images),
            values=self._values(manifest.schedule, spans, images, num_after=num_after),
        )

    def _values(
        self, schedule: Schedule, spans: Sequence[Span], images: NDArray[np.int32], *, num_after: int
    ) -> dict[str, NDArray[np.int32]]:
        """Return ``PromptRows.values``."""
        num_visual, padded = len(self.visual_rows), self.max_visual + self.text_bucket
        rows = len(self.text) + np.arange(self.max_visual, dtype=np.int32)  # rows of padding tokens
        rows[:num_visual] = self.visual_rows
        found = {
            "prompt.position_ids": self.positions.ids,
            "prompt.visual_rows": rows,
            "prompt.visual_images": np.pad(images, (0, self.max_visual - num_visual)),
            "prompt.is_visual": np.isin(np.arange(padded), self.visual_rows).astype(np.int32),
            "prompt.length": np.array([spans[0].length], np.int32),
            "prompt.last_row": np.array([spans[-1].length - 1], np.int32),
        }
        for stage, span in enumerate(spans[:-1]):
            last = span.length - schedule.last_probe_offset
            # Probe rows carry a probe's loss, and follow the last image: the graphs would not count a visual token's direct
            # contribution to the loss at its own row.
            probes = np.arange(last - schedule.num_probe_rows + 1, last + 1, dtype=np.int32)
            found[f"prompt.length.{stage}"] = np.array([span.length], np.int32)
            found[f"prompt.num_visual.{stage}"] = np.array([span.num_visual], np.int32)
            found[f"prompt.probe_rows.{stage}"] = np.maximum(probes, span.length - num_after)
        return found

    def _check(self, manifest: Manifest, *, num_visual: int, length: int, num_after: int) -> None:
        """Raise ShapeError if the rows do not fit each other or the bundle."""
        num_text, bucket, most = len(self.text), self.text_bucket, self.max_visual
        fits, got = (
            1 <= num_text <= bucket and num_visual <= most,
            f"{num_text} and {num_visual}; use more rows",
        )
        _require(fits, f"1..{bucket} text tokens (the bucket) and at most {most} visual ones", got)
        steps = np.diff(self.visual_rows, prepend=-1, append=length)
        is_ascending = len(self.visual_rows) == num_visual and (steps > 0).all()
        wanted = f"{num_visual} ascending rows below {length} for the visual tokens"
        _require(is_ascending, wanted, f"{len(self.visual_rows)} others")
        way_out = "use a chat template that ends with the start of an answer"
        has_text = num_after > 0 or gradient_graph(manifest) is None
        _require(has_text, "text after the image, as the probes need it", f"none; {way_out}")
        shape, got = (manifest.position_axes, most + bucket), f"{[*self.positions.ids.shape]}; count all rows"
        _require(self.positions.ids.shape == shape, f"position ids {[*shape]}", got)
        rows = [(self.text, num_text), *((values, num_visual) for values in (self.visual, *self.planes))]
        for values, count in rows:
            wanted_shape = count, manifest.dimensions.hidden_size
            is_right = tuple(values.shape) == wanted_shape and np.dtype(values.dtype) == manifest.dtype
            _require(
                is_right, f"rows {manifest.dtype} {[*wanted_shape]}", f"{values.dtype} {[*values.shape]}"
            )


def _require(is_right: object, expected: str, got: str) -> None:
    if not is_right:
        raise ShapeError(f"prompt: expected {expected}, got {got}")


def write_prompt(
    ids: PromptIds,
    visual: VisualInput,
    *,
    manifest: Manifest,
    embedding: TokenTable,
    text_bucket: int,
    kept_images: Sequence[PreparedImage] = (),
) -> DecoderPrompt:
    """Return the rows of a prompt with ``ids`` and the images of ``Vision.encode_images``, ``text_bucket`` of them for text.

    ``embedding`` has the rows of text tokens. ``kept_images`` are the images if rows up to the last visual token may be kept.
    """
    num_rows, visual_rows = visual.rows + text_bucket, ids.visual_rows(visual.run_lengths)
    if manifest.position_axes == 1:
        positions = plain_positions(num_rows=num_rows, length=visual.tokens.shape[0] + ids.num_tokens)
    else:
        runs = [RunPositions(*where, before) for where, before in zip(visual.positions, ids.text_before)]
        positions = mrope_positions(runs, num_text=ids.num_tokens, num_rows=num_rows)
    shapes = visual.rows, text_bucket, ids.text_before, visual_rows.tolist()
    is_kept = kept_images and all(image.key for image in kept_images)
    return DecoderPrompt(
        text=embedding[ids.text],
        visual=visual.tokens,
        visual_rows=visual_rows,
        max_visual=visual.rows,
        text_bucket=text_bucket,
        positions=positions,
        planes=visual.planes,
        images=np.repeat(np.arange(len(visual.image_lengths), dtype=np.int32), visual.image_lengths),
        key=_key_of(shapes, ids, kept_images) if is_kept else b"",
    )


def _key_of(shapes: object, ids: PromptIds, images: Sequence[PreparedImage]) -> bytes:
    """Return a digest of shapes and content up to the last visual token."""
    digest = hashlib.blake2b(repr(shapes).encode(), digest_size=32)
    digest.update(ids.text[: ids.text_before[-1]].tobytes())
    for image in images:
        digest.update(image.key)
    return digest.digest()
