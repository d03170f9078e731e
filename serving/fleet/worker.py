"""The server's side of a fleet: passes requests to Ray Serve, which queues them for a free replica."""

from __future__ import annotations

import asyncio
import re
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, final

from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from starlette.concurrency import run_in_threadpool

from trio_edge.runtime.bundle.checks import manifest_from_json
from trio_edge.runtime.bundle.errors import BackendError
from trio_edge.runtime.bundle.manifest import Manifest
from trio_edge.serving.answers.interface import ModelWorker, cut_short, queue_full, smoothed, stopping
from trio_edge.serving.answers.job import AnswerJob, Event, Failed, Finished
from trio_edge.serving.fleet.replica import STARTED
from trio_edge.serving.fleet.wire import packed_request, unpacked_events
from trio_edge.serving.requests.errors import RequestError

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle
    from ray.serve.schema import DeploymentStatusOverview

    from trio_edge.serving.metrics import Metrics
    from trio_edge.serving.settings import ServerSettings

_WATCH_S = 2.0  # between two looks at the number of replicas


class Description(NamedTuple):
    """Manifest and backend of a replica's pipeline."""

    backend_name: str
    manifest: Manifest
    auto_levels: tuple[str, ...]


@final
class FleetWorker(ModelWorker):
    """Answers requests with the replicas of one model. Only ``loaded`` and ``stop`` are thread-safe."""

    def __init__(
        self, name: str, replicas: DeploymentHandle, *, settings: ServerSettings, metrics: Metrics
    ) -> None:
        """Prepare the worker for the replicas of the model ``name``."""
        self.name = name
        self.loaded: Future[Description] = Future()
        """A replica's description, or the exception if no replica could start."""
        self._replicas = replicas
        self._settings, self._metrics = settings, metrics
        self._answering: dict[AnswerJob, asyncio.Task[None]] = {}
        self._started: dict[AnswerJob, float] = {}
        self._num_replicas = 0
        self._service_s = 0.0
        self._is_stopping = False

    def start(self) -> None:
        """Wait for the first replica, then watch the number of replicas."""
        self._loop = asyncio.get_running_loop()
        self._watching = self._loop.create_task(self._watch())

    @property
    def is_ready(self) -> bool:
        """Whether a replica runs and the server does not stop."""
        return self.has_loaded and not self._is_stopping and self._num_replicas > 0

    def submit(self, job: AnswerJob) -> None:
        """Pass a job to Ray Serve. If its queue is full, the job's event is an error.

        Raises:
            RequestError: If the expected wait is too long, or the server stops.
        """
        if self._is_stopping:
            raise stopping()
        wait_s = self._expected_wait_s()
        if wait_s > self._settings.max_wait_s:
            raise self._too_long(retry_after_s=wait_s - self._settings.max_wait_s)
        self._answering[job] = task = self._loop.create_task(self._answer(job))
        task.add_done_callback(partial(self._ended, job))
        self._report_load()

    def cancel(self, job: AnswerJob) -> None:
        """End a job: Ray Serve removes it from its queue, or ends it at the replica's next token."""
        task = self._answering.get(job)
        if task is not None and not job.has_ended:
            task.cancel()

    def cut(self) -> None:
        """End all jobs with an error, as the shutdown time is over."""
        self._is_stopping = True
        self._watching.cancel()
        for job in list(self._answering):
            self.cancel(job)
            job.emit(Failed(cut_short()))

    def stop(self, *, timeout_s: float) -> None:
        """End all jobs. A loop that is busy longer than ``timeout_s`` ends them later."""
        with suppress(FutureTimeout):  # other workers must be stopped, too
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(timeout_s)

    async def _end(self) -> None:
        self.cut()
        await asyncio.gather(*self._answering.values(), return_exceptions=True)

    async def _watch(self) -> None:
        try:
            self.loaded.set_result(await self._first_description())
        except (BackendError, RayError, RayServeException) as error:
            self.loaded.set_exception(BackendError(f"model {self.name}: no replica could start: {error}"))
            return
        while True:
            await asyncio.sleep(_WATCH_S)
            await self._count_replicas()

    def _status(self) -> DeploymentStatusOverview:
        """Return Ray Serve's status of the replicas. Called in a thread."""
        app = serve.status().applications[self._replicas.app_name]
        return app.deployments[self._replicas.deployment_name]

    async def _first_description(self) -> Description:
        """Return the description of the first replica."""
        asking: asyncio.Future[tuple[str, bytes, tuple[str, ...]]] = asyncio.ensure_future(
            self._replicas.describe.remote()
        )
        # A handle waits for ever for replicas whose deployment has failed (Ray 2.60).
        while not (await asyncio.wait({asking}, timeout=_WATCH_S))[0]:
            status = await run_in_threadpool(self._status)
            if status.status == "DEPLOY_FAILED":
                asking.cancel()
                raise BackendError(_last_error(str(status.message)))
        backend_name, manifest, levels = asking.result()
        await self._count_replicas()
        return Description(backend_name, manifest_from_json(manifest, where=self.name), levels)

    async def _count_replicas(self) -> None:
        try:
            states = (await run_in_threadpool(self._status)).replica_states
        except (RayError, RayServeException, KeyError):
            # Ray does not answer, or has no such deployment for now: the next look may find the replicas again.
            states = {}
        self._num_replicas = states.get("RUNNING", 0)
        self._metrics.set_replicas(self.name, self._num_replicas)

    async def _answer(self, job: AnswerJob) -> None:
        try:
            await self._relay(job)
        except BackPressureError:
            self._answering.pop(job)  # it does not wait
            job.emit(Failed(self._too_long(retry_after_s=self._service_s / max(self._num_replicas, 1))))
        except (RayError, RayServeException) as error:
            job.emit(Failed(self._client_error(error)))

    async def _relay(self, job: AnswerJob) -> None:
        self.lower_if_busy(job, num_waiting=self._num_waiting - 1)
        request = await run_in_threadpool(packed_request, job)
        answer = self._replicas.options(stream=True).answer.remote(request)
        try:
            async for data in answer:
                if data == STARTED:
                    self._started[job] = time.perf_counter()
                    self._report_load()
                else:
                    for event in unpacked_events(data):
                        self._count(event, job)
                        job.emit(event)
        except asyncio.CancelledError:
            answer.cancel()
            raise

    def _count(self, event: Event, job: AnswerJob) -> None:
        """Count a finished answer, and write into its usage the wait in Ray Serve's queue."""
        if isinstance(event, Finished):
            start = self._started[job]
            event.usage["queue_ms"] = round(1e3 * (start - job.submitted), 3)
            self._metrics.count_answer(self.name, event.usage, is_cancelled=False)
            self._service_s = smoothed(self._service_s, time.perf_counter() - start)

    def _ended(self, job: AnswerJob, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            queue_ms = 1e3 * (self._started.get(job, time.perf_counter()) - job.submitted)
            usage = {"queue_ms": queue_ms, "completion_tokens": 0}
            self._metrics.count_answer(self.name, usage, is_cancelled=True)
        self._answering.pop(job, None)
        self._started.pop(job, None)
        job.prompt.close()
        self._report_load()
        job.emit(None)
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error  # our own bug: the event loop logs its traceback

    def _client_error(self, error: Exception) -> RequestError:
        if isinstance(error, RayActorError):
            message = f"model {self.name}: the replica ended before the answer's end; ask again"
            return RequestError(503, message, code="replica_died", retry_after_s=1.0)
        return RequestError(500, f"model {self.name}: {type(error).__name__} in Ray Serve; its log has more")

    def _too_long(self, *, retry_after_s: float) -> RequestError:
        return queue_full(self.name, self._num_waiting, self._expected_wait_s(), retry_after_s=retry_after_s)

    @property
    def _num_waiting(self) -> int:
        return len(self._answering) - len(self._started)

    def _expected_wait_s(self) -> float:
        """Return the seconds until a new job would start: an answer ends every ``service_s / replicas``."""
        busy = max(self._num_replicas, 1)
        if len(self._answering) < busy:
            return 0.0
        return self._service_s * (len(self._answering) - busy + 1) / busy

    def _report_load(self) -> None:
        self._metrics.set_load(self.name, waiting=self._num_waiting, running=len(self._started))


def _last_error(traceback: str) -> str:
    """Return the last error message in Ray Serve's traceback of a failed start."""
    found = re.findall(r"^\s*[\w.]*Error: (.+)$", traceback, re.MULTILINE)
    return found[-1] if found else " ".join(traceback.split())[-300:]
