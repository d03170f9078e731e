"""TensorRT's logger, whose errors go into our messages, and its profiler, whose layer times go into a report."""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING, Any, final

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def make_logger(module: Any, on_error: Callable[[str], None]) -> Any:
    """Return a logger for ``module``, ``tensorrt`` or ``tensorrt_rtx``, that passes every error to ``on_error``."""

    class Logger(module.ILogger):  # type: ignore[misc]  # the base class is known only at run time
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= module.ILogger.ERROR:
                on_error(message)

    return Logger()


@final
class EngineErrors:
    """TensorRT's errors while engines are loaded and run."""

    def __init__(self, module: Any) -> None:
        self._texts: list[str] = []
        self.logger = make_logger(module, lambda text: self._texts.append(" ".join(text.split())[:300]))
        """For ``Runtime``."""

    def reason(self) -> str:
        """Return the first error since the last call in brackets, because later ones follow from it; "" if there was none."""
        first = f" ({self._texts[0]})" if self._texts else ""
        self._texts.clear()
        return first


@cache
def engine_errors(module: Any) -> EngineErrors:
    """Return the one error log of ``tensorrt`` or ``tensorrt_rtx`` in this process.

    TensorRT writes to the first logger that it gets as long as any of its objects lives, and ignores all later ones.
    """
    return EngineErrors(module)


@final
class EngineLayerTimes:
    """The layers of one engine in all runs: times from TensorRT's profiler, names and kinds from its inspector.

    While times are recorded, every run waits for the device.
    """

    def __init__(self, module: Any, engine: Any, file: Path) -> None:
        """Make a profiler for ``engine`` of ``module``, ``tensorrt`` or ``tensorrt_rtx``; ``write`` writes to ``file``."""
        self._file = file
        self._runs: list[list[tuple[str, float]]] = []
        self._run: list[tuple[str, float]] = []
        run = self._run

        class Profiler(module.IProfiler):  # type: ignore[misc]
            def __init__(self) -> None:
                module.IProfiler.__init__(self)  # TensorRT's bindings require this instead of super()

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                run.append((layer_name, ms))

        self._profiler = Profiler()
        inspector = engine.create_engine_inspector()
        self._layers = json.loads(inspector.get_engine_information(module.LayerInformationFormat.JSON))

    def attach(self, context: Any) -> None:
        """Let ``context`` report the layers of each run."""
        context.profiler = self._profiler

    def end_run(self) -> None:
        """Take the reported times as one run."""
        self._runs.append(self._run.copy())
        self._run.clear()

    def write(self) -> None:
        """Write all runs and the inspector's list of layers."""
        self._file.write_text(json.dumps({"runs": self._runs, "layers": self._layers.get("Layers", [])}))
