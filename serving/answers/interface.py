"""The interface of what answers for one model: a thread of this process, or a fleet of replicas."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from trio_edge.serving.requests.errors import RequestError

if TYPE_CHECKING:
    from concurrent.futures import Future

    from trio_edge.runtime.bundle.manifest import Manifest
    from trio_edge.serving.answers.job import AnswerJob

_MEMORY = 0.8  # of the mean service time: the last five answers count for two thirds


class ModelWorker(Protocol):
    """Answers requests for one model."""

    @property
    def name(self) -> str:
        """The model's name, for clients."""

    @property
    def loaded(self) -> Future[Any]:
        """Done when it can answer, or holds why it cannot."""

    @property
    def is_ready(self) -> bool:
        """Whether it can answer now."""

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest.

        Raises:
            RequestError: If it is not loaded.
        """

    @property
    def backend_name(self) -> str:
        """The backend that runs the graphs.

        Raises:
            RequestError: If it is not loaded.
        """

    def start(self) -> None:
        """Load, and answer requests from then on. Called on the event loop."""

    def submit(self, job: AnswerJob) -> None:
        """Let a job wait for its turn.

        Raises:
            RequestError: If too many wait, or for too long, or the server stops.
        """

    def cancel(self, job: AnswerJob) -> None:
        """End a job soon; one that has ended is left alone."""

    def cut(self) -> None:
        """End all jobs, as the server's time is over. Called on the event loop."""

    def stop(self, *, timeout_s: float) -> None:
        """End all jobs and release what was loaded. Called in a thread."""


def smoothed(mean_s: float, seconds: float) -> float:
    """Return the mean service time after an answer that took ``seconds``; 0 is no mean yet."""
    return seconds if mean_s == 0.0 else _MEMORY * mean_s + (1 - _MEMORY) * seconds


def still_loading(model: str) -> RequestError:
    """Return the error of a request that came too early."""
    return RequestError(
        503, f"model {model}: still loading; try again later", code="loading", retry_after_s=5.0
    )


def stopping() -> RequestError:
    """Return the error of a request that came too late."""
    return RequestError(503, "server: stops; ask another one", code="stopping", retry_after_s=5.0)


def cut_short() -> RequestError:
    """Return the error of an answer that the server's end cut."""
    return RequestError(503, "server: stopped before the answer's end", code="stopping")


def queue_full(model: str, num_waiting: int, wait_s: float, *, retry_after_s: float) -> RequestError:
    """Return the error of a request that would wait too long."""
    return RequestError(
        429,
        f"model {model}: {num_waiting} requests wait, about {wait_s:.1f} s; try again later",
        code="queue_full",
        retry_after_s=retry_after_s,
    )
