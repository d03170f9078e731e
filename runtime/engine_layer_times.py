"""Collects what TensorRT says of an engine's layers while it runs: times from its profiler, names and kinds from its inspector."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, final

if TYPE_CHECKING:
    from pathlib import Path


@final
class EngineLayerTimes:
    """The layers of one engine in all runs of its contexts; every run waits for the device."""

    def __init__(self, module: Any, engine: Any, file: Path) -> None:
        """Make a profiler.

        Args:
            module: ``tensorrt`` or ``tensorrt_rtx``.
            engine: The engine.
            file: Where ``write`` puts what was seen.
        """
        self._file = file
        self._runs: list[list[tuple[str, float]]] = []
        self._run: list[tuple[str, float]] = []
        run = self._run

        class Profiler(module.IProfiler):  # type: ignore[misc]
            def __init__(self) -> None:
                module.IProfiler.__init__(self)  # what TensorRT's binding asks for in place of super()

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                run.append((layer_name, ms))

        self._profiler = Profiler()
        inspector = engine.create_engine_inspector()
        self._layers = json.loads(inspector.get_engine_information(module.LayerInformationFormat.JSON))

    def attach(self, context: Any) -> None:
        """Let ``context`` report the layers of each run."""
        context.profiler = self._profiler

    def end_run(self) -> None:
        """Take what was reported as one run."""
        self._runs.append(self._run.copy())
        self._run.clear()

    def write(self) -> None:
        """Write all runs and the inspector's list of layers."""
        self._file.write_text(json.dumps({"runs": self._runs, "layers": self._layers.get("Layers", [])}))
