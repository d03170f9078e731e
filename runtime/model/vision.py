"""From images to the visual tokens that enter the decoder: the vision graph and, if there is one, the reduce graph after it.

If the reduce graph compares the question with the image in CLIP's space, CLIP's text tower runs between them. The host
waits for the device only if it needs to know which tokens were kept: see ``Vision.encode_images``.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, final

import numpy as np

from trio_edge.runtime.bundle import graph_io as io
from trio_edge.runtime.bundle.errors import ManifestError, PromptTooLongError, ShapeError
from trio_edge.runtime.devices.memory import Recent, copy_tensor
from trio_edge.runtime.model.programs import Timeline

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray
    from PIL import Image

    from trio_edge.runtime.bundle.manifest import Profile
    from trio_edge.runtime.devices.interface import DeviceTensor
    from trio_edge.runtime.images.interface import ImageProcessing
    from trio_edge.runtime.images.processing import ImageLayout
    from trio_edge.runtime.model.programs import BoundLaunch, Programs
    from trio_edge.runtime.prompts.clip_text import ClipTexts
    from trio_edge.runtime.videos.qwen import VideoProcessing
    from trio_edge.runtime.videos.reading import Video


class PreparedImage(NamedTuple):
    """An image, or a pair of video frames, prepared for the vision graph, and the question for the reduce graph."""

    layout: ImageLayout
    profile: Profile
    """Profile of the vision graph with room for the image."""
    make_inputs: Callable[[Mapping[str, int]], dict[str, NDArray[Any]]]
    """Returns the inputs of the vision graph, padded to the sizes of a profile."""
    clip_texts: tuple[NDArray[np.int32], NDArray[np.int32]] | None
    """Ids and marks of the question as CLIP's texts, if the reduce graph needs them."""
    key: bytes = b""
    """Digest of the pixels; empty if no images are kept."""
    has_previous: bool = False
    """Whether this is a pair of frames, and not the first of its video."""

    @property
    def inputs(self) -> dict[str, NDArray[Any]]:
        """Inputs of the vision graph, padded to ``profile`` and computed on access."""
        return self.make_inputs(self.profile.sizes)


class VisualInput(NamedTuple):
    """The visual tokens of a prompt's images. The device may still be computing them."""

    tokens: DeviceTensor | NDArray[Any]
    """[M, D], visual tokens that enter the decoder, image by image."""
    num_visual: int
    """Visual tokens of the images; M unless the reduce graph dropped some."""
    rows: int
    """N, rows reserved for the visual tokens."""
    run_lengths: tuple[int, ...] = ()
    """Tokens of each run; M in total."""
    image_lengths: tuple[int, ...] = ()
    """Tokens of each image; M in total."""
    positions: tuple[tuple[NDArray[np.int32], int], ...] = ()
    """With M-RoPE, for each image: positions [3, M'] of its tokens, from 0, and the number of positions that it takes."""
    planes: tuple[DeviceTensor, ...] = ()
    """DeepStack planes, [M, D] each, if the model has them."""
    was_kept: bool = False
    """Whether the outputs for all images were reused, so that no vision graph ran."""


@final
class Vision:
    """Runs the graphs before the decoder, image by image."""

    def __init__(
        self,
        programs: Programs,
        *,
        images: ImageProcessing,
        clip_texts: ClipTexts | None = None,
        keep_images: int = 0,
    ) -> None:
        """Allocate memory for the outputs of ``keep_images`` kept images.

        ``clip_texts`` splits questions into CLIP's texts, in a bundle with CLIP's text tower.

        Raises:
            BackendError: If the device has too little memory.
        """
        self._manifest, self._images, self._clip_texts = programs.manifest, images, clip_texts
        self._programs, self._device, self._memory = programs, programs.device, programs.memory
        (self._spec,) = (spec for spec in self._manifest.graphs if spec.role == "vision")
        self._reduce_inputs = {
            name for launch in programs.launches.get("reduce", ())[-1:] for name in launch.inputs
        }
        self.reads_embeddings = io.TEXT_EMBEDS in self._reduce_inputs
        """Whether the reduce graph reads embeddings of the text after the last image."""
        self.reads_question = self.reads_embeddings or clip_texts is not None
        """Whether the tokens depend on the question."""
        self._timeline = Timeline(programs.device)
        self._kept: dict[str, NDArray[np.int32]] = {}
        """Indices that each graph kept of the last image, by role; valid once the host has waited for the device."""
        self._layouts: list[tuple[ImageLayout, dict[str, NDArray[np.int32]]]] = []
        """Layout before any selection and ``_kept``, for each image of the last prompt."""
        self._recent = Recent([self._slot() for _ in range(keep_images)]) if keep_images else None
        """Outputs of the vision graph for recent images, by their pixels."""

    def _slot(self) -> dict[str, DeviceTensor]:
        (launch,) = self._programs.launches["vision"]
        places = {name: self._memory.tensor(place) for name, place in launch.outputs.items()}
        return {
            name: whole._replace(address=self._device.allocate(whole.num_bytes, purpose="kept images"))
            for name, whole in places.items()
        }

    @property
    def graph_ms(self) -> dict[str, float]:
        """The device's milliseconds in each graph for the images of the last prompt."""
        times: defaultdict[str, float] = defaultdict(float)
        for name, milliseconds in self._timeline.milliseconds().items():
            times[name.partition(".")[0]] += milliseconds
        return times

    def prepare(
        self, image: Image.Image, question: str, *, images: ImageProcessing | None = None
    ) -> PreparedImage:
        """Return an image of ``open_image`` prepared for the graphs before the decoder.

        ``images`` is the processing of this image; None means that of a single image.

        Raises:
            ImageError: If the image cannot be processed.
            ShapeError: If no profile has room for the image, or for the question.
        """
        images = self._images if images is None else images
        layout = images.layout(*image.size)
        return PreparedImage(
            layout,
            self._profile_of(layout),
            partial(images.prepare, image),
            clip_texts=None if self._clip_texts is None else self._clip_texts.arrays(question),
            key=b"" if self._recent is None else _key_of(image, images),
        )

    def prepare_video(self, video: Video, question: str, *, videos: VideoProcessing) -> list[PreparedImage]:
        """Return each pair of frames of a video of ``open_video``, prepared as by ``prepare``, with the same errors."""
        texts = None if self._clip_texts is None else self._clip_texts.arrays(question)
        return [
            PreparedImage(
                layout,
                self._profile_of(layout),
                partial(videos.prepare, video, unit),
                clip_texts=texts,
                has_previous=unit > 0,
            )
            for unit, layout in enumerate(videos.layouts(video))
        ]

    def _profile_of(self, layout: ImageLayout) -> Profile:
        """Return the first profile of the vision graph with room for an image."""
        for profile in self._spec.profiles:
            if all(profile.sizes[name] >= size for name, size in layout.sizes.items()):
                return profile
        raise ShapeError(
            f"image: expected at most {self._manifest.max_visual} visual tokens in the exported shapes, got"
            f" {layout.num_visual} for {layout.width}x{layout.height} pixels; export for this size, or without"
            " --only-image-sizes"
        )

    def encode_images(
        self, images: Sequence[PreparedImage], *, after: NDArray[Any] | None, text_bucket: int
    ) -> VisualInput:
        """Enqueue the vision graph for each image and, if there is one, the reduce graph.

        The host waits for the device before it sends another image, and if it needs the indices that the graphs kept: for
        M-RoPE's positions, for the reduce graph's newlines, and for the lengths of an image's runs.

        ``images`` are those of ``prepare`` in the prompt's order, ``after`` [T2, D] the embeddings of the text after the last
        one, padded to ``text_bucket`` rows; None unless ``reads_embeddings``.

        Raises:
            ShapeError: If the inputs do not fit, or all images together have more tokens than the exported shapes.
            BackendError: If a graph fails.
        """
        self._layouts = []
        self._timeline.recorded.clear()
        rows = self.rows_for(images)
        if not images:
            tokens = np.empty((0, self._manifest.dimensions.hidden_size), self._manifest.dtype)
            return VisualInput(tokens, 0, rows)
        encoded: list[list[DeviceTensor]] = []
        image_lengths: list[int] = []
        run_lengths: list[int] = []
        were_kept = []
        for prepared in images:
            outputs, was_kept = self._encode(prepared, after=after, text_bucket=text_bucket)
            if len(images) > 1:  # the next image overwrites the graphs' outputs
                outputs = self._collected(outputs, first=sum(image_lengths))
            encoded.append(outputs)
            image_lengths.append(outputs[0].shape[0])
            # Only an image with several runs needs the kept indices.
            one_run = len(prepared.layout.run_lengths) == 1
            run_lengths.extend(image_lengths[-1:] if one_run else self.entering(-1).run_lengths)
            were_kept.append(was_kept)
        whole, *planes = (
            first._replace(shape=(sum(image_lengths), *first.shape[1:])) for first in encoded[0]
        )
        return VisualInput(
            tokens=whole,
            num_visual=sum(prepared.layout.num_visual for prepared in images),
            rows=rows,
            run_lengths=tuple(run_lengths),
            image_lengths=tuple(image_lengths),
            positions=self._positions() if self._manifest.position_axes == 3 else (),
            planes=tuple(planes),
            was_kept=all(were_kept),
        )

    def rows_for(self, images: Sequence[PreparedImage]) -> int:
        """Return the smallest N with room for all images.

        Raises:
            PromptTooLongError: If all images together have more visual tokens than the exported shapes.
        """
        keep, sizes = self._manifest.token_keep, self._manifest.visual_sizes
        counts = [prepared.layout.num_visual for prepared in images]
        total = sum(counts if keep is None else (min(count, keep) for count in counts))
        for rows in sizes:
            if rows >= total:
                return rows
        raise PromptTooLongError(
            f"images: expected at most {sizes[-1]} visual tokens in all (the exported shapes), got {total} for {len(images)}"
            " images; use fewer or smaller ones, or export with a larger --max-images"
        )

    def _encode(
        self, prepared: PreparedImage, *, after: NDArray[Any] | None, text_bucket: int
    ) -> tuple[list[DeviceTensor], bool]:
        """Enqueue the graphs for one image; return its tokens and planes, and whether the vision graph was skipped."""
        manifest, num_visual = self._manifest, prepared.layout.num_visual
        has_mrope, keep = manifest.position_axes == 3, manifest.token_keep
        must_know = has_mrope or len(prepared.layout.run_lengths) > 1
        (launch,) = self._programs.at("vision", prepared.profile.sizes)
        if prepared.has_previous:
            self._keep_previous(launch)
        recent = self._recent
        was_kept = recent is not None and self._bring_back(recent.find(prepared.key), launch)
        if not was_kept:
            self.run_vision(prepared.inputs, prepared.profile)
            slot = None if recent is None else recent.take(prepared.key)
            for name, kept in (slot or {}).items():
                copy_tensor(self._device, kept, launch.tensors[name])
        outputs = [tensor.rows(0, num_visual) for tensor in self._tokens_of(launch)]
        if manifest.encoder_keep is not None and (must_know or keep is not None):
            self._device.synchronize()
        if keep is not None:
            reduced = self.reduce_tokens(*self._inputs_of_reduce(prepared, after, text_bucket))
            outputs = [tensor.rows(0, min(keep, num_visual)) for tensor in reduced]
            if must_know:
                self._device.synchronize()
        self._layouts.append((prepared.layout, self._kept))
        return outputs, was_kept

    def _bring_back(self, slot: Mapping[str, DeviceTensor] | None, launch: BoundLaunch) -> bool:
        """Enqueue copies of a kept image's outputs to the vision graph's; return False without any."""
        if slot is None:
            return False
        for name, kept in slot.items():
            copy_tensor(self._device, launch.tensors[name], kept)
        self._kept = {}
        self._fetch_kept(launch)
        return True

    def _keep_previous(self, launch: BoundLaunch) -> None:
        """Enqueue a copy of the last frames' tokens to the input of a reduce graph that compares frames."""
        if io.PREVIOUS_TOKENS in self._reduce_inputs:
            tokens, *_ = self._tokens_of(launch)
            place = self._programs.launches["reduce"][-1].inputs[io.PREVIOUS_TOKENS]
            copy_tensor(self._device, self._memory.tensor(place, tokens.shape), tokens)

    def _collected(self, outputs: Sequence[DeviceTensor], *, first: int) -> list[DeviceTensor]:
        """Enqueue copies of an image's tokens and planes to the memory for all images, from row ``first`` on."""
        several = self._memory.images(self._device)
        places = [whole.rows(first, tensor.shape[0]) for whole, tensor in zip(several, outputs)]
        for place, source in zip(places, outputs):
            copy_tensor(self._device, place, source)
        # The next image overwrites the inputs, and the kept indices on the host.
        self._device.synchronize()
        layout, kept = self._layouts[-1]
        self._layouts[-1] = layout, {role: indices.copy() for role, indices in kept.items()}
        return places

    def _tokens_of(self, launch: BoundLaunch) -> tuple[DeviceTensor, ...]:
        names = io.token_outputs(launch.spec.runs, self._manifest.num_deepstack)
        return tuple(launch.tensors[name] for name in names)

    @property
    def layouts(self) -> tuple[ImageLayout, ...]:
        """Layouts of the last images' tokens that entered the decoder; valid once the host has waited for the device."""
        return tuple(self.entering(index) for index in range(len(self._layouts)))

    def entering(self, index: int) -> ImageLayout:
        """Return one of ``layouts``."""
        layout, kept = self._layouts[index]
        if "vision" in kept:
            layout = layout.kept(kept["vision"])
        return layout.taken(kept["reduce"][: layout.num_visual]) if "reduce" in kept else layout

    def _positions(self) -> tuple[tuple[NDArray[np.int32], int], ...]:
        result = []
        for layout in self.layouts:
            if layout.positions is None:
                raise ManifestError(
                    "position_axes: expected 1 with image tiles, got 3; export the bundle again"
                )
            result.append((layout.positions, layout.position_span))
        return tuple(result)

    def _inputs_of_reduce(
        self, prepared: PreparedImage, after: NDArray[Any] | None, text_bucket: int
    ) -> tuple[dict[str, NDArray[Any]], dict[str, int]]:
        """Return the inputs of the reduce program that no other graph provides, and its sizes."""
        num_visual, rows = prepared.layout.num_visual, prepared.profile.sizes["N"]
        is_newline = np.zeros(rows, np.int32)
        layout = prepared.layout.kept(self._kept["vision"]) if "vision" in self._kept else prepared.layout
        is_newline[:num_visual] = np.isnan(layout.boxes[:, 0])
        inputs: dict[str, NDArray[Any]] = {
            io.NUM_VISUAL: np.array([num_visual], np.int32),
            io.IS_NEWLINE: is_newline,
        }
        sizes = {"N": rows, "T": text_bucket}
        if self.reads_embeddings and after is not None:
            text = np.zeros((text_bucket, self._manifest.dimensions.hidden_size), self._manifest.dtype)
            text[: len(after)] = after
            inputs |= {io.TEXT_EMBEDS: text, io.NUM_TEXT: np.array([len(after)], np.int32)}
        if io.PREVIOUS_TOKENS in self._reduce_inputs:
            inputs[io.HAS_PREVIOUS] = np.array([prepared.has_previous], np.int32)
            if not prepared.has_previous:  # the graph reads them in any case
                shape = rows, self._manifest.dimensions.hidden_size
                inputs[io.PREVIOUS_TOKENS] = np.zeros(shape, self._manifest.dtype)
        if prepared.clip_texts is not None:
            inputs[io.CLIP_IDS], inputs[io.TEXT_MARKS] = prepared.clip_texts
            sizes["M"] = len(inputs[io.TEXT_MARKS])
        return inputs, sizes

    # The graphs one by one

    def run_vision(self, inputs: Mapping[str, NDArray[Any]], profile: Profile) -> tuple[DeviceTensor, ...]:
        """Enqueue the vision graph and return its visual tokens and DeepStack planes on the device, [N, D] each.

        ``inputs`` are padded to ``profile``.

        Raises:
            ShapeError: If an input is missing, unknown or of another shape or dtype.
        """
        self._kept = {}
        return self._run(self._programs.at("vision", profile.sizes), inputs)

    def reduce_tokens(
        self, inputs: Mapping[str, NDArray[Any]], sizes: Mapping[str, int]
    ) -> tuple[DeviceTensor, ...]:
        """Enqueue the reduce program and return its tokens and planes on the device, [K, D] each.

        ``inputs`` are those that no other graph provides. ``sizes`` are N, and T or M if it reads the question.
        """
        return self._run(self._programs.at("reduce", sizes), inputs)

    def _run(
        self, launches: Sequence[BoundLaunch], inputs: Mapping[str, NDArray[Any]]
    ) -> tuple[DeviceTensor, ...]:
        """Send ``inputs``, enqueue the launches, and return the tokens and planes of the last one."""
        for name, array in inputs.items():
            launch = next((launch for launch in launches if name in launch.spec.inputs), None)
            wanted = None if launch is None else launch.tensors[name]
            if launch is None or wanted is None or array.shape != wanted.shape or array.dtype != wanted.dtype:
                expected = "none" if wanted is None else f"{wanted.dtype} {list(wanted.shape)}"
                raise ShapeError(
                    f"{launches[-1].spec.runs} input {name!r}: expected {expected}, got {array.dtype} {list(array.shape)}"
                )
            self._memory.send_one(self._device, launch.spec.inputs[name], array)
        for launch in launches:
            self._timeline.enqueue(f"{launch.spec.label}.{len(self._layouts)}", launch.launch)
            self._fetch_kept(launch)
        return self._tokens_of(launches[-1])

    def _fetch_kept(self, launch: BoundLaunch) -> None:
        """Enqueue a copy of the indices that a graph kept; nothing if it drops nothing."""
        for name, place in launch.spec.outputs.items():
            if place == f"kept.{launch.spec.runs}":
                self._kept[launch.spec.runs] = self._memory.fetch_one(
                    self._device, place, launch.tensors[name].shape
                )


def _key_of(image: Image.Image, processing: object) -> bytes:
    """Return a digest of pixels and processing."""
    digest = hashlib.blake2b(repr((image.size, image.mode, processing)).encode(), digest_size=32)
    digest.update(image.tobytes())
    return digest.digest()
