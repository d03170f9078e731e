"""Lets the bundles that one process exports of one model share what is traced alike for them: vision, decoder layer, head."""

from __future__ import annotations

import itertools
import json
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from trio_edge.export.graphs.clip_text import ClipText
from trio_edge.export.graphs.decoder_range import DecoderRange
from trio_edge.export.graphs.head import Head
from trio_edge.export.graphs.reduce import Reduce
from trio_edge.export.graphs.select import Select
from trio_edge.export.onnx_graph import trace

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

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
    folders = [Path(folder) for folder in (options.model, options.clip) if folder is not None]
    selection = f"{schedule} {options.token_method} {options.token_keep}"
    stages = itertools.count()

    def trace_once(module: nn.Module, **settings: Any) -> ir.Model:
        if isinstance(module, (Select, Reduce)):
            origin = f"{_configuration(folders)} {selection} {next(stages)}"
        elif isinstance(module, (DecoderRange, Head, ClipText)):
            origin = _configuration(folders)
        else:
            origin = f"{_configuration(folders, without='text_config')} {options.max_visual} {options.encoder_keep}"
        arguments = {**settings, "args": _shapes(settings["args"])}
        wanted = f"{type(module).__name__} {origin} {sorted(arguments.items())}"
        if wanted not in _traces:
            _traces[wanted] = trace(module, **settings)
        return _traces[wanted].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trio_edge.export.tracing.trace", trace_once)
        yield


def _configuration(folders: Sequence[Path], *, without: str = "") -> str:
    """Return all that the models' modules and the processing of pictures are built from; a vision tower knows no decoder."""
    files = {
        path: json.loads(path.read_bytes())
        for folder in folders
        for path in sorted(folder.glob("*config.json"))
    }
    for content in files.values():
        content.pop(without, None)
    return str([(path.name, content) for path, content in files.items()])


def _shapes(args: Any) -> Any:
    if isinstance(args, (tuple, list)):
        return [_shapes(part) for part in args]
    return tuple(args.shape), args.dtype
