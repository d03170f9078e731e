"""Several processes on this machine answer questions, each with the bundle opened once.

An answer does not depend on which process gave it, nor on how many there are: each has its own pipeline with the
same number of threads.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from multiprocessing import connection
from typing import TYPE_CHECKING

from trio_edge.calibration.evaluate.answering import Answerer, Asking, Failure, Outcome
from trio_edge.runtime.bundle.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from trio_edge.calibration.questions import Question
    from trio_edge.runtime.model.sampling import FirstToken

    Task = tuple[Question, FirstToken | None]
    """A question, with keep-all's first token where there is one."""

_TASKS_PER_WORKER = 4  # in flight: enough that no worker waits, few enough that images do not pile up
_answerer: Answerer | None = None
_asking: Asking | None = None


def answer_here(asking: Asking, tasks: Iterable[Task]) -> Iterator[Outcome | Failure]:
    """Answer in this process, in order."""
    with closing(Answerer(asking)) as answerer:
        yield from (answerer.answer(*task) for task in tasks)


def answer_in_processes(
    asking: Asking, tasks: Iterable[Task], *, workers: int
) -> Iterator[Outcome | Failure]:
    """Answer in ``workers`` processes, in any order.

    Raises:
        BackendError: If a process dies, for instance of too little memory.
    """
    context = multiprocessing.get_context("spawn")  # onnxruntime's threads do not survive a fork
    with ProcessPoolExecutor(workers, context, _prepare, (asking,)) as pool:
        waiting, running = deque(tasks), set[Future[Outcome | Failure]]()
        try:
            while waiting or running:
                while waiting and len(running) < _TASKS_PER_WORKER * workers:
                    running.add(pool.submit(_answer, *waiting.popleft()))
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool:
            raise BackendError(
                f"workers: expected {workers} processes to live, one died; is there memory for {workers} bundles?"
                " use fewer --workers"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _prepare(asking: Asking) -> None:
    global _asking
    _asking = asking
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole group; the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent was killed: nobody would give it work or an end."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _answer(question: Question, reference: FirstToken | None) -> Outcome | Failure:
    """Open the bundle with the first task, where an error reaches the caller, and keep it for the next ones."""
    global _answerer
    if _answerer is None:
        assert _asking is not None
        _answerer = Answerer(_asking)
    return _answerer.answer(question, reference)
