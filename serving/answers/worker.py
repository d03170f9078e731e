"""One thread per bundle, which loads the pipeline, answers one request at a time and closes the pipeline.

Requests wait in a queue with a limited length and a limited expected wait, estimated from the times of earlier answers.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, final

from trio_edge.runtime.bundle.errors import BackendError
from trio_edge.serving.answers.interface import cut_short, queue_full, smoothed, still_loading, stopping
from trio_edge.serving.answers.job import AnswerJob, Failed, Finished, Kept, NewText
from trio_edge.serving.answers.kept import kept_report
from trio_edge.serving.answers.stops import StopTexts
from trio_edge.serving.answers.structured import Constraints
from trio_edge.serving.requests.errors import RequestError, field_error, request_error_from

if TYPE_CHECKING:
    from collections.abc import Callable

    from trio_edge.runtime.answer import Generation, Statistics
    from trio_edge.runtime.bundle.manifest import Manifest
    from trio_edge.runtime.pipeline import Pipeline
    from trio_edge.serving.metrics import Metrics
    from trio_edge.serving.requests.protocol import ChatRequest
    from trio_edge.serving.settings import ServerSettings

_logger = logging.getLogger("trio_serve")
_MOST_FAILURES = 3  # in a row, after which the backend counts as broken


@final
class Worker:
    """Answers requests with one bundle."""

    def __init__(
        self, name: str, load: Callable[[], Pipeline], *, settings: ServerSettings, metrics: Metrics
    ) -> None:
        """Prepare the worker for the model ``name``; ``start`` calls ``load`` in the worker's thread."""
        self.name = name
        self.loaded: Future[Pipeline] = Future()
        """The pipeline, or the error of loading it."""
        self._load, self._settings, self._metrics = load, settings, metrics
        self._waiting: deque[AnswerJob] = deque()
        self._running: AnswerJob | None = None
        self._running_since = 0.0
        self._service_s = 0.0
        self._num_failures = 0
        self._is_stopping = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=f"trio-serve {name}", daemon=True)

    def start(self) -> None:
        """Load the bundle and answer requests in the thread."""
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        """Whether the bundle is loaded, the server is not stopping, and the last answers did not all fail."""
        is_loaded = self.loaded.done() and self.loaded.exception() is None
        return is_loaded and not self._is_stopping and self._num_failures < _MOST_FAILURES

    @property
    def pipeline(self) -> Pipeline:
        """The loaded pipeline; raises RequestError if it is not loaded."""
        if not self.loaded.done() or self.loaded.exception() is not None:
            raise still_loading(self.name)
        return self.loaded.result()

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest; raises RequestError if the bundle is not loaded."""
        return self.pipeline.manifest

    @property
    def backend_name(self) -> str:
        """The backend that runs the graphs; raises RequestError if the bundle is not loaded."""
        return self.pipeline.backend_name

    def submit(self, job: AnswerJob) -> None:
        """Put a job into the queue.

        Raises:
            RequestError: If the queue is full, the expected wait is too long, or the server stops.
        """
        with self._changed:
            if self._is_stopping:
                raise stopping()
            wait_s, is_full = self._left_s(), len(self._waiting) >= self._settings.max_queue
            wait_s += self._service_s * len(self._waiting)
            if is_full or wait_s > self._settings.max_wait_s:
                retry_after_s = self._left_s() if is_full else wait_s - self._settings.max_wait_s
                raise queue_full(self.name, len(self._waiting), wait_s, retry_after_s=retry_after_s)
            self._waiting.append(job)
            self._note_load()
            self._changed.notify()

    def cancel(self, job: AnswerJob) -> None:
        """End a running job at its next token, or remove a waiting job from the queue."""
        job.cancel()
        with self._changed:
            if job not in self._waiting:
                return
            self._waiting.remove(job)
            self._note_load()
        job.prompt.close()
        job.emit(None)

    def cut(self) -> None:
        """End all jobs, because the time for the shutdown is over."""
        with self._changed:
            waiting, running = list(self._waiting), self._running
            self._waiting.clear()
            self._is_stopping = True
            self._changed.notify()
        for job in waiting:
            job.prompt.close()
        for job in waiting if running is None else [*waiting, running]:
            job.emit(Failed(cut_short()))
            job.cancel()

    def stop(self, *, timeout_s: float) -> None:
        """End all jobs and release the pipeline."""
        self.cut()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def _left_s(self) -> float:
        """Return the expected rest of the running answer in seconds, from the mean of earlier answers."""
        if self._running is None:
            return 0.0
        return max(0.0, self._service_s - (time.perf_counter() - self._running_since))

    def _note_load(self) -> None:
        running = int(self._running is not None)
        self._metrics.set_load(self.name, waiting=len(self._waiting), running=running)

    def _run(self) -> None:
        try:
            pipeline = self._load()
        except BaseException as error:  # reported by the thread that waits for the bundle
            self.loaded.set_exception(error)
            return
        with pipeline:
            constraints = Constraints(pipeline)
            self.loaded.set_result(pipeline)
            while self._serve_next(pipeline, constraints):
                pass

    def _next(self) -> AnswerJob | None:
        """Return the next job, or None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_stopping)
            if not self._waiting:
                return None
            self._running, self._running_since = self._waiting.popleft(), time.perf_counter()
            self._note_load()
            return self._running

    def _serve_next(self, pipeline: Pipeline, constraints: Constraints) -> bool:
        """Answer one request; return False at the end. A separate call for each job, so that none keeps its images."""
        job = self._next()
        if job is None:
            return False
        self._serve(pipeline, constraints, job)
        return True

    def _serve(self, pipeline: Pipeline, constraints: Constraints, job: AnswerJob) -> None:
        start = time.perf_counter()
        try:
            if not job.is_cancelled:
                self._answer(pipeline, constraints, job, queue_s=start - job.submitted)
                self._num_failures = 0
        except Exception as error:
            job.emit(Failed(self._told(error, job)))
        finally:
            job.generation = None  # it holds images
            job.prompt.close()
            with self._changed:
                self._running = None
                self._note_load()
            job.emit(None)

    def _told(self, error: Exception, job: AnswerJob) -> RequestError:
        told = request_error_from(error)
        told.message = job.prompt.without_paths(told.message)
        if told.status >= 500:
            is_ours = isinstance(error, BackendError)
            _logger.error("model %s: %s", self.name, error, exc_info=None if is_ours else error)
            self._num_failures += 1
        return told

    def _answer(
        self, pipeline: Pipeline, constraints: Constraints, job: AnswerJob, *, queue_s: float
    ) -> None:
        start = time.perf_counter()
        constraint = constraints.make(job.chat)
        answer = pipeline.chat(
            job.prompt.messages, constraint=constraint, **answer_settings(job.chat, pipeline.manifest)
        )
        job.generation = answer
        if job.is_cancelled:
            answer.cancel()
        stops = StopTexts(job.chat.stops)
        self._stream(pipeline, answer, stops, job)
        usage = usage_of(answer.statistics, queue_s=queue_s)
        self._metrics.count_answer(self.name, usage, is_cancelled=job.is_cancelled)
        self._note_service(time.perf_counter() - start)
        has_ended = stops.is_found or answer.token_ids[-1] in pipeline.manifest.text.stop_token_ids
        job.emit(Finished("stop" if has_ended else "length", usage))

    def _stream(self, pipeline: Pipeline, answer: Generation, stops: StopTexts, job: AnswerJob) -> None:
        wants_kept = job.chat.trio.kept
        for piece in answer:
            if wants_kept:
                job.emit(Kept(kept_report(answer, pipeline.manifest.schedule.stages)))
                wants_kept = False
            if text := stops.push(piece):
                job.emit(NewText(text))
            if stops.is_found:
                answer.cancel()
                break
        if wants_kept:  # an answer without text
            job.emit(Kept(kept_report(answer, pipeline.manifest.schedule.stages)))
        if text := stops.finish():
            job.emit(NewText(text))

    def _note_service(self, seconds: float) -> None:
        with self._changed:
            self._service_s = smoothed(self._service_s, seconds)


def answer_settings(chat: ChatRequest, manifest: Manifest) -> dict[str, Any]:
    """Return the keyword arguments of ``Pipeline.chat`` for a request.

    Raises:
        RequestError: If the request allows a longer answer than the bundle.
    """
    room, limit = manifest.max_new_tokens, chat.limit
    if limit is not None and limit > room:
        raise field_error(
            f"max_tokens: expected at most {room} (the bundle's limit), got {limit}; ask for fewer, or export with a larger"
            " --max-new-tokens",
            param="max_tokens" if chat.max_completion_tokens is None else "max_completion_tokens",
            code="context_length_exceeded",
        )
    same = ("temperature", "top_p", "top_k", "seed", "repetition_penalty")
    return {
        "max_new_tokens": limit,
        "min_new_tokens": (room if limit is None else limit) if chat.ignore_eos else chat.min_tokens,
        **{name: getattr(chat, name) for name in same},
    }


def usage_of(statistics: Statistics, *, queue_s: float) -> dict[str, Any]:
    """Return OpenAI's ``usage`` of an answer, with prompt tokens before reduction, and our own fields."""
    prompt = statistics.text_tokens + statistics.visual_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": statistics.new_tokens,
        "total_tokens": prompt + statistics.new_tokens,
        "visual_tokens": statistics.visual_tokens,
        "kept_tokens": list(statistics.kept_tokens),
        "queue_ms": round(1e3 * queue_s, 3),
        "ttft_ms": round(statistics.ttft_ms, 3),
        "decode_ms": round(statistics.decode_ms, 3),
    }
