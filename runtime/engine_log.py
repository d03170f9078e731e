"""TensorRT's log: its errors are kept for our own messages, all else is dropped."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, final

if TYPE_CHECKING:
    from collections.abc import Callable


def make_logger(module: Any, on_error: Callable[[str], None]) -> Any:
    """Return a logger for ``tensorrt`` or ``tensorrt_rtx`` that gives every error to ``on_error``."""

    class Logger(module.ILogger):  # type: ignore[misc]  # the base is known when it is imported
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= module.ILogger.ERROR:
                on_error(message)

    return Logger()


@final
class EngineErrors:
    """What TensorRT has complained about while engines are loaded and run."""

    def __init__(self, module: Any) -> None:
        self._texts: list[str] = []
        self.logger = make_logger(module, lambda text: self._texts.append(" ".join(text.split())[:300]))
        """For ``Runtime``."""

    def reason(self) -> str:
        """Return the first error since the last call in brackets, as later ones follow from it; nothing if there was none."""
        first = f" ({self._texts[0]})" if self._texts else ""
        self._texts.clear()
        return first


@cache
def engine_errors(module: Any) -> EngineErrors:
    """Return the errors of ``tensorrt`` or ``tensorrt_rtx`` in this process.

    TensorRT writes to the first logger that it was given as long as any of its objects lives, whatever others it is given: there is
    one, and it stays.
    """
    return EngineErrors(module)
