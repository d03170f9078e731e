"""Answers questions about images: image and prompt in, streamed answer out.

pipeline = Pipeline.from_bundle("tiny-bundle")
answer = pipeline.generate("cat.jpg", "What is in the image?")
for piece in answer:
    print(piece, end="")
print(answer.statistics.visual_tokens, answer.statistics.kept_tokens)
"""

from __future__ import annotations

import time
from contextlib import suppress
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple, final

from trio_edge.runtime.answer import Generation
from trio_edge.runtime.backends.registry import make_backend
from trio_edge.runtime.bundle.errors import BundleError, ShapeError
from trio_edge.runtime.bundle.limits import MAX_IMAGE_PIXELS, MOST_IMAGE_PIXELS, is_whole
from trio_edge.runtime.bundle.manifest import AUTO
from trio_edge.runtime.bundle.reader import Bundle, TokenTable, open_bundle
from trio_edge.runtime.decisions.decider import Decider, Subject, surest
from trio_edge.runtime.decisions.questions import Question, check_questions
from trio_edge.runtime.decisions.wording import Wording
from trio_edge.runtime.devices.memory import Memory
from trio_edge.runtime.images.reading import load_common_formats, open_image
from trio_edge.runtime.model.answers.drafts import Drafts, Payoff, check_lookup
from trio_edge.runtime.model.answers.next_tokens import NextTokens
from trio_edge.runtime.model.answers.running import RunningAnswers
from trio_edge.runtime.model.answers.sampling import (
    AnswerRules,
    Sampler,
    TokenBias,
    TokenChooser,
    answer_limit,
    has_rules,
    sampler_of,
    with_overrides,
)
from trio_edge.runtime.model.levels import (
    Level,
    chain_of,
    images_of,
    margin_of,
    one_level,
    read_margins,
)
from trio_edge.runtime.model.programs import Programs
from trio_edge.runtime.prompts.chat import (
    build_messages,
    check_messages,
    compile_template,
    last_question,
    prompt_ids,
    visual_parts,
)
from trio_edge.runtime.prompts.clip_text import ClipTexts
from trio_edge.runtime.prompts.tokenizer import DetokenizeStream, Tokenizer
from trio_edge.runtime.videos.reading import open_video

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from PIL import Image

    from trio_edge.runtime.backends.interface import Backend
    from trio_edge.runtime.bundle.generation import GenerationSettings
    from trio_edge.runtime.bundle.manifest import Manifest
    from trio_edge.runtime.decisions.questions import Decision
    from trio_edge.runtime.decisions.wording import Sharing
    from trio_edge.runtime.engines.cpu import CpuAccuracy
    from trio_edge.runtime.images.reading import ImageSource
    from trio_edge.runtime.model.answers.drafts import LookupTokens
    from trio_edge.runtime.model.answers.running import Running
    from trio_edge.runtime.model.answers.sampling import TokenConstraint
    from trio_edge.runtime.model.decoder import HiddenStates
    from trio_edge.runtime.model.host_selection import SelectorOverride
    from trio_edge.runtime.model.vision import PreparedImage
    from trio_edge.runtime.prompts.chat import Message
    from trio_edge.runtime.prompts.tokenizer import Inset, PromptIds
    from trio_edge.runtime.videos.reading import Video

MOST_KEPT_IMAGES = 64


class _Attempt(NamedTuple):
    """A prompt at a level, read and checked before its first graph runs."""

    level: Level
    margin: float
    """Margin of the first token that is sure enough not to go up to the next level."""
    images: tuple[Image.Image, ...]
    prepared: list[PreparedImage]
    ids: PromptIds


class _Request(NamedTuple):
    """Everything that an answer needs besides its prompt."""

    attempts: list[_Attempt]
    answers: dict[str, NextTokens]
    """By level."""
    override: SelectorOverride | None
    prepare_ms: float


@final
class Pipeline:
    """An opened bundle with all its graphs loaded. Answers one question at a time, from any thread of its process.

    A bundle exported with --batch answers several at once.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        *,
        keep_images: int = 0,
        max_pixels: int = MAX_IMAGE_PIXELS,
        lookup: LookupTokens = 0,
    ) -> None:
        """Load the bundle's graphs with ``backend``; see ``from_bundle``."""
        limits = (
            ("max_pixels", max_pixels, 1, MOST_IMAGE_PIXELS),
            ("keep_images", keep_images, 0, MOST_KEPT_IMAGES),
        )
        for name, value, low, high in limits:
            if not is_whole(value) or not low <= value <= high:
                raise ShapeError(
                    f"{name}: expected {low}..{high}, got {value!r:.80}; choose a number in this range"
                )
        self._max_pixels, self._bundle, self.manifest = max_pixels, bundle, bundle.manifest
        manifest: Manifest = self.manifest
        self.backend_name = backend.name
        step_rows = [sizes["T"] for sizes in manifest.program("decode").sizes]
        self._lookup, self._payoff = check_lookup(lookup, step_rows), Payoff(step_rows)
        self._margins = read_margins(bundle.folder, manifest)
        self.tokenizer = Tokenizer.from_file(bundle.path(manifest.text.tokenizer))
        self._template = bundle.read_text(manifest.text.chat_template)
        self._embedding = TokenTable(bundle, manifest.token_embedding, manifest.token_embedding_scales)
        rows = manifest.head_rows
        head_rows = None if rows is None else TokenTable(bundle, rows, manifest.head_row_scales)
        clip_texts = None if manifest.clip_text is None else ClipTexts(bundle)
        levels = [manifest.at_level(name) for name in manifest.level_names]
        images = [images_of(level) for level in levels]
        # Loaded after everything else that can fail, because loading takes seconds and device memory.
        self._graphs = backend.load(bundle)
        try:
            memory = Memory(manifest, self._graphs.device)
            self._levels: dict[str, Level] = {}
            for level, processing in zip(levels, images):
                self._levels[level.level] = Level(
                    Programs(level, self._graphs, head_rows=head_rows, memory=memory),
                    images=processing,
                    embedding=self._embedding,
                    clip_texts=clip_texts,
                    keep_images=keep_images,
                    others=[*self._levels.values()],
                )
        except BaseException:
            self._graphs.close()
            raise
        # So that the first answer takes no longer than others. A broken template is reported when it is used.
        load_common_formats()
        with suppress(BundleError):
            compile_template(self._template)
        self._level = self._levels[manifest.level]
        """The default level."""
        self.images = self._level.images
        self._answers = RunningAnswers(self._graphs, self._level)

    @classmethod
    def from_bundle(
        cls,
        path: str | Path,
        *,
        backend: str = "auto",
        threads: int = 0,
        cpu_accuracy: CpuAccuracy = "auto",
        keep_images: int = 0,
        max_pixels: int = MAX_IMAGE_PIXELS,
        lookup: LookupTokens = 0,
    ) -> Pipeline:
        """Open the bundle at ``path`` and load its graphs.

        Args:
            path: Folder of the bundle.
            backend: "auto" or a name from ``trio_edge.runtime.backends.registry.BACKENDS``.
            threads: CPU threads; 0 lets the backend choose.
            cpu_accuracy: "auto", "float32" or "int8"; see ``make_backend``.
            keep_images: Number of recent images whose visual tokens are kept, 0 to ``MOST_KEPT_IMAGES``. A further question
                about one of them skips the vision graph and, in a bundle exported with --follow-ups, the first layer
                range's rows before the question. Answers do not change.
            max_pixels: Pixels above which an image or a frame is refused before it is decoded.
            lookup: Most draft tokens of a decode step, which prompt lookup finds; "auto" drafts as many as pay. Answers do not
                change.

        Raises:
            BundleError: If the bundle is broken.
            ManifestError: If its manifest is broken or of another schema.
            BackendError: If the backend is missing or cannot load a graph, or the device has too little memory.
            ShapeError: If ``keep_images``, ``max_pixels`` or ``lookup`` is out of range.
        """
        bundle = open_bundle(path)
        chosen = make_backend(backend, bundle=bundle, threads=threads, cpu_accuracy=cpu_accuracy)
        return cls(bundle, chosen, keep_images=keep_images, max_pixels=max_pixels, lookup=lookup)

    def generate(
        self,
        image: ImageSource | Sequence[ImageSource] | None,
        prompt: str,
        *,
        video: str | Path | Sequence[ImageSource] | None = None,
        fps: float | None = None,
        num_frames: int | None = None,
        source_fps: float | None = None,
        history: Sequence[tuple[str, str]] = (),
        system: str | None = None,
        **settings: Any,
    ) -> Generation:
        """Return the answer to ``prompt`` about images or a video, to be streamed.

        Args:
            image: A path, the bytes of a file, a PIL image or an array (see ``open_image``); a list of them; or None.
            prompt: The user's question.
            video: A file, a folder of frames or a list of images; it comes after the images.
            fps: Frames per second to sample from the video; by default the checkpoint's.
            num_frames: Frames to sample from the whole video, instead of ``fps``.
            source_fps: Frame rate of a folder or list, in frames per second.
            history: Earlier (question, answer) turns; images and video come before the first question.
            system: System prompt, if the chat template takes one.
            settings: The keyword arguments of ``chat``.

        Raises:
            ImageError: If an image cannot be read.
            ShapeError: If prompt, images or request exceed what the bundle was exported for.
            BackendError: If the pipeline is closed; while streaming also if a graph fails.
        """
        sampling = {"fps": fps, "num_frames": num_frames, "source_fps": source_fps}
        messages = _messages(image, prompt, video=video, history=history, system=system, **sampling)
        return self.chat(messages, **settings)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        repetition_penalty: float | None = None,
        no_repeat_ngram_size: int | None = None,
        min_new_tokens: int | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        logit_bias: Mapping[int, float] | None = None,
        num_logprobs: int | None = None,
        constraint: TokenConstraint | None = None,
        lookup: LookupTokens | None = None,
        level: str | None = None,
        override: SelectorOverride | None = None,
    ) -> Generation:
        """Return the answer to the last turn of a conversation, to be streamed.

        Args:
            messages: Turns such as ``{"role": "user", "content": …}``. A content is text, or a list of parts in the model's
                reading order: ``{"type": "text", "text": …}``, ``{"type": "image", "image": …}`` with a path, the bytes of
                a file, a PIL image or an array, and ``{"type": "video", "video": …}`` with a file, a folder of frames or a list of
                images, and optionally with "fps", "num_frames" and "source_fps".
            max_new_tokens: Longest answer in tokens; None means the checkpoint's setting, at most the bundle's limit.
            temperature: 0 is greedy. None, here and below, means the checkpoint's setting (``manifest.generation``).
            top_p: Sample from the most likely tokens whose probabilities sum to this.
            top_k: Sample from the k most likely tokens; 0 means all.
            seed: Makes sampling repeatable.
            repetition_penalty: Divisor for logits of tokens that occurred before; 1 means none.
            no_repeat_ngram_size: Length of token sequences that may not occur twice; 0 means no limit.
            min_new_tokens: Shortest answer in tokens.
            presence_penalty: Subtracted from the logits of tokens of the answer; like ``frequency_penalty`` in [-2, 2].
            frequency_penalty: Subtracted from the logit of a token each time that the answer has it.
            logit_bias: Numbers in [-100, 100] to add to logits, by token id.
            num_logprobs: Number of most likely tokens in ``Generation.logprobs``; None leaves that empty.
            constraint: Decides which tokens may come next, for instance by a grammar; a new one for each answer. Where only
                one may come, it is not decoded.
            lookup: As for ``from_bundle``; None means what was said there.
            level: One of ``manifest.level_names``; "auto" starts at the lowest and goes up while the first token's margin is
                small (see docs/levels.md); None is the bundle's default.
            override: Selects visual tokens on the host instead of the select graphs, for comparisons.

        Raises:
            ImageError: If an image cannot be read.
            PromptTooLongError: If the prompt has more tokens than the bundle has room for.
            ShapeError: If the messages or an argument do not fit the bundle.
            BackendError: If the pipeline is closed; while streaming also if a graph fails.
        """
        self._answers.check_open()
        start = time.perf_counter()
        limit = self.manifest.max_new_tokens if max_new_tokens is None else max_new_tokens
        if not is_whole(limit) or not 1 <= limit <= self.manifest.max_new_tokens:
            raise ShapeError(
                f"max_new_tokens: expected 1..{self.manifest.max_new_tokens} (the bundle's limit), got {limit!r};"
                " export with a larger --max-new-tokens"
            )
        if override is not None or constraint is not None:
            _check_own_code(override, constraint)
        overrides = {"repetition_penalty": repetition_penalty, "no_repeat_ngram_size": no_repeat_ngram_size}
        overrides["min_new_tokens"] = min_new_tokens
        settings = with_overrides(self.manifest.generation, overrides)
        sampler = sampler_of(settings, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
        bias: dict[str, Any] = {"presence_penalty": presence_penalty, "frequency_penalty": frequency_penalty}
        bias["logit_bias"] = logit_bias
        needs_rules = has_rules(settings) or constraint is not None or any(bias.values())
        drafted = self._lookup if lookup is None else check_lookup(lookup, self._payoff.rows)
        attempts, answers = self._attempts(messages, self._decode(messages), level), {}
        for attempt in attempts:
            run_lengths = [length for image in attempt.prepared for length in image.layout.run_lengths]
            most, rules = limit, None
            if max_new_tokens is None:
                num_prompt = attempt.ids.num_tokens + sum(run_lengths)
                most = answer_limit(settings, room=limit, num_prompt=num_prompt)
            prompt_ids = attempt.ids.all_ids(run_lengths).tolist() if needs_rules or drafted else ()
            if needs_rules:
                rules = self._rules(settings, prompt_ids, most, constraint, bias)
            chooser = TokenChooser(sampler, rules, num_logprobs=num_logprobs)
            drafts = Drafts(drafted, self._payoff, prompt_ids) if drafted else None
            answers[attempt.level.manifest.level] = NextTokens(
                chooser,
                drafts,
                embedding=self._embedding,
                stop_ids=self.manifest.text.stop_token_ids,
                limit=most,
            )
        prepare_ms = 1e3 * (time.perf_counter() - start)
        return Generation(partial(self._steps, _Request(attempts, answers, override, prepare_ms)))

    def _rules(
        self,
        settings: GenerationSettings,
        prompt_ids: Sequence[int],
        limit: int,
        constraint: TokenConstraint | None,
        bias: dict[str, Any],
    ) -> AnswerRules:
        """Return the rules of an answer; ``bias`` has arguments of ``TokenBias``."""
        num_tokens = self.manifest.token_embedding.shape[0]
        return AnswerRules(
            settings,
            prompt_ids=prompt_ids,
            stop_ids=self.manifest.text.stop_token_ids,
            limit=limit,
            constraint=constraint,
            bias=TokenBias(num_tokens, **bias) if any(bias.values()) else None,
        )

    def hidden_states(
        self,
        image: ImageSource | Sequence[ImageSource] | None,
        prompt: str,
        *,
        level: str | None = None,
        override: SelectorOverride | None = None,
        **shown: Any,
    ) -> HiddenStates:
        """As ``hidden_states_of``, with the image, the prompt and what may be ``shown`` as for ``generate``."""
        messages = _messages(image, prompt, **shown)
        return self.hidden_states_of(messages, level=level, override=override)

    def hidden_states_of(
        self,
        messages: Sequence[Message],
        *,
        level: str | None = None,
        override: SelectorOverride | None = None,
    ) -> HiddenStates:
        """Return the last hidden states of a conversation in place of an answer, for another head than the language model's.

        Args:
            messages: As for ``chat``.
            level: One of ``manifest.level_names``; None is the bundle's default.
            override: As for ``chat``.

        Raises:
            ImageError: If an image cannot be read.
            ShapeError: If prompt or images do not fit the bundle, or it was exported without --outputs hidden.
            BackendError: If the pipeline is closed, or a graph fails.
        """
        self._answers.check_open()
        (attempt,) = self._attempts(messages, self._decode(messages), one_level(self.manifest, level))
        with self._answers.turn():
            self._answers.make_way()
            self._answers.last = attempt.level
            visual = attempt.level.see(attempt.ids, attempt.prepared)
            result = attempt.level.prefill(attempt.ids, visual, attempt.prepared, override=override)
            return attempt.level.decoder.hidden_states(result)

    def decide(
        self,
        image: ImageSource | Sequence[ImageSource] | None,
        questions: Question | Sequence[Question],
        *,
        evidence: str = "",
        sharing: Sharing = "auto",
        both_orders: bool = False,
        level: str | None = None,
        override: SelectorOverride | None = None,
        **shown: Any,
    ) -> list[Decision]:
        """Return the probabilities of the answers to ``questions`` about images or a video, without decoding an answer.

        Args:
            image: As for ``generate``.
            questions: One or several; the vision graph runs once for all of them.
            evidence: Text that the questions are about as well.
            sharing: "each" selects visual tokens for every question; "joint" does it once with all of them in view, which needs
                a bundle exported with --follow-ups; "auto" takes "joint" for several questions where that is possible.
            both_orders: Also read each choice and score with its options reversed, and return the mean.
            level: As for ``chat``; the margin is that of the options' probabilities.
            override: As for ``chat``.
            shown: ``video``, ``fps``, ``num_frames``, ``source_fps`` and ``system`` of ``generate``.

        Raises:
            ImageError: If an image cannot be read.
            ShapeError: If a question or an image does not fit the bundle, or an answer cannot be told from the others.
            BundleError: If the bundle has no template for questions.
            BackendError: If the pipeline is closed, or a graph fails.
        """
        messages = _messages(image, evidence, **shown)
        asked = [questions] if isinstance(questions, Question) else questions
        how: dict[str, Any] = {"sharing": sharing, "both_orders": both_orders, "override": override}
        return list(self.iter_decisions(messages, asked, level=level, **how))

    def iter_decisions(
        self,
        messages: Sequence[Message],
        questions: Sequence[Question],
        *,
        sharing: Sharing = "auto",
        both_orders: bool = False,
        level: str | None = None,
        override: SelectorOverride | None = None,
    ) -> Iterator[Decision]:
        """Yield the answers to ``questions`` about a conversation one by one; the rest is as for ``decide`` and ``chat``.

        The last turn is evidence: its images and its text come before each question. All is checked before a graph runs.
        With the level "auto", questions that leave doubt are asked again together at the next level.
        """
        self._answers.check_open()
        start = time.perf_counter()
        check_messages(messages)
        if override is not None:
            _check_own_code(override, None)
        asked, parts = check_questions(questions), self._decode(messages)
        subject = Subject(self.wording, messages, parts, sharing, both_orders, override)
        chain = chain_of(self.manifest, level, self._margins)
        deciders = [Decider(subject, self._levels[name], self._answers) for name in chain]
        first, *_ = [decider.ready(asked) for decider in deciders]
        prepare_ms = 1e3 * (time.perf_counter() - start)
        answers = deciders[0].decisions(first, prepare_ms=prepare_ms)
        return answers if len(chain) == 1 else surest(answers, asked, deciders, [*chain.values()])

    @cached_property
    def wording(self) -> Wording:
        """How the bundle's questions are put, read at the first question; raises BundleError if that is broken."""
        return Wording(self._bundle, self.tokenizer)

    def level_named(self, name: str | None = None) -> Level:
        """Return the level called ``name``, with its manifest and image processing; None is the default.

        Raises:
            ShapeError: If the bundle has no such level.
        """
        return self._levels[one_level(self.manifest, name)]

    @property
    def notes(self) -> tuple[str, ...]:
        """Harmless problems, one line each. The first answer may add some."""
        return tuple(self._graphs.notes)

    @property
    def auto_levels(self) -> tuple[str, ...]:
        """The levels that "auto" may run, from the lowest."""
        return tuple(chain_of(self.manifest, AUTO, self._margins))

    def time_tokens(self, count: int, *, skip: int = 0) -> list[float]:
        """Return the milliseconds of each of ``count`` further tokens after the last answer, which cannot go on afterwards.

        ``skip`` rows of the KV caches are left out before them, to reach a context length at once; a negative number goes
        back.

        Raises:
            ShapeError: If the KV caches have no room for the tokens.
            BackendError: If the pipeline is closed, or a graph fails.
        """
        if not is_whole(count) or not is_whole(skip):
            raise ShapeError(f"tokens: expected whole numbers, got {count!r:.80} and {skip!r:.80}; give some")
        with self._answers.turn():
            self._answers.make_way()
            decoder = self._answers.last.decoder
            decoder.skip(skip)
            chooser, times = TokenChooser(Sampler()), []
            for token in range(count):  # any tokens, because the time does not depend on them
                start = time.perf_counter()
                (top,) = decoder.decode(self._embedding[[token]])
                chooser.choose(top, decoder.logits)
                times.append(1e3 * (time.perf_counter() - start))
            return times

    def close(self) -> None:
        """Release all graphs and device memory; closing again does nothing."""
        self._answers.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _encode(self, messages: Sequence[Message], insets: Sequence[Inset] | None = None) -> PromptIds:
        return prompt_ids(
            messages,
            tokenizer=self.tokenizer,
            template=self._template,
            text=self.manifest.text,
            insets=insets,
            max_tokens=self.manifest.text_buckets[-1],
        )

    def _decode(self, messages: Sequence[Message]) -> list[Image.Image | Video]:
        """Return the decoded images and videos of a conversation."""
        check_messages(messages)
        return [
            self._open_video(part)
            if part["type"] == "video"
            else open_image(part["image"], max_pixels=self._max_pixels)
            for part in visual_parts(messages)
        ]

    def _open_video(self, part: Mapping[str, Any]) -> Video:
        videos = self._level.videos
        if videos is None:
            raise ShapeError(
                f"video: expected a model that takes videos (Qwen2.5-VL, Qwen3-VL), got {self.manifest.family}; give its"
                " frames as images"
            )
        settings = {name: part.get(name) for name in ("fps", "num_frames", "source_fps")}
        return open_video(part["video"], videos.sampling, max_pixels=self._max_pixels, **settings)

    def _attempts(
        self, messages: Sequence[Message], parts: Sequence[Image.Image | Video], level: str | None
    ) -> list[_Attempt]:
        """Return the prompt at ``level``, or at each level of "auto" from low to high."""
        question, found = last_question(messages), list[_Attempt]()
        for name, margin in chain_of(self.manifest, level, self._margins).items():
            own = self._levels[name]
            if found and found[-1].level.vision is own.vision:
                found.append(found[-1]._replace(level=own, margin=margin))
                continue
            shown = own.show(parts, question)
            ids = self._encode(messages, [part.inset for part in shown])
            prepared = [image for part in shown for image in part.prepared]
            own.vision.rows_for(prepared)  # refuses too many
            images = tuple(image for part in shown for image in part.images)
            found.append(_Attempt(own, margin, images, prepared, ids))
        return found

    def _steps(self, request: _Request, generation: Generation) -> Iterator[str]:
        """Yield the pieces of an answer."""
        generation.statistics.ttft_ms = request.prepare_ms
        with self._answers.turn():
            running, tokens = self._first_tokens(request, generation)
        chooser, limit, statistics = running.answer.chooser, running.answer.limit, generation.statistics
        stream, stop_ids = DetokenizeStream(self.tokenizer), self.manifest.text.stop_token_ids
        try:
            while True:
                for token in tokens:
                    generation.token_ids.append(token)
                    generation.logprobs += chooser.logprobs[statistics.new_tokens : statistics.new_tokens + 1]
                    statistics.new_tokens += 1
                    if token not in stop_ids and (piece := stream.push(token)):
                        yield piece
                    if generation.is_cancelled:
                        break
                if token in stop_ids or statistics.new_tokens >= limit or generation.is_cancelled:
                    break
                with self._answers.turn():  # fails if the caller has closed the pipeline in the meantime
                    tokens = self._answers.next(running)
        finally:  # also if the reader drops the answer; without the lock, which its thread may hold then
            running.has_reader = False
        if rest := stream.finish():
            yield rest

    def _first_tokens(self, request: _Request, generation: Generation) -> tuple[Running, list[int]]:
        """Run the prompt, level by level, up to one that is sure; return the answer and its first tokens."""
        self._answers.make_way()
        statistics = generation.statistics
        start, visual = time.perf_counter(), None
        before: Level | None = None
        for attempt in request.attempts:
            level, prepared, generation.images = attempt.level, attempt.prepared, attempt.images
            if visual is None or before is None or before.vision is not level.vision:
                visual, before = level.see(attempt.ids, prepared), None
            prefill_start = time.perf_counter()
            result = level.prefill(attempt.ids, visual, prepared, override=request.override, after=before)
            statistics.prefill_ms += 1e3 * (time.perf_counter() - prefill_start)
            # The prefill has waited for the device, so times and kept indices are valid.
            if before is None:
                statistics.add_times(level.vision.graph_ms)
            level.count(statistics, visual, result, num_images=len(prepared))
            statistics.margin = margin_of(result.logits) if attempt.margin else None
            before = self._answers.last = level
            is_sure = statistics.margin is None or statistics.margin >= attempt.margin
            if is_sure or generation.is_cancelled:
                break
            statistics.levels_below += (level.manifest.level,)
        assert visual is not None, "there is an attempt"
        answer = request.answers[level.manifest.level]
        token = answer.chooser.choose(result.top, level.decoder.logits)
        generation.layouts, generation.first_logits, generation.kept = (
            level.vision.layouts,
            result.logits,
            result.kept,
        )
        statistics.text_tokens, statistics.image_was_kept = attempt.ids.num_tokens, visual.was_kept
        statistics.ttft_ms += 1e3 * (time.perf_counter() - start)
        tokens = answer.first(token, statistics)
        return self._answers.start(level, answer, generation), tokens


def _messages(
    image: ImageSource | Sequence[ImageSource] | None,
    prompt: str,
    *,
    video: str | Path | Sequence[ImageSource] | None = None,
    history: Sequence[tuple[str, str]] = (),
    system: str | None = None,
    **sampling: float | None,
) -> list[Message]:
    """Return the messages of ``Pipeline.generate``."""
    images: list[Any] = [] if image is None else [*image] if isinstance(image, (list, tuple)) else [image]
    if not isinstance(prompt, str):
        raise ShapeError(f"prompt: expected text, got {type(prompt).__name__}; write a question")
    if system is not None and not isinstance(system, str):
        raise ShapeError(f"system: expected text, got {type(system).__name__}; write a system prompt")
    for turn in history if isinstance(history, (list, tuple)) else (history,):
        is_pair = isinstance(turn, (list, tuple)) and len(turn) == 2
        if not is_pair or not all(isinstance(text, str) for text in turn):
            raise ShapeError(f"history: expected pairs of question and answer, got {turn!r:.80}; pass pairs")
    videos = [] if video is None else [{"video": video, **sampling}]
    return build_messages(prompt, images=images, videos=videos, history=history, system=system)


def _check_own_code(override: object, constraint: object) -> None:
    """Raise ShapeError unless the caller's code has the interfaces of ``chat``, where it is given."""
    if override is not None and not callable(override):
        raise ShapeError(
            f"override: expected a function, got {type(override).__name__}; see SelectorOverride"
        )
    if constraint is not None and not (hasattr(constraint, "allowed") and hasattr(constraint, "add")):
        kind = type(constraint).__name__
        raise ShapeError(f"constraint: expected a TokenConstraint, got {kind}; give it allowed() and add()")
