"""Lets the bundles that one process exports of one model share what is traced alike for them: vision, decoder layer, head."""

from __future__ import annotations

import hashlib
import itertools
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from trio_edge.export.graphs.reduce import Reduce
from trio_edge.export.graphs.select import Select
from trio_edge.export.onnx_graph import trace

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir
    from torch import nn

    from trio_edge.export.bundle import ExportOptions
    from trio_edge.runtime.schedule import Schedule

_traces: dict[str, ir.Model] = {}


@contextmanager
def shared_traces(options: ExportOptions, schedule: Schedule) -> Iterator[None]:
    """Trace only what this process has not traced yet for a model of the same configuration.

    Modules are built from configuration files and few options, selections from the schedule too; shapes, types and opset are in
    the trace's arguments.
    """
    folders = [options.model, *([] if options.clip is None else [options.clip])]
    model = (
        f"{[_configuration(Path(folder)) for folder in folders]} {options.max_visual} {options.encoder_keep}"
    )
    selection = f"{schedule} {options.token_method} {options.token_keep}"
    stages = itertools.count()

    def trace_once(module: nn.Module, **settings: Any) -> ir.Model:
        arguments = {**settings, "args": _shapes(settings["args"])}
        wanted = f"{model} {type(module).__name__} {sorted(arguments.items())}"
        if isinstance(module, (Select, Reduce)):
            wanted += f" {selection} {next(stages)}"
        if wanted not in _traces:
            _traces[wanted] = trace(module, **settings)
        return _traces[wanted].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trio_edge.export.tracing.trace", trace_once)
        yield


def _configuration(folder: Path) -> str:
    """Return a digest of all that a model's modules and its pictures' processing are built from."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.json")):
        digest.update(f"{path.name} {path.stat().st_size} ".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _shapes(args: Any) -> Any:
    if isinstance(args, (tuple, list)):
        return [_shapes(part) for part in args]
    return tuple(args.shape), args.dtype
