"""A level of an open bundle: prepare the images, see them, write the prompt, prefill. And when to go up to the next level.

Levels share all graphs and one memory. Going up keeps what both levels do at their start: the visual tokens if the images
have the same form, and then the rows of the first layer range.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeAlias, final

import msgspec
import numpy as np

from trio_edge.runtime.bundle.errors import BundleError, ShapeError
from trio_edge.runtime.bundle.manifest import AUTO
from trio_edge.runtime.bundle.reader import read_regular
from trio_edge.runtime.images.interface import image_processing
from trio_edge.runtime.model.answers.sampling import log_softmax
from trio_edge.runtime.model.batch import Batch
from trio_edge.runtime.model.decoder import Decoder
from trio_edge.runtime.model.decoder_prompt import write_prompt
from trio_edge.runtime.model.vision import Vision
from trio_edge.runtime.prompts.tokenizer import Inset
from trio_edge.runtime.videos.qwen import video_processing
from trio_edge.runtime.videos.reading import Video

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from PIL import Image

    from trio_edge.runtime.answer import Statistics
    from trio_edge.runtime.bundle.manifest import Manifest
    from trio_edge.runtime.bundle.reader import TokenTable
    from trio_edge.runtime.images.interface import ImageProcessing
    from trio_edge.runtime.model.decoder import PrefillResult
    from trio_edge.runtime.model.host_selection import SelectorOverride
    from trio_edge.runtime.model.programs import Programs
    from trio_edge.runtime.model.vision import PreparedImage, VisualInput
    from trio_edge.runtime.prompts.clip_text import ClipTexts
    from trio_edge.runtime.prompts.tokenizer import PromptIds

MARGINS_NAME = "levels.json"
USUAL_MARGIN = 0.5
"""Margin that is sure enough in a bundle without ``MARGINS_NAME``."""
_MOST_BYTES = 1 << 16
Margin: TypeAlias = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Shown(NamedTuple):
    """An image or a video of a prompt."""

    images: tuple[Image.Image, ...]
    """The decoded image; for a video, the first frame of each pair."""
    prepared: list[PreparedImage]
    """One for each of ``images``."""
    is_video: bool

    @property
    def inset(self) -> Inset:
        """The text that replaces its placeholder in the prompt, around all runs of visual tokens."""
        layout = self.prepared[0].layout
        first, *rest = (image.layout.text for image in self.prepared)
        text = list(first)
        for start, *others in rest:
            text[-1] += start
            text += others
        return Inset(text, self.is_video, layout.number_marks)


@final
class Level:
    """A budget: the processing of images, and the graphs' runs, up to the first token."""

    def __init__(
        self,
        programs: Programs,
        *,
        images: ImageProcessing,
        embedding: TokenTable,
        clip_texts: ClipTexts | None = None,
        keep_images: int = 0,
        others: Sequence[Level] = (),
    ) -> None:
        """Prepare the level of ``programs``; levels with the same images share the outputs of the vision graph.

        Raises:
            BackendError: If the device has too little memory.
        """
        self.manifest: Manifest = programs.manifest
        self.images, self.embedding = images, embedding
        videos = self.manifest.video_processing
        self.videos = None if videos is None else video_processing(videos, images=self.images)
        self.vision: Vision = next(
            (other.vision for other in others if self._sees_like(other)), None
        ) or Vision(programs, images=images, clip_texts=clip_texts, keep_images=keep_images)
        self.decoder = Decoder(programs, keep_images=keep_images)
        self.batch = Batch(programs) if "batch" in programs.launches else None

    def _sees_like(self, other: Level) -> bool:
        one, two = self.manifest, other.manifest
        return (one.image_processing, one.visual_sizes, one.graphs[0]) == (
            two.image_processing,
            two.visual_sizes,
            two.graphs[0],
        )

    def show(self, parts: Sequence[Image.Image | Video], question: str) -> list[Shown]:
        """Return decoded images and videos prepared for the graphs before the decoder, in their order.

        Raises:
            ImageError: If one cannot be processed.
            ShapeError: If no profile has room for one, or for the question.
        """
        num_images = sum(not isinstance(part, Video) for part in parts)
        images = self.images if num_images == 1 else self.images.of_several()
        shown = []
        for part in parts:
            if isinstance(part, Video):
                assert self.videos is not None, "it was opened with their settings"
                prepared = self.vision.prepare_video(part, question, videos=self.videos)
                shown.append(Shown(part.frames[::2], prepared, is_video=True))
            else:
                shown.append(Shown((part,), [self.vision.prepare(part, question, images=images)], False))
        return shown

    def see(self, ids: PromptIds, prepared: Sequence[PreparedImage]) -> VisualInput:
        """Enqueue the graphs before the decoder for a prompt's images."""
        after = self.embedding[ids.after] if self.vision.reads_embeddings else None
        return self.vision.encode_images(prepared, after=after, text_bucket=self._bucket(ids))

    def prefill(
        self,
        ids: PromptIds,
        visual: VisualInput,
        prepared: Sequence[PreparedImage],
        *,
        override: SelectorOverride | None = None,
        after: Level | None = None,
    ) -> PrefillResult:
        """Write the prompt and run it; ``after`` is a level that has just run the same prompt with the same ``visual``."""
        prompt = write_prompt(
            ids,
            visual,
            manifest=self.manifest,
            embedding=self.embedding,
            text_bucket=self._bucket(ids),
            kept_images=() if self.vision.reads_question else prepared,
        )
        return self.decoder.prefill(prompt, override=override, after=None if after is None else after.decoder)

    def count(
        self, statistics: Statistics, visual: VisualInput, result: PrefillResult, *, num_images: int
    ) -> None:
        """Write the size of a prefill and the device's times to ``statistics``."""
        statistics.level = self.manifest.level
        statistics.visual_tokens, statistics.kv_bytes = visual.num_visual, self.decoder.kv_bytes
        statistics.kept_tokens = tuple(len(kept) for kept in result.kept)
        statistics.average_keep = self.manifest.average_keep_of(visual.num_visual, num_images=num_images)
        statistics.add_times(self.decoder.timeline.milliseconds())
        statistics.repaired_stages = result.num_repaired
        statistics.prefix_was_kept = self.decoder.prefix_was_kept

    def _bucket(self, ids: PromptIds) -> int:
        return next(size for size in self.manifest.text_buckets if size >= ids.num_tokens)


def images_of(manifest: Manifest) -> ImageProcessing:
    """Return the image processing of a level; raise ManifestError if it is broken."""
    return image_processing(
        manifest.image_processing,
        encoder_keep=manifest.encoder_keep,
        profiles=manifest.graphs[0].profiles,
    )


def chain_of(manifest: Manifest, level: str | None, margins: dict[str, Margin]) -> dict[str, float]:
    """Return the levels to run one after the other, each with the margin that is sure enough to stop there.

    ``level`` is a name, "auto", or None for the default; ``margins`` are those of ``read_margins``.

    Raises:
        ShapeError: If the bundle has no such level.
    """
    names = manifest.level_names
    if level == AUTO:
        chain = {**margins} or dict.fromkeys(names, USUAL_MARGIN)
        return {**chain, [*chain][-1]: 0.0}  # the last is sure enough in any case
    if level is not None and level not in names:
        known = f"expected {AUTO} or one of the bundle's levels ({', '.join(names)})"
        raise ShapeError(f"level: {known}, got {level!r:.80}; choose one of these")
    return {level or manifest.level: 0.0}


def one_level(manifest: Manifest, name: str | None) -> str:
    """Return the name of a level; None is the default.

    Raises:
        ShapeError: If the bundle has no such level.
    """
    (found, *others) = chain_of(manifest, name, {})
    if others or name == AUTO:
        raise ShapeError(f"level: expected one of {', '.join(manifest.level_names)}, got {AUTO}; choose one")
    return found


def margin_of(logits: NDArray[Any]) -> float:
    """Return the difference between the two highest probabilities of ``logits`` [V]."""
    second, first = np.sort(np.partition(log_softmax(logits), -2)[-2:])
    return float(np.exp(first) - np.exp(second))


def read_margins(bundle: Path, manifest: Manifest) -> dict[str, Margin]:
    """Return the levels of "auto" from low to high, with the margins that ``trio-calibrate --levels`` found.

    Without its file there are none.

    Raises:
        BundleError: If the file is broken, or names levels that the bundle lacks.
    """
    path = bundle / MARGINS_NAME
    try:
        if not path.exists():
            return {}
        content = read_regular(path, max_bytes=_MOST_BYTES)
        margins = msgspec.json.decode(content, type=dict[str, Margin])
    except (OSError, msgspec.DecodeError, UnicodeError) as error:
        raise BundleError(f"{path}: expected margins by level, got {error}; find them again") from None
    if unknown := sorted(margins.keys() - {*manifest.level_names}):
        names = ", ".join(manifest.level_names)
        raise BundleError(
            f"{path}: expected the bundle's levels ({names}), got {unknown[0]}; find them again"
        )
    return margins
