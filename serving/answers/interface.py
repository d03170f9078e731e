"""The interface of a worker, which answers for one model: a thread of this process, or a fleet of replicas."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from trio_edge.runtime.bundle.manifest import AUTO
from trio_edge.serving.requests.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from concurrent.futures import Future

    from trio_edge.runtime.bundle.manifest import Manifest
    from trio_edge.serving.answers.job import AnswerJob
    from trio_edge.serving.metrics import Metrics
    from trio_edge.serving.settings import ServerSettings

_MEMORY = 0.8  # weight of the old mean service time: the last five answers count for two thirds


class ModelWorker(Protocol):
    """Answers requests for one model."""

    name: str
    """The model's name in requests."""
    _settings: ServerSettings
    _metrics: Metrics
    loaded: Future[Any]
    """Done when the model is loaded; holds the pipeline or a replica's description, or the exception if loading failed."""

    @property
    def is_ready(self) -> bool:
        """Whether the worker can answer now."""

    @property
    def has_loaded(self) -> bool:
        """Whether loading has ended without an exception."""
        return self.loaded.done() and self.loaded.exception() is None

    def _loaded(self) -> Any:
        if not self.has_loaded:
            message = f"model {self.name}: still loading; try again later"
            raise RequestError(503, message, code="loading", retry_after_s=5.0)
        return self.loaded.result()

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest; raises ``RequestError`` if the model is not loaded."""
        manifest: Manifest = self._loaded().manifest
        return manifest

    @property
    def backend_name(self) -> str:
        """The backend that runs the graphs; raises ``RequestError`` if the model is not loaded."""
        return str(self._loaded().backend_name)

    @property
    def auto_levels(self) -> tuple[str, ...]:
        """The levels that "auto" may run, from the lowest; raises ``RequestError`` if the model is not loaded."""
        levels: tuple[str, ...] = self._loaded().auto_levels
        return levels

    def lower_if_busy(self, job: AnswerJob, *, num_waiting: int) -> None:
        """Give a job with the level "auto" the lowest one if ``num_waiting`` others are too many."""
        busy, trio = self._settings.busy_queue, job.chat.trio
        if busy is None or num_waiting < busy or trio.level != AUTO or not self.manifest.levels:
            return
        lowest = msgspec.structs.replace(trio, level=self.auto_levels[0])
        job.chat = msgspec.structs.replace(job.chat, trio=lowest)
        self._metrics.count_lowered(self.name)

    def start(self) -> None:
        """Load the model and begin to answer. Called on the event loop."""

    def submit(self, job: AnswerJob) -> None:
        """Put a job into the queue.

        Raises:
            RequestError: If the queue is full, the expected wait is too long, or the server stops.
        """

    def cancel(self, job: AnswerJob) -> None:
        """End a job soon. A finished job stays as it is."""

    def cut(self) -> None:
        """End all jobs with an error, as the shutdown time is over. Called on the event loop."""

    def stop(self, *, timeout_s: float) -> None:
        """End all jobs and release the model. Called in a thread."""


def named_levels(workers: Mapping[str, ModelWorker]) -> dict[str, tuple[ModelWorker, str | None]]:
    """Return the worker and the level of each ``model`` of requests: NAME, and NAME@LEVEL of a bundle with several levels."""
    found: dict[str, tuple[ModelWorker, str | None]] = {name: (one, None) for name, one in workers.items()}
    for name, worker in workers.items():
        if worker.has_loaded and worker.manifest.levels:
            for level in (AUTO, *worker.manifest.level_names):
                found.setdefault(f"{name}@{level}", (worker, level))
    return found


def smoothed(mean_s: float, seconds: float) -> float:
    """Return the running mean of the service time after an answer of ``seconds``; 0.0 means no answer yet."""
    return seconds if mean_s == 0.0 else _MEMORY * mean_s + (1 - _MEMORY) * seconds


def stopping() -> RequestError:
    """Return the error for a request that comes after the server began to stop."""
    return RequestError(503, "server: stopping; try again later", code="stopping", retry_after_s=5.0)


def cut_short() -> RequestError:
    """Return the error for an answer that the server's stop cuts off."""
    return RequestError(503, "server: stopped before the answer's end", code="stopping")


def queue_full(model: str, num_waiting: int, wait_s: float, *, retry_after_s: float) -> RequestError:
    """Return the error for a request that would wait too long."""
    message = f"model {model}: {num_waiting} requests wait, about {wait_s:.1f} s; try again later"
    return RequestError(429, message, code="queue_full", retry_after_s=retry_after_s)
