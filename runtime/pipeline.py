"""Picture and prompt in, streamed answer out: the runtime's front door.

pipeline = Pipeline.from_bundle("tiny-bundle")
answer = pipeline.generate("cat.jpg", "What is in the picture?")
for piece in answer:
    print(piece, end="")
print(answer.statistics.visual_tokens, answer.statistics.kept_tokens)
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

import numpy as np

from trio_edge.runtime.backend import Backend, Session, make_backend
from trio_edge.runtime.bundle import Bundle, open_bundle
from trio_edge.runtime.chat import build_messages, render_chat
from trio_edge.runtime.decoder import Choose, Decoder
from trio_edge.runtime.errors import ShapeError
from trio_edge.runtime.image import open_picture
from trio_edge.runtime.image_processing import ImageProcessing, PreparedPicture, prepare, token_boxes
from trio_edge.runtime.sampling import make_sampler
from trio_edge.runtime.text import DetokenizeStream, PromptIds, Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from PIL import Image

    from trio_edge.runtime.manifest import Manifest


@dataclass(slots=True)
class Statistics:
    """What one answer cost. Times are wall-clock milliseconds on the host."""

    visual_tokens: int = 0
    """Visual tokens of the picture, before any selection."""
    kept_tokens: tuple[int, ...] = ()
    """Visual tokens kept by each stage."""
    average_keep: float = 1.0
    """Mean over decoder layers of the visual tokens processed, as a fraction of ``visual_tokens``."""
    text_tokens: int = 0
    """Prompt tokens without the visual ones."""
    new_tokens: int = 0
    ttft_ms: float = 0.0
    """Work up to the first token: reading the picture, vision, prefill, sampling."""
    prefill_ms: float = 0.0
    """Decoder part of the first token."""
    decode_ms: float = 0.0
    """All tokens after the first."""
    graph_ms: dict[str, float] = field(default_factory=dict)
    """Time inside each graph during the prefill."""
    kv_bytes: int = 0
    """KV rows in use at the end."""
    repaired_stages: int = 0
    """Stages whose parallel NMS was redone exactly on the host."""

    @property
    def tokens_per_second(self) -> float:
        """Decode speed after the first token; 0 if there was no second one."""
        return (
            1e3 * (self.new_tokens - 1) / self.decode_ms
            if self.new_tokens > 1 and self.decode_ms > 0
            else 0.0
        )


@final
class Generation:
    """One answer: iterate to stream its pieces; ``text`` is all of it. Runs once, lazily."""

    def __init__(self, steps: Callable[[Generation], Iterator[str]]) -> None:
        self.statistics = Statistics()
        self.token_ids: list[int] = []
        """Ids of the answer, the stop token included if one came."""
        self.first_logits: NDArray[np.float32] = np.empty(0, np.float32)
        """[V], of the answer's first token; filled when the first piece is asked for."""
        self.kept: list[NDArray[np.int32]] = []
        """Per stage the kept tokens as indices into the picture's visual tokens, ascending."""
        self.boxes: NDArray[np.float32] = np.empty((0, 4), np.float32)
        """[N, 4], box of each visual token on the picture in pixels; NaN for newline tokens."""
        self._pieces: list[str] = []
        self._steps = steps(self)

    def __iter__(self) -> Iterator[str]:
        """Yield the answer's text piece by piece."""
        yield from tuple(self._pieces)
        for piece in self._steps:
            self._pieces.append(piece)
            yield piece

    @property
    def text(self) -> str:
        """The whole answer; runs what has not been streamed yet."""
        for _ in self:
            pass
        return "".join(self._pieces)


@final
class Pipeline:
    """An opened bundle with all its graphs loaded. One answer at a time."""

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        """Load the bundle's graphs with ``backend``; see ``from_bundle``."""
        manifest = bundle.manifest
        self.manifest: Manifest = manifest
        self.backend_name = backend.name
        self.processing = ImageProcessing.from_dict(manifest.image_processing)
        self._tokenizer = Tokenizer.from_file(bundle.path(manifest.text.tokenizer))
        self._template = bundle.read_text(manifest.text.chat_template)
        self._embedding = bundle.map_tensor(manifest.token_embedding)

        def load(spec: Any) -> Session:
            return backend.load(bundle.folder, spec)

        self._vision = load(manifest.graph("vision"))
        self._decoder = Decoder(manifest, load)
        self._running: Generation | None = None  # whose rows the KV caches hold

    @classmethod
    def from_bundle(cls, path: str | Path, *, backend: str = "auto", threads: int = 0) -> Pipeline:
        """Open the bundle at ``path`` and load its graphs.

        Args:
            path: Folder of the bundle.
            backend: "auto" or a name from ``trio_edge.runtime.backend.BACKENDS``.
            threads: CPU threads; 0 lets the backend choose.

        Raises:
            BundleError: If the bundle is broken.
            ManifestError: If its manifest is broken or of another schema.
            BackendError: If the backend is missing or cannot load a graph.
        """
        return cls(open_bundle(path), make_backend(backend, threads=threads))

    def generate(
        self,
        image: str | Path | bytes | Image.Image | None,
        prompt: str,
        *,
        history: Sequence[tuple[str, str]] = (),
        system: str | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        choose: Choose | None = None,
    ) -> Generation:
        """Return the answer to ``prompt`` about ``image``, to be streamed.

        Args:
            image: A picture (path, bytes or PIL image), or None for text only.
            prompt: The user's question.
            history: Earlier (question, answer) turns; the picture belongs to the first question.
            system: System prompt, where the chat template knows one.
            max_new_tokens: At most this many; None means all that the bundle has room for.
            temperature: 0 is greedy.
            top_p: Smallest set of tokens with this probability is sampled from.
            top_k: Only the k most likely tokens are sampled from; 0 means all.
            seed: Makes sampling repeatable.
            choose: Selects visual tokens on the host in place of the select graphs; for comparisons.

        Raises:
            ImageError: If the picture cannot be read.
            ShapeError: If prompt, picture or request exceed what the bundle was exported for.
        """
        start = time.perf_counter()
        limit = self.manifest.max_new_tokens if max_new_tokens is None else max_new_tokens
        if not 1 <= limit <= self.manifest.max_new_tokens:
            raise ShapeError(
                f"max_new_tokens: expected 1..{self.manifest.max_new_tokens} (the bundle's room), got {limit};"
                " export with a larger --max-new-tokens"
            )
        sample = make_sampler(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
        if isinstance(image, (list, tuple)):
            raise ShapeError(
                f"image: expected one picture a prompt, got {len(image)}; ask about one at a time"
            )
        picture = None if image is None else open_picture(image)
        ids = self._encode(prompt, has_image=picture is not None, history=history, system=system)
        prepared = None if picture is None else prepare(picture, self.processing)
        self._check_sizes(ids, prepared)

        prepare_ms = 1e3 * (time.perf_counter() - start)

        def steps(generation: Generation) -> Iterator[str]:
            generation.statistics.ttft_ms = prepare_ms
            return self._steps(generation, ids, prepared, limit=limit, sample=sample, choose=choose)

        return Generation(steps)

    def close(self) -> None:
        """Release all graphs."""
        self._vision.close()
        self._decoder.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _encode(
        self, prompt: str, *, has_image: bool, history: Sequence[tuple[str, str]], system: str | None
    ) -> PromptIds:
        text = self.manifest.text
        for user_text in (prompt, system or "", *(turn for pair in history for turn in pair)):
            self._tokenizer.check_user_text(user_text)
        turns = [
            {"role": role, "content": content}
            for pair in history
            for role, content in zip(("user", "assistant"), pair)
        ]
        rendered = render_chat(
            build_messages(prompt, has_image=has_image, history=turns, system=system),
            template=self._template,
            special_tokens={"bos_token": text.bos_token, "eos_token": text.eos_token},
        )
        return self._tokenizer.encode_prompt(
            rendered,
            image_token=text.image_token,
            image_token_id=text.image_token_id,
            has_image=has_image,
            bos_token=text.bos_token,
        )

    def _check_sizes(self, ids: PromptIds, prepared: PreparedPicture | None) -> None:
        num_text, largest = len(ids.before) + len(ids.after), self.manifest.text_buckets[-1]
        if num_text > largest:
            raise ShapeError(
                f"prompt: expected at most {largest} text tokens (the largest bucket), got {num_text};"
                " shorten it or export with a larger --max-text"
            )
        if num_text == 0:
            raise ShapeError("prompt: expected at least one token, got none; write a question")
        if prepared is not None and len(self._token_index(prepared)) > self.manifest.max_visual:
            raise ShapeError(
                f"picture: expected at most {self.manifest.max_visual} visual tokens,"
                f" got {len(self._token_index(prepared))}; export without --image-size, or for this size"
            )

    def _token_index(self, prepared: PreparedPicture) -> NDArray[np.int32]:
        """Return the vision graph's row of each visual token; an encoder that reduces has only rows that it kept."""
        if self.manifest.encoder_keep is None:
            return prepared.token_index
        return np.arange(prepared.num_tiles * self.manifest.encoder_keep, dtype=np.int32)

    def _boxes(
        self, prepared: PreparedPicture, kept_patches: NDArray[np.int32] | None
    ) -> NDArray[np.float32]:
        """Return the box [N, 4] of each visual token on the picture in pixels; NaN where it shows nothing of it."""
        boxes = token_boxes(prepared.width, prepared.height, self.processing)
        if kept_patches is None:
            return boxes
        num_patches = self.processing.patches_per_tile
        box_of_patch = np.full((prepared.num_tiles * num_patches + 1, 4), np.nan, np.float32)
        box_of_patch[prepared.token_index] = boxes
        tile_start = np.arange(prepared.num_tiles)[:, None] * num_patches
        kept: NDArray[np.float32] = box_of_patch[(tile_start + kept_patches[: prepared.num_tiles]).ravel()]
        return kept

    def _see(self, prepared: PreparedPicture) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """Return the picture's visual tokens [N, D] without padding, and their boxes on it."""
        used = self._token_index(prepared)
        index = np.zeros(self.manifest.max_visual, dtype=np.int32)
        index[: len(used)] = used
        outputs = self._vision.run({"pixel_values": prepared.pixel_values, "token_index": index})
        return outputs["visual_tokens"][: len(used)], self._boxes(prepared, outputs.get("kept_patches"))

    def _embed_prompt(self, ids: PromptIds, visual_tokens: NDArray[Any]) -> NDArray[Any]:
        """Return inputs_embeds [1, S, D]: text, visual tokens, text, and padding up to the text bucket."""
        manifest = self.manifest
        num_text = len(ids.before) + len(ids.after)
        bucket = next(size for size in manifest.text_buckets if size >= num_text)
        embeds = np.zeros(
            (1, manifest.max_visual + bucket, manifest.dimensions.hidden_size), dtype=manifest.dtype
        )
        row = len(ids.before)
        embeds[0, :row] = self._embedding[ids.before]
        embeds[0, row : row + len(visual_tokens)] = visual_tokens
        row += len(visual_tokens)
        embeds[0, row : row + len(ids.after)] = self._embedding[ids.after]
        return embeds

    def _steps(
        self,
        generation: Generation,
        ids: PromptIds,
        prepared: PreparedPicture | None,
        *,
        limit: int,
        sample: Callable[[NDArray[np.float32]], int],
        choose: Choose | None,
    ) -> Iterator[str]:
        self._running, statistics = generation, generation.statistics
        num_text = len(ids.before) + len(ids.after)
        start = time.perf_counter()
        visual_tokens: NDArray[Any] = np.empty((0, self.manifest.dimensions.hidden_size), self.manifest.dtype)
        if prepared is not None:
            visual_tokens, generation.boxes = self._see(prepared)
        num_visual, vision_ms = len(visual_tokens), 1e3 * (time.perf_counter() - start)
        prefill_start = time.perf_counter()
        result = self._decoder.prefill(
            self._embed_prompt(ids, visual_tokens),
            visual_start=len(ids.before),
            num_visual=num_visual,
            length=num_visual + num_text,
            choose=choose,
        )
        token = sample(result.logits)
        now = time.perf_counter()
        generation.first_logits, generation.kept = result.logits, result.kept
        statistics.visual_tokens, statistics.text_tokens = num_visual, num_text
        statistics.kept_tokens = tuple(len(kept) for kept in result.kept)
        statistics.average_keep = self.manifest.schedule.average_keep(
            num_layers=self.manifest.dimensions.num_layers, num_visual=num_visual
        )
        statistics.ttft_ms += 1e3 * (now - start)
        statistics.prefill_ms = 1e3 * (now - prefill_start)
        statistics.graph_ms = ({"vision": vision_ms} if prepared is not None else {}) | self._decoder.graph_ms
        statistics.repaired_stages = result.num_repaired
        yield from self._decode(generation, token, limit=limit, sample=sample)

    def _decode(
        self, generation: Generation, token: int, *, limit: int, sample: Callable[[NDArray[np.float32]], int]
    ) -> Iterator[str]:
        """Yield the pieces of the answer that starts with ``token``."""
        statistics, stream = generation.statistics, DetokenizeStream(self._tokenizer)
        while True:
            generation.token_ids.append(token)
            statistics.new_tokens += 1
            statistics.kv_bytes = self._decoder.kv_bytes
            if token in self.manifest.text.stop_token_ids:
                break
            if piece := stream.push(token):
                yield piece
            if statistics.new_tokens >= limit:
                break
            if self._running is not generation:
                raise ShapeError(
                    "answer: expected one answer at a time, another was started; finish streaming first"
                )
            start = time.perf_counter()
            logits = self._decoder.decode(np.asarray(self._embedding[token])[None, None])
            token = sample(logits)
            statistics.decode_ms += 1e3 * (time.perf_counter() - start)
        if rest := stream.finish():
            yield rest
