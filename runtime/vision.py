"""From an image to the visual tokens that enter the decoder: the vision graph, and the selection after it if there is one.

Where that selection compares the question in CLIP's space, CLIP's text tower runs between them. Nothing waits for the device,
except where the host must know what was kept before it can go on: see ``Vision.encode_image``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, final

import numpy as np

from trio_edge.runtime.buffers.seen_images import SeenImages
from trio_edge.runtime.buffers.vision import VisionBuffers
from trio_edge.runtime.bundle.errors import ManifestError, ShapeError
from trio_edge.runtime.bundle.graph_io import (
    DEEPSTACK_TOKENS,
    HAS_PREVIOUS,
    PREVIOUS_TOKENS,
    REDUCED_DEEPSTACK,
    REDUCED_TOKENS,
    VISUAL_TOKENS,
)
from trio_edge.runtime.devices.interface import DeviceTensor, find_profile
from trio_edge.runtime.devices.timeline import Timeline

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from PIL import Image

    from trio_edge.runtime.bundle.manifest import GraphSpec, Manifest, Profile
    from trio_edge.runtime.devices.interface import Launch, LoadedGraphs
    from trio_edge.runtime.images.interface import ImageProcessing
    from trio_edge.runtime.images.layout import ImageLayout
    from trio_edge.runtime.prompts.clip_text import ClipTexts


class PreparedImage(NamedTuple):
    """An image as the vision graph takes it, and its question as the selection after it reads it."""

    layout: ImageLayout
    inputs: dict[str, NDArray[Any]]
    """Inputs of the vision graph, padded to ``profile``."""
    profile: Profile
    """Profile of the vision graph; its N is the number of visual rows."""
    clip_texts: tuple[NDArray[np.int32], NDArray[np.int32]] | None
    """Ids and marks of the question as CLIP's texts, where a selection reads them."""
    key: bytes = b""
    """The same for the same pixels; empty where no image is kept."""
    image: Image.Image | None = None
    """Of one that was kept: ``inputs`` are empty, and are made of it if it has made room in the meantime."""


class VisualInput(NamedTuple):
    """The decoder's share of an image. The device may still be at work on it."""

    tokens: DeviceTensor | NDArray[Any]
    """[M, D], visual tokens that enter the decoder."""
    num_visual: int
    """Visual tokens of the image; M unless a selection before the decoder dropped some."""
    rows: int
    """N, rows reserved for them."""
    positions: NDArray[np.int32]
    """[3, M] with M-RoPE, else [3, 0]."""
    position_span: int
    """Positions that the image takes with M-RoPE, else 0."""
    planes: tuple[DeviceTensor, ...] = ()
    """[M, D] each: DeepStack's, where the model has them."""
    was_kept: bool = False
    """Whether the vision graph did not run, as its outputs for this image were kept."""


_NO_POSITIONS = np.empty((3, 0), np.int32)


@final
class Vision:
    """Runs the graphs before the decoder. One image at a time."""

    def __init__(
        self,
        manifest: Manifest,
        graphs: LoadedGraphs,
        *,
        images: ImageProcessing,
        clip_texts: ClipTexts | None = None,
        keep_images: int = 0,
    ) -> None:
        """Allocate all buffers.

        Args:
            manifest: The bundle's.
            graphs: The graphs before the decoder, loaded.
            images: The bundle's image processing.
            clip_texts: Cuts questions into texts, where the bundle has CLIP's text tower.
            keep_images: Images whose visual tokens are kept: a further question about one of them runs no vision graph.

        Raises:
            BackendError: If the device has not enough memory.
        """
        self._manifest, self._images, self._clip_texts = manifest, images, clip_texts
        self._device, self._engines = graphs.device, graphs.engines
        self._buffers = VisionBuffers(manifest, graphs.device)
        self._timeline = Timeline(graphs.device)
        self._launches: dict[tuple[str, str], Launch] = {}
        self._kept: dict[str, NDArray[np.int32]] = {}
        """By role what a graph kept of the last image, once the device has been waited for."""
        self._seen: SeenImages[PreparedImage] = SeenImages(
            self._buffers.graphs["vision"], graphs.device, count=keep_images
        )

    @property
    def graph_ms(self) -> dict[str, float]:
        """Milliseconds that the device spent in each graph for the last image."""
        return self._timeline.milliseconds()

    def prepare(self, image: Image.Image, question: str) -> PreparedImage:
        """Return what the graphs before the decoder read, padded to the first profile that has room for it.

        Args:
            image: As ``open_image`` returns it.
            question: For a selection that compares it with the image.

        Raises:
            ImageError: If the image cannot be processed.
            ShapeError: If no profile has room for the image, or the bundle has none for the question.
        """
        texts = None if self._clip_texts is None else self._clip_texts.arrays(question)
        key = self._seen.key_of(image)
        if (seen := self._seen.get(key)) is not None:
            return seen._replace(clip_texts=texts, image=image)
        layout = self._images.layout(*image.size)
        for profile in self._buffers.graphs["vision"].profiles:
            if all(profile.sizes[name] >= size for name, size in layout.sizes.items()):
                inputs = self._images.prepare(image, profile.sizes)
                return PreparedImage(layout=layout, inputs=inputs, profile=profile, clip_texts=texts, key=key)
        raise ShapeError(
            f"image: expected at most {self._manifest.max_visual} visual tokens in the exported shapes, got"
            f" {layout.num_visual} for {image.width}x{image.height} pixels; export for this size, or without"
            " --only-image-sizes"
        )

    def encode_image(self, prepared: PreparedImage, *, after: NDArray[Any], text_bucket: int) -> VisualInput:
        """Enqueue the vision graph, and the selection before the decoder if there is one.

        The host waits for the device only where it needs what the graphs kept: to number positions with M-RoPE, and to tell
        the reduce graph what shows nothing of the image.

        Args:
            prepared: From ``prepare``.
            after: [T2, D], embeddings of the text after the image, for a selection that compares it.
            text_bucket: Rows that the prompt's text is padded to.

        Raises:
            ShapeError: If the graphs' inputs do not fit.
            BackendError: If a graph fails.
        """
        manifest, num_visual = self._manifest, prepared.layout.num_visual
        has_mrope, keep = manifest.position_axes == 3, manifest.token_keep
        rows = prepared.profile.sizes["N"]
        was_kept = self._bring_back(prepared)
        if not was_kept:
            inputs, image = prepared.inputs, prepared.image
            if image is not None:
                inputs = self._images.prepare(image, prepared.profile.sizes)
            self.run_vision(inputs, prepared.profile)
            kept_as = prepared._replace(inputs={}, clip_texts=None, image=None)
            self._seen.keep(prepared.key, kept_as, self._device, self._vision_outputs(prepared.profile))
        tokens, *planes = (tensor.rows(0, num_visual) for tensor in self._vision_tokens(prepared.profile))
        if manifest.encoder_keep is not None and (has_mrope or keep is not None):
            self._device.synchronize()
        if keep is not None:
            reduced = self._reduce(prepared, after, text_bucket)
            (tokens, *planes), rows = (tensor.rows(0, min(keep, num_visual)) for tensor in reduced), keep
            if has_mrope:
                self._device.synchronize()
        positions, span = self._positions(prepared) if has_mrope else (_NO_POSITIONS, 0)
        return VisualInput(tokens, num_visual, rows, positions, span, tuple(planes), was_kept)

    def _bring_back(self, prepared: PreparedImage) -> bool:
        """Enqueue copies of what the vision graph gave for a kept image; False if it must run."""
        spec, profile = self._buffers.graphs["vision"], prepared.profile
        if not self._seen.bring_back(prepared.key, self._device, self._vision_outputs(profile)):
            return False
        self._timeline.clear()
        kept = self._buffers.fetch(self._device, spec, profile)
        self._kept = {} if kept is None else {spec.role: kept}
        return True

    def _vision_outputs(self, profile: Profile) -> dict[str, DeviceTensor]:
        spec = self._buffers.graphs["vision"]
        tensors = self._buffers.tensors(spec, profile)
        return {tensor.name: tensors[tensor.name] for tensor in spec.outputs}

    def _vision_tokens(self, profile: Profile) -> tuple[DeviceTensor, ...]:
        return self._with_planes(self._vision_outputs(profile), VISUAL_TOKENS, DEEPSTACK_TOKENS)

    def without_image(self) -> VisualInput:
        """Return what a prompt without an image has."""
        tokens = np.empty((0, self._manifest.dimensions.hidden_size), self._manifest.dtype)
        return VisualInput(tokens, 0, self._manifest.visual_sizes[0], _NO_POSITIONS, 0)

    def entering(self, prepared: PreparedImage) -> ImageLayout:
        """Return the layout of the tokens that entered the decoder, once the device has been waited for."""
        layout, kept = self._encoded(prepared), self._kept.get("reduce")
        return layout if kept is None else layout.taken(kept[: layout.num_visual])

    def _encoded(self, prepared: PreparedImage) -> ImageLayout:
        """Return the layout of the tokens that the vision graph gave, once the device has been waited for."""
        kept = self._kept.get("vision")
        return prepared.layout if kept is None else prepared.layout.kept(kept)

    def _positions(self, prepared: PreparedImage) -> tuple[NDArray[np.int32], int]:
        layout = self.entering(prepared)
        if layout.positions is None:
            raise ManifestError("position_axes: expected 1 with image tiles, got 3; export the bundle again")
        return layout.positions, layout.position_span

    def _reduce(
        self, prepared: PreparedImage, after: NDArray[Any], text_bucket: int
    ) -> tuple[DeviceTensor, ...]:
        inputs, sizes = self._reduce_inputs(prepared, after, text_bucket)
        if prepared.clip_texts is not None:
            clip_ids, marks = prepared.clip_texts
            self.encode_question(clip_ids)
            inputs, sizes = {**inputs, "text_marks": marks}, {**sizes, "M": len(marks)}
        return self.reduce_tokens(inputs, sizes=sizes)

    def _reduce_inputs(
        self, prepared: PreparedImage, after: NDArray[Any], text_bucket: int
    ) -> tuple[dict[str, NDArray[Any]], dict[str, int]]:
        """Return what the reduce graph needs besides other graphs' outputs, and its sizes."""
        num_visual, rows = prepared.layout.num_visual, prepared.profile.sizes["N"]
        is_newline = np.zeros(rows, np.int32)
        is_newline[:num_visual] = np.isnan(self._encoded(prepared).boxes[:, 0])
        inputs: dict[str, NDArray[Any]] = {
            "num_visual": np.array([num_visual], np.int32),
            "is_newline": is_newline,
        }
        if "text_embeds" in self._buffers.graphs["reduce"].input_names:
            text = np.zeros((text_bucket, self._manifest.dimensions.hidden_size), self._manifest.dtype)
            text[: len(after)] = after
            inputs |= {"text_embeds": text, "num_text": np.array([len(after)], np.int32)}
        if PREVIOUS_TOKENS in self._buffers.graphs["reduce"].input_names:  # an image has no frames before it
            previous = np.zeros((rows, self._manifest.dimensions.hidden_size), self._manifest.dtype)
            inputs |= {PREVIOUS_TOKENS: previous, HAS_PREVIOUS: np.zeros(1, np.int32)}
        return inputs, {"N": rows, "T": text_bucket}

    # The graphs one by one

    def run_vision(self, inputs: Mapping[str, NDArray[Any]], profile: Profile) -> tuple[DeviceTensor, ...]:
        """Enqueue the vision graph and return where its visual tokens, and DeepStack's planes, will be: [N, D] each.

        Args:
            inputs: The graph's, padded to ``profile``.
            profile: One of its profiles.

        Raises:
            ShapeError: If an input is missing, unknown or of another shape or dtype.
        """
        self._timeline.clear()
        self._kept = {}
        self._run(self._buffers.graphs["vision"], profile, inputs)
        return self._vision_tokens(profile)

    def encode_question(self, clip_ids: NDArray[np.int32]) -> None:
        """Enqueue CLIP's text tower for texts [M, L]; the reduce graph finds them on the device."""
        spec = self._buffers.graphs["clip_text"]
        self._run(spec, find_profile(spec, {"M": len(clip_ids)}), {"clip_ids": clip_ids})

    def reduce_tokens(
        self, inputs: Mapping[str, NDArray[Any]], *, sizes: Mapping[str, int]
    ) -> tuple[DeviceTensor, ...]:
        """Enqueue the reduce graph after the vision graph and return where its tokens and planes, [K, D] each, will be.

        Args:
            inputs: What no other graph gives it.
            sizes: N, and T or M if it looks at the text.
        """
        spec = self._buffers.graphs["reduce"]
        wanted = {name: sizes[name] for name in spec.profiles[0].sizes}
        outputs = self._run(spec, find_profile(spec, wanted), inputs)
        return self._with_planes(outputs, REDUCED_TOKENS, REDUCED_DEEPSTACK)

    def _with_planes(
        self, outputs: Mapping[str, DeviceTensor], tokens: str, planes: str
    ) -> tuple[DeviceTensor, ...]:
        return outputs[tokens], *(
            outputs[f"{planes}{index}"] for index in range(self._manifest.num_deepstack)
        )

    def _run(
        self, spec: GraphSpec, profile: Profile, inputs: Mapping[str, NDArray[Any]]
    ) -> dict[str, DeviceTensor]:
        tensors = self._buffers.tensors(spec, profile)
        for name, array in inputs.items():
            wanted = tensors.get(name)
            if wanted is None or array.shape != wanted.shape or array.dtype != wanted.dtype:
                expected = "none" if wanted is None else f"{wanted.dtype} {list(wanted.shape)}"
                raise ShapeError(
                    f"{spec.name} input {name!r}: expected {expected}, got {array.dtype} {list(array.shape)}"
                )
        self._buffers.send(self._device, spec, inputs)
        key = (spec.name, profile.name)
        if key not in self._launches:
            self._launches[key] = self._engines[spec.name].prepare(profile, tensors)
        self._timeline.enqueue(spec.name, self._launches[key])
        kept = self._buffers.fetch(self._device, spec, profile)
        if kept is not None:
            self._kept[spec.role] = kept
        return tensors
