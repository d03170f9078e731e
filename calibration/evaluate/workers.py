"""Worker processes that answer questions, each with its own opened bundle.

Answers do not depend on the number of workers: all of them have the same number of threads.
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
    """A question, with keep-all's first token if there is a reference."""

_TASKS_PER_WORKER = 4  # submitted ahead: no worker waits, and few images are in memory
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
        BackendError: If a process dies, for instance because memory is short.
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
                f"--workers: expected {workers} running processes, one died; is there memory for {workers} bundles?"
                " use fewer --workers"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _prepare(asking: Asking) -> None:
    global _asking
    _asking = asking
    # Ctrl-C reaches the whole process group; the parent ends its workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process if its parent was killed, which can then not end it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _answer(question: Question, reference: FirstToken | None) -> Outcome | Failure:
    """Answer one task. The first one opens the bundle: an error in ``_prepare`` would not reach the caller."""
    global _answerer
    if _answerer is None:
        assert _asking is not None
        _answerer = Answerer(_asking)
    return _answerer.answer(question, reference)
