"""Ctrl-C that is never lost. SIGHUP and SIGTERM count as Ctrl-C.

Python drops exceptions in finalizers and callbacks, and torch and transformers turn some into their own errors. So a
Ctrl-C is remembered: long work checks for it from time to time, and an error after a Ctrl-C counts as the Ctrl-C.
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

    SIGTERM and SIGHUP do the same, unless the process already handles or ignores them, as under nohup.

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
    # Python prints exceptions of finalizers; a Ctrl-C in one would look like a crash.
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
    """Delay Ctrl-C until the block ends. For importing torch, whose C++ code aborts the process at an exception."""
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
