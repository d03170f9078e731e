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
from typing import TYPE_CHECKING, Any, NamedTuple, final

import numpy as np

from trio_edge.runtime.backend import Backend, Session, make_backend
from trio_edge.runtime.bundle import Bundle, open_bundle
from trio_edge.runtime.decoder import Choose, Decoder
from trio_edge.runtime.errors import ShapeError
from trio_edge.runtime.image import open_picture
from trio_edge.runtime.positions import PromptPositions, mrope_positions, plain_positions
from trio_edge.runtime.question_ids import question_ids
from trio_edge.runtime.sampling import make_sampler
from trio_edge.runtime.text import DetokenizeStream, PromptIds, Tokenizer
from trio_edge.runtime.vision_inputs import KEPT_PATCHES, KEPT_TOKENS, picture_processing

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


class _Prepared(NamedTuple):
    """A picture as the vision graph takes it."""

    inputs: dict[str, NDArray[Any]]
    width: int
    height: int
    num_visual: int
    visual_rows: int
    """N of the profile."""


class _Seen(NamedTuple):
    """What the decoder and the user are told of the picture."""

    tokens: NDArray[Any]
    """[M, D], visual tokens that enter the decoder."""
    num_visual: int
    """Visual tokens of the picture, M unless a selection before the decoder dropped some."""
    rows: int
    """N, rows reserved for them."""
    boxes: NDArray[np.float32]
    """[M, 4]."""
    positions: NDArray[np.int32]
    """[3, M] with M-RoPE, else [3, 0]."""
    position_span: int
    graph_ms: dict[str, float]


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
        self.pictures = picture_processing(manifest.image_processing, encoder_keep=manifest.encoder_keep)
        self._tokenizer = Tokenizer.from_file(bundle.path(manifest.text.tokenizer))
        self._template = bundle.read_text(manifest.text.chat_template)
        self._embedding = bundle.map_tensor(manifest.token_embedding)

        def load(spec: Any) -> Session:
            return backend.load(bundle.folder, spec)

        self._vision = load(manifest.graph("vision"))
        self._reduce = load(manifest.graph("reduce")) if manifest.token_method is not None else None
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
        self._check_text(ids)
        prepared = None if picture is None else self._prepare(picture)

        prepare_ms = 1e3 * (time.perf_counter() - start)

        def steps(generation: Generation) -> Iterator[str]:
            generation.statistics.ttft_ms = prepare_ms
            return self._steps(generation, ids, prepared, limit=limit, sample=sample, choose=choose)

        return Generation(steps)

    def close(self) -> None:
        """Release all graphs."""
        self._vision.close()
        if self._reduce is not None:
            self._reduce.close()
        self._decoder.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _encode(
        self, prompt: str, *, has_image: bool, history: Sequence[tuple[str, str]], system: str | None
    ) -> PromptIds:
        return question_ids(
            prompt,
            tokenizer=self._tokenizer,
            template=self._template,
            text=self.manifest.text,
            has_image=has_image,
            history=history,
            system=system,
        )

    def _check_text(self, ids: PromptIds) -> None:
        num_text, largest = ids.num_tokens, self.manifest.text_buckets[-1]
        if num_text > largest:
            raise ShapeError(
                f"prompt: expected at most {largest} text tokens (the largest bucket), got {num_text};"
                " shorten it or export with a larger --max-text"
            )
        if num_text == 0:
            raise ShapeError("prompt: expected at least one token, got none; write a question")

    def _prepare(self, picture: Image.Image) -> _Prepared:
        """Return the vision graph's inputs, padded to its first profile that has room for the picture."""
        width, height = picture.size
        needed = self.pictures.sizes(width, height)
        for profile in self.manifest.graph("vision").profiles:
            if all(profile.sizes[name] >= size for name, size in needed.items()):
                inputs = self.pictures.prepare(picture, profile.sizes)
                return _Prepared(
                    inputs=inputs,
                    width=width,
                    height=height,
                    num_visual=needed["N"],
                    visual_rows=profile.sizes["N"],
                )
        raise ShapeError(
            f"picture: expected at most {self.manifest.max_visual} visual tokens in the exported shapes, got"
            f" {needed['N']} for {width}x{height} pixels; export for this size, or without --only-image-sizes"
        )

    def _see(self, prepared: _Prepared, ids: PromptIds) -> _Seen:
        """Run the vision graph, and the selection before the decoder if there is one."""
        start = time.perf_counter()
        outputs = self._vision.run(prepared.inputs)
        milliseconds = {"vision": 1e3 * (time.perf_counter() - start)}
        size, kept = (prepared.width, prepared.height), outputs.get(KEPT_PATCHES, outputs.get(KEPT_TOKENS))
        mrope = self.manifest.position_axes == 3
        seen = _Seen(
            tokens=outputs["visual_tokens"][: prepared.num_visual],
            num_visual=prepared.num_visual,
            rows=prepared.visual_rows,
            boxes=self.pictures.boxes(*size, kept),
            positions=self.pictures.positions(*size, kept) if mrope else np.empty((3, 0), np.int32),
            position_span=self.pictures.position_span(*size) if mrope else 0,
            graph_ms=milliseconds,
        )
        if self._reduce is None:
            return seen
        start = time.perf_counter()
        reduced = self._reduce.run(self._reduce_inputs(prepared, ids, outputs, seen))
        milliseconds["reduce"] = 1e3 * (time.perf_counter() - start)
        num_kept = min(len(reduced["kept_tokens"]), prepared.num_visual)
        tokens = reduced["kept_tokens"][:num_kept]
        return seen._replace(
            tokens=reduced["reduced_tokens"][:num_kept],
            rows=len(reduced["kept_tokens"]),
            boxes=seen.boxes[tokens],
            positions=seen.positions[:, tokens] if mrope else seen.positions,
        )

    def _reduce_inputs(
        self, prepared: _Prepared, ids: PromptIds, outputs: dict[str, NDArray[Any]], seen: _Seen
    ) -> dict[str, NDArray[Any]]:
        names = self.manifest.graph("reduce").input_names
        is_newline = np.zeros(prepared.visual_rows, np.int32)
        is_newline[: seen.num_visual] = np.isnan(seen.boxes[:, 0])
        inputs = {
            "num_visual": np.array([seen.num_visual], np.int32),
            "is_newline": is_newline,
            **{name: outputs[name] for name in outputs if name in names},
        }
        if "text_embeds" in names:
            bucket = next(size for size in self.manifest.text_buckets if size >= ids.num_tokens)
            text = np.zeros((bucket, self.manifest.dimensions.hidden_size), self.manifest.dtype)
            text[: len(ids.after)] = self._embedding[ids.after]
            inputs |= {"text_embeds": text, "num_text": np.array([len(ids.after)], np.int32)}
        return inputs

    def _nothing_seen(self) -> _Seen:
        """Return what a prompt without a picture has."""
        return _Seen(
            tokens=np.empty((0, self.manifest.dimensions.hidden_size), self.manifest.dtype),
            num_visual=0,
            rows=self.manifest.visual_sizes[0],
            boxes=np.empty((0, 4), np.float32),
            positions=np.empty((3, 0), np.int32),
            position_span=0,
            graph_ms={},
        )

    def _embed_prompt(self, ids: PromptIds, seen: _Seen) -> NDArray[Any]:
        """Return inputs_embeds [1, S, D]: text, visual tokens, text, and padding up to the text bucket."""
        bucket = next(size for size in self.manifest.text_buckets if size >= ids.num_tokens)
        embeds = np.zeros(
            (1, seen.rows + bucket, self.manifest.dimensions.hidden_size), dtype=self.manifest.dtype
        )
        row = len(ids.before)
        embeds[0, :row] = self._embedding[ids.before]
        embeds[0, row : row + len(seen.tokens)] = seen.tokens
        row += len(seen.tokens)
        embeds[0, row : row + len(ids.after)] = self._embedding[ids.after]
        return embeds

    def _positions(self, ids: PromptIds, seen: _Seen, *, num_rows: int) -> PromptPositions:
        if self.manifest.position_axes == 1:
            return plain_positions(num_rows=num_rows, length=len(seen.tokens) + ids.num_tokens)
        return mrope_positions(
            seen.positions,
            picture_span=seen.position_span,
            num_before=len(ids.before),
            num_after=len(ids.after),
            num_rows=num_rows,
        )

    def _steps(
        self,
        generation: Generation,
        ids: PromptIds,
        prepared: _Prepared | None,
        *,
        limit: int,
        sample: Callable[[NDArray[np.float32]], int],
        choose: Choose | None,
    ) -> Iterator[str]:
        self._running, statistics = generation, generation.statistics
        start = time.perf_counter()
        seen = self._nothing_seen() if prepared is None else self._see(prepared, ids)
        generation.boxes = seen.boxes
        num_visual = len(seen.tokens)
        prefill_start = time.perf_counter()
        embeds = self._embed_prompt(ids, seen)
        result = self._decoder.prefill(
            embeds,
            positions=self._positions(ids, seen, num_rows=embeds.shape[1]),
            visual_rows=seen.rows,
            visual_start=len(ids.before),
            num_visual=num_visual,
            length=num_visual + ids.num_tokens,
            choose=choose,
        )
        token = sample(result.logits)
        now = time.perf_counter()
        generation.first_logits, generation.kept = result.logits, result.kept
        statistics.visual_tokens, statistics.text_tokens = seen.num_visual, ids.num_tokens
        statistics.kept_tokens = tuple(len(kept) for kept in result.kept)
        statistics.average_keep = self.manifest.average_keep_of(seen.num_visual)
        statistics.ttft_ms += 1e3 * (now - start)
        statistics.prefill_ms = 1e3 * (now - prefill_start)
        statistics.graph_ms = seen.graph_ms | self._decoder.graph_ms
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
