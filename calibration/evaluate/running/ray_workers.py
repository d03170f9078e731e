"""Workers on the machines of a Ray cluster, each an actor with the bundle opened once. The only file that imports ray.

Images travel with the questions; the bundle must lie at the same path on every machine, where trio-edge is installed.
"""

from __future__ import annotations

import socket
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trio_edge.calibration.evaluate.running.answering import Answerer, Asking, Failure, Outcome, Task
from trio_edge.runtime.bundle.errors import BackendError, TrioEdgeError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_TASKS_PER_ACTOR = 2  # the next question travels while one is answered
_CONNECT_SECONDS = 10


def check_ray() -> None:
    """Raise BackendError unless ray is installed."""
    if find_spec("ray") is None:
        raise BackendError(
            '--ray: expected ray to be installed, it is not; run pip install "trio-edge[ray]" on every machine'
        )


def answer_on_cluster(
    asking: Asking, tasks: Iterable[Task], *, workers: int, address: str
) -> Iterator[Outcome | Failure]:
    """Answer with ``workers`` actors, spread over the cluster's machines, in any order.

    Args:
        asking: How the bundle is asked; ``threads`` CPUs are reserved for each actor.
        tasks: The questions.
        workers: Actors.
        address: "auto", HOST:PORT or ray://HOST:PORT of a running cluster.

    Raises:
        BackendError: If there is no cluster, or a machine of it fails.
    """
    check_ray()
    import ray

    _check_reachable(address)
    try:
        ray.init(address=address, ignore_reinit_error=True, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise BackendError(
            f"--ray {address}: expected a running Ray cluster ({str(error).splitlines()[0]}); start one with ray start"
        ) from None
    try:
        yield from _answers(ray, asking, tasks, workers=workers)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, TrioEdgeError):
            raise cause from None
        raise BackendError(
            f"--ray {address}: a worker failed ({str(error).strip().splitlines()[-1][:200]});"
            " check that each machine has trio-edge, the bundle's path and the memory for it"
        ) from None
    finally:
        ray.shutdown()


def _answers(ray: Any, asking: Asking, tasks: Iterable[Task], *, workers: int) -> Iterator[Outcome | Failure]:
    # spread: actors on one machine would share its processor while others idle
    actor = ray.remote(num_cpus=max(asking.settings.threads, 1), scheduling_strategy="SPREAD")(Answerer)
    pool = [actor.remote(replace(asking, bundle=asking.bundle.absolute())) for _ in range(workers)]
    waiting = iter(tasks)
    owner: dict[Any, Any] = {}

    def give(worker: Any) -> None:
        task = next(waiting, None)
        if task is not None:
            owner[worker.answer.remote(_portable(task))] = worker

    for worker in pool * _TASKS_PER_ACTOR:
        give(worker)
    while owner:
        done, _ = ray.wait(list(owner))
        for reference in done:
            give(owner.pop(reference))
            yield ray.get(reference)


def _check_reachable(address: str) -> None:
    """Raise BackendError at once where ray itself would go on trying for a minute."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:
        return
    try:
        with socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS):
            pass
    except (OSError, ValueError, OverflowError) as error:
        raise BackendError(
            f"--ray {address}: expected a running Ray cluster, got no answer ({error}); start one with ray start"
        ) from None


def _portable(task: Task) -> Task:
    """Return the task with the image's bytes in place of its path."""
    image = task.question.image
    if not isinstance(image, Path):
        return task
    return replace(task, question=replace(task.question, image=image.read_bytes()))
