"""One thread for each bundle: loads the pipeline, answers requests and closes the pipeline.

Requests wait in a queue. Its length is bounded, and so is the expected wait, which follows from the time of earlier answers.
With a bundle exported with --batch several chats are answered at once, a token of each in turn: they decode together. They
must be at one level, and their prompts still run one by one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from concurrent.futures import Future
from itertools import chain
from typing import TYPE_CHECKING, Any, final

import numpy as np

from trio_edge.runtime.answer import Statistics
from trio_edge.runtime.bundle.errors import BackendError
from trio_edge.runtime.bundle.manifest import AUTO
from trio_edge.serving.answers.interface import ModelWorker, cut_short, queue_full, smoothed, stopping
from trio_edge.serving.answers.job import AnswerJob, Decided, Failed, Finished, Kept, NewText, NextAnswer
from trio_edge.serving.answers.structured import Constraints
from trio_edge.serving.requests.errors import RequestError, request_error_from

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

    from numpy.typing import NDArray

    from trio_edge.runtime.answer import Generation
    from trio_edge.runtime.bundle.manifest import Manifest
    from trio_edge.runtime.bundle.schedule import Stage
    from trio_edge.runtime.decisions.questions import Decision
    from trio_edge.runtime.images.processing import ImageLayout
    from trio_edge.runtime.pipeline import Pipeline
    from trio_edge.runtime.prompts.chat import Message
    from trio_edge.serving.metrics import Metrics
    from trio_edge.serving.requests.decisions import Asking
    from trio_edge.serving.requests.protocol import ChatRequest
    from trio_edge.serving.settings import ServerSettings

_logger = logging.getLogger("trio_serve")
_MAX_FAILURES = 3  # in a row; after these the worker is not ready
_LEAST_LOGPROB = -9999.0  # OpenAI's; JSON has no infinity


@final
class Worker(ModelWorker):
    """Answers requests with one bundle."""

    def __init__(
        self, name: str, load: Callable[[], Pipeline], *, settings: ServerSettings, metrics: Metrics
    ) -> None:
        """Prepare the thread. ``start`` calls ``load`` in it, which returns an open pipeline."""
        self.name = name
        self.loaded: Future[Pipeline] = Future()
        """The pipeline, or the exception that loading raised."""
        self._load, self._settings, self._metrics = load, settings, metrics
        self._waiting: deque[AnswerJob] = deque()
        self._running: dict[AnswerJob, float] = {}
        """The time at which each one has left the queue, oldest first."""
        self._batch = 1
        """Most jobs that run at once."""
        self._service_s = 0.0
        self._num_failures = 0
        self._is_stopping = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=f"trio-serve {name}", daemon=True)

    def start(self) -> None:
        """Start the thread, which loads the bundle and answers requests."""
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        """Whether the bundle is loaded, the server runs on, and the backend did not fail at all of the last answers."""
        return self.has_loaded and not self._is_stopping and self._num_failures < _MAX_FAILURES

    def submit(self, job: AnswerJob) -> None:
        """Put a job into the queue.

        Raises:
            RequestError: If the queue is full, the expected wait is too long, or the server stops.
        """
        with self._changed:
            if self._is_stopping:
                raise stopping()
            remaining_s, num_waiting = self._remaining_s(), len(self._waiting)
            wait_s = remaining_s + self._service_s * num_waiting / self._batch
            is_full = num_waiting >= self._settings.max_queue
            if is_full or wait_s > self._settings.max_wait_s:
                retry_after_s = remaining_s if is_full else wait_s - self._settings.max_wait_s
                raise queue_full(self.name, num_waiting, wait_s, retry_after_s=retry_after_s)
            self._waiting.append(job)
            self._report_load()
            self._changed.notify()

    def cancel(self, job: AnswerJob) -> None:
        """End a job: a waiting one leaves the queue at once, a running one ends at its next token."""
        job.cancel()
        with self._changed:
            if job not in self._waiting:
                return
            self._waiting.remove(job)
            self._report_load()
        job.prompt.close()
        job.emit(None)

    def cut(self) -> None:
        """End all jobs with an error, as the shutdown time is over."""
        with self._changed:
            waiting, running = list(self._waiting), list(self._running)
            self._waiting.clear()
            self._is_stopping = True
            self._changed.notify()
        for job in waiting:
            job.prompt.close()
        for job in [*waiting, *running]:
            job.emit(Failed(cut_short()))
            job.cancel()

    def stop(self, *, timeout_s: float) -> None:
        """End all jobs and release the pipeline."""
        self.cut()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def _remaining_s(self) -> float:
        """Return the seconds until a running answer ends, by the mean of earlier answers; 0 if another one may start."""
        if len(self._running) < self._batch:
            return 0.0
        return max(0.0, self._service_s - (time.perf_counter() - min(self._running.values())))

    def _report_load(self) -> None:
        self._metrics.set_load(self.name, waiting=len(self._waiting), running=len(self._running))

    def _run(self) -> None:
        try:
            pipeline = self._load()
        except BaseException as error:  # the server's start raises it
            self.loaded.set_exception(error)
            return
        with pipeline:
            constraints = Constraints(pipeline)
            self._batch = pipeline.manifest.batch
            self.loaded.set_result(pipeline)
            answers: list[Iterator[None]] = []
            while self._wait():
                answers += [self._serve(pipeline, constraints, job) for job in self._take()]
                answers = [answer for answer in answers if next(answer, self) is None]

    def _wait(self) -> bool:
        """Wait for a job; return False when the server stops."""
        with self._changed:
            self._changed.wait_for(lambda: self._running or self._waiting or self._is_stopping)
            return bool(self._running or self._waiting)

    def _take(self) -> list[AnswerJob]:
        """Move the first jobs from the queue to the running ones, as long as they fit, and return them."""
        taken = []
        with self._changed:
            while self._waiting:
                job = self._waiting[0]
                self.lower_if_busy(job, num_waiting=len(self._waiting) - 1)
                if self._running and not self._fits(job):
                    break
                self._running[self._waiting.popleft()] = time.perf_counter()
                taken.append(job)
            self._report_load()
        return taken

    def _fits(self, job: AnswerJob) -> bool:
        """Return whether a job can run together with the running ones: chats at one level."""
        if len(self._running) >= self._batch:
            return False
        together = [job, *self._running]
        levels = {one.chat.trio.level or self.manifest.level for one in together}
        return len(levels) == 1 and AUTO not in levels and all(one.asking is None for one in together)

    def _serve(self, pipeline: Pipeline, constraints: Constraints, job: AnswerJob) -> Iterator[None]:
        """Answer a job, piece by piece. Only this function holds it, so that no images stay in memory after it."""
        try:
            if not job.is_cancelled:
                yield from self._answer(pipeline, constraints, job)
                self._num_failures = 0
        except Exception as error:
            job.emit(Failed(self._client_error(error, job)))
        finally:
            job.generation = None  # it holds images
            job.prompt.close()
            with self._changed:
                del self._running[job]
                self._report_load()
            job.emit(None)

    def _client_error(self, error: Exception, job: AnswerJob) -> RequestError:
        failure = request_error_from(error)
        failure.message = job.prompt.without_paths(failure.message)
        if failure.status >= 500:
            is_ours = isinstance(error, BackendError)  # its message says enough without a traceback
            _logger.error("model %s: %s", self.name, error, exc_info=None if is_ours else error)
            self._num_failures += is_ours
        return failure

    def _answer(self, pipeline: Pipeline, constraints: Constraints, job: AnswerJob) -> Iterator[None]:
        if job.asking is None:
            reason, usage = yield from self._chat(pipeline, constraints, job)
        else:
            reason, usage = "stop", self._decide(pipeline, job, job.asking)
        self._metrics.count_answer(self.name, usage, is_cancelled=job.is_cancelled)
        with self._changed:
            self._service_s = smoothed(self._service_s, time.perf_counter() - self._running[job])
        job.emit(Finished(reason, usage))

    def _chat(
        self, pipeline: Pipeline, constraints: Constraints, job: AnswerJob
    ) -> Generator[None, None, tuple[str, dict[str, Any]]]:
        """Emit the answers of a chat but the end; return why the last one ended, and the usage."""
        reason, done = "", list[Statistics]()
        for number in range(job.chat.n or 1):
            if number:
                job.emit(NextAnswer(reason))
            settings = answer_settings(job.chat, pipeline.manifest, number=number)
            constraint = constraints.make(job.chat)
            answer = pipeline.chat(job.prompt.messages, constraint=constraint, **settings)
            job.generation = answer
            if job.is_cancelled:  # before the job knew its generation
                answer.cancel()
            needs_report = job.chat.trio.kept and not number
            reason = yield from self._stream(pipeline, answer, job, needs_report=needs_report)
            done.append(answer.statistics)
            if job.is_cancelled:
                break
        usage = usage_of(done, queue_s=self._running[job] - job.submitted)
        return reason, usage | level_fields(done[0], pipeline.manifest)

    def _decide(self, pipeline: Pipeline, job: AnswerJob, asking: Asking) -> dict[str, Any]:
        """Emit the answers to questions until the job is cancelled; return the usage."""
        done, manifest, level = list[Statistics](), pipeline.manifest, job.chat.trio.level
        for index, decision in decisions_of(pipeline, job.prompt.messages, asking, level=level):
            done.append(decision.statistics)
            diagnostics = {
                "label_mass": decision.label_mass,
                "visual_tokens": done[-1].visual_tokens,
                "kept_tokens": list(done[-1].kept_tokens),
                **level_fields(done[-1], manifest),
            }
            if asking.options.kept:
                diagnostics["kept"] = kept_report(
                    decision, manifest.at_level(decision.statistics.level).schedule.stages
                )
            job.emit(Decided(index, list(decision.probabilities), decision.score, diagnostics))
            if job.is_cancelled:
                break
        usage = decision_usage(done, queue_s=self._running[job] - job.submitted)
        levels = {"levels": Counter(answer.level for answer in done)} if manifest.levels else {}
        return usage | level_fields(done[0], manifest) | levels

    def _stream(
        self, pipeline: Pipeline, answer: Generation, job: AnswerJob, *, needs_report: bool
    ) -> Generator[None, None, str]:
        """Emit an answer's events but its end; return why it ended."""
        stops, num_scored = StopTexts(job.chat.stops), 0

        def emit(text: str) -> None:
            nonlocal num_scored
            scores = logprobs_of(answer, pipeline, first=num_scored) if job.chat.logprobs else []
            num_scored += len(scores)
            if text or scores:
                job.emit(NewText(text, scores))

        for piece in chain(answer, [""]):  # the empty piece: an answer without text has a report, too
            if needs_report:
                manifest = pipeline.manifest.at_level(answer.statistics.level)
                job.emit(Kept(kept_report(answer, manifest.schedule.stages)))
                needs_report = False
            emit(stops.push(piece))
            if stops.is_found:
                answer.cancel()
                break
            yield
        emit(stops.finish())
        has_ended = stops.is_found or answer.token_ids[-1] in pipeline.manifest.text.stop_token_ids
        return "stop" if has_ended else "length"


def answer_settings(chat: ChatRequest, manifest: Manifest, *, number: int = 0) -> dict[str, Any]:
    """Return the keyword arguments of ``Pipeline.chat`` that a request asks for, for one of its answers.

    Raises:
        RequestError: If the limit on new tokens exceeds the bundle's.
    """
    room, limit = manifest.max_new_tokens, chat.limit
    if limit is not None and limit > room:
        param = "max_tokens" if chat.max_completion_tokens is None else "max_completion_tokens"
        expected = f"{param}: expected at most {room}, the bundle's limit, got {limit}"
        message = f"{expected}; ask for fewer, or export with a larger --max-new-tokens"
        raise RequestError(400, message, code="context_length_exceeded", param=param)
    return {
        "level": chat.trio.level,
        "max_new_tokens": limit,
        "temperature": chat.temperature,
        "top_p": chat.top_p,
        "top_k": chat.top_k,
        "repetition_penalty": chat.repetition_penalty,
        "presence_penalty": chat.presence_penalty,
        "frequency_penalty": chat.frequency_penalty,
        "logit_bias": chat.logit_bias,
        # Each answer has a seed of its own. Clients send negative ones, too.
        "seed": None if chat.seed is None else (chat.seed + number) % (1 << 64),
        "num_logprobs": chat.top_logprobs or 0 if chat.logprobs else None,
        "min_new_tokens": (room if limit is None else limit) if chat.ignore_eos else chat.min_tokens,
    }


def logprobs_of(answer: Generation, pipeline: Pipeline, *, first: int) -> list[dict[str, Any]]:
    """Return OpenAI's entries for the tokens from the ``first`` one on, without a stop token."""
    decode, ids = pipeline.tokenizer.decode, answer.token_ids

    def scored(place: int, token: int, logprob: float) -> dict[str, Any]:
        before = ids[max(0, place - 1) : place]  # a tokenizer may drop the blank before the first token
        text = decode([*before, token]).removeprefix(decode(before))
        return {"token": text, "bytes": list(text.encode()), "logprob": max(logprob, _LEAST_LOGPROB)}

    return [
        {
            **scored(place, ids[place], found.chosen),
            "top_logprobs": [scored(place, *other) for other in zip(found.top_ids, found.top)],
        }
        for place, found in enumerate(answer.logprobs[first:], first)
        if ids[place] not in pipeline.manifest.text.stop_token_ids
    ]


def usage_of(answers: Sequence[Statistics], *, queue_s: float) -> dict[str, Any]:
    """Return OpenAI's ``usage`` of the answers to one request, with our own fields.

    The prompt is counted once and before token reduction. The time of further answers counts as decoding.
    """
    first, *others = answers
    prompt, new = first.text_tokens + first.visual_tokens, sum(answer.new_tokens for answer in answers)
    decode_ms = first.decode_ms + sum(answer.ttft_ms + answer.decode_ms for answer in others)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "decode_steps": sum(answer.steps for answer in answers),
        "total_tokens": prompt + new,
        "visual_tokens": first.visual_tokens,
        "kept_tokens": list(first.kept_tokens),
        "queue_ms": round(1e3 * queue_s, 3),
        "ttft_ms": round(first.ttft_ms, 3),
        "decode_ms": round(decode_ms, 3),
    }


def decision_usage(answers: Sequence[Statistics], *, queue_s: float) -> dict[str, Any]:
    """Return ``usage_of`` for answers to several questions: each counts its whole prompt, and one token for its answer."""
    prompt, new = sum(answer.text_tokens + answer.visual_tokens for answer in answers), len(answers)
    return {
        **usage_of(answers, queue_s=queue_s),
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "cached_tokens": sum(answer.cached_tokens for answer in answers),
        "questions": new,
    }


def level_fields(statistics: Statistics, manifest: Manifest) -> dict[str, Any]:
    """Return the level of an answer and those that ran below it; nothing for a bundle with one level."""
    below = {"levels_below": list(statistics.levels_below)} if statistics.levels_below else {}
    return {"level": statistics.level, **below} if manifest.levels else {}


def decisions_of(
    pipeline: Pipeline, messages: Sequence[Message], asking: Asking, *, level: str | None
) -> Iterator[tuple[int, Decision]]:
    """Yield the place of each question and its answer at ``level``; questions with images of their own come last.

    The last messages are the questions' own, one for each, with these images.
    """
    first = len(messages) - len(asking.questions)
    shared = list(messages[:first])
    own = [[part for part in message["content"] if part["type"] == "image"] for message in messages[first:]]
    if not shared or shared[-1]["role"] != "user":
        shared.append({"role": "user", "content": []})
    together = [index for index, images in enumerate(own) if not images]
    for group in [together, *([index] for index, images in enumerate(own) if images)]:
        if group:
            last = {**shared[-1], "content": [*shared[-1]["content"], *own[group[0]]]}
            questions = [asking.questions[index] for index in group]
            how: dict[str, Any] = {
                "sharing": asking.options.sharing,
                "both_orders": asking.options.both_orders,
                "level": level,
            }
            yield from zip(group, pipeline.iter_decisions([*shared[:-1], last], questions, **how))


@final
class StopTexts:
    """Cuts a stream of text before the first stop text, and holds back what may begin one."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts, self._held = tuple(texts), ""
        self.is_found = False

    def push(self, piece: str) -> str:
        """Add a piece; return the text that is certain to come before any stop text."""
        text = self._held + piece
        found = [at for at in (text.find(stop) for stop in self._texts) if at >= 0]
        if found:
            self.is_found, self._held = True, ""
            return text[: min(found)]
        num_held = max((_overlap(text, stop) for stop in self._texts), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def finish(self) -> str:
        """Return the text that was held back."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of ``text`` begin ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((count for count in range(longest, 0, -1) if text.endswith(stop[:count])), 0)


def kept_report(answer: Generation | Decision, stages: Sequence[Stage]) -> dict[str, Any]:
    """Return the kept boxes of each image and stage in pixels, for the page, and the milliseconds of each graph.

    The answer must have its first token.
    """
    images, first = [], 0
    for layout in answer.layouts:
        after = first + len(layout.boxes)
        own = [indices[(indices >= first) & (indices < after)] - first for indices in answer.kept]
        entered = {"layer": 0, **_boxes(layout, np.arange(len(layout.boxes)))}
        kept = [{"layer": stage.layer, **_boxes(layout, chosen)} for stage, chosen in zip(stages, own)]
        images.append({"width": layout.width, "height": layout.height, "stages": [entered, *kept]})
        first = after
    graph_ms = {name: round(ms, 3) for name, ms in answer.statistics.graph_ms.items()}
    return {"images": images, "graph_ms": graph_ms}


def _boxes(layout: ImageLayout, chosen: NDArray[np.integer]) -> dict[str, Any]:
    is_overview = np.isin(chosen, layout.overview)
    return {
        "kept": len(chosen),
        "boxes": _drawable(layout.boxes[chosen[~is_overview]]),
        "overview_boxes": _drawable(layout.boxes[chosen[is_overview]]),
    }


def _drawable(boxes: NDArray[np.float32]) -> list[list[float]]:
    """Return the boxes that have an area: newline tokens have none."""
    with_area = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    return [[round(edge, 1) for edge in box] for box in boxes[with_area].tolist()]
