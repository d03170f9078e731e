"""Ctrl-C that is not lost. SIGHUP and SIGTERM count as one.

Python drops an exception that is raised in a finalizer or a callback, and torch and transformers turn some into their own
errors. So a Ctrl-C is remembered: work asks from time to time, and an error after it counts as the Ctrl-C.
"""

from __future__ import annotations

import signal
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

_ENDING = (signal.SIGTERM,) if sys.platform == "win32" else (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Yield a function that raises KeyboardInterrupt if Ctrl-C was pressed since the block began.

    SIGTERM and SIGHUP do the same, unless the process handles or ignores them already, as under nohup.

    Raises:
        KeyboardInterrupt: At Ctrl-C, and instead of any error that follows one.
    """
    pressed = threading.Event()

    def remember(_number: int, _frame: FrameType | None) -> None:
        pressed.set()
        raise KeyboardInterrupt

    def check() -> None:
        if pressed.is_set():
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield check
        return
    ending = [number for number in _ENDING if signal.getsignal(number) is signal.SIG_DFL]
    handlers = {number: signal.signal(number, remember) for number in (signal.SIGINT, *ending)}
    # Python prints what a finalizer raises; a Ctrl-C that it caught there would look like a crash.
    hook = sys.unraisablehook

    def report(lost: sys.UnraisableHookArgs) -> None:
        if not issubclass(lost.exc_type, KeyboardInterrupt):  # that one is remembered
            hook(lost)

    sys.unraisablehook = report
    try:
        yield check
    except Exception:
        check()
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook


@contextmanager
def ctrl_c_held() -> Iterator[None]:
    """Hold Ctrl-C back until the block ends, in which torch is imported: its C++ aborts the process at an exception."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed = threading.Event()
    handler = signal.signal(signal.SIGINT, lambda _number, _frame: pressed.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if pressed.is_set():
            signal.raise_signal(signal.SIGINT)
