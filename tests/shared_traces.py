"""Lets the bundles that a test run exports of one model share what is traced alike for them: vision, decoder layer, head."""

from __future__ import annotations

import hashlib
import itertools
import json
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import pytest

from tests.shared_folder import kept_between_runs
from trio_edge.export.graphs.assembly.onnx_graph import trace
from trio_edge.export.graphs.clip_text import ClipText
from trio_edge.export.graphs.decoder_range import DecoderRange
from trio_edge.export.graphs.head import Head
from trio_edge.export.graphs.probe import Probe, Saliency
from trio_edge.export.graphs.reduce import Reduce
from trio_edge.export.graphs.select import Select
from trio_edge.trio.saliency import ProbeHead

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn

    from trio_edge.export.options import ExportOptions
    from trio_edge.runtime.bundle.schedule import Schedule


@contextmanager
def shared_traces(options: ExportOptions, schedule: Schedule) -> Iterator[None]:
    """Trace only what no test run has traced yet for a model of the same configuration.

    Modules are built from configuration files and few options, selections from the schedule too; shapes, types and opset are in
    the trace's arguments.
    """
    folders = [Path(folder) for folder in (options.model, options.clip) if folder is not None]
    selection = f"{schedule} {options.token_method} {options.token_keep}"
    stages = itertools.count()

    def trace_once(module: nn.Module, **settings: Any) -> ir.Model:
        if isinstance(module, (Select, Reduce)):
            origin = f"{_configuration(folders)} {selection} {next(stages)}"
        elif isinstance(module, (DecoderRange, Head)):
            origin = _decoder_configuration(folders[0])
        elif isinstance(module, (Probe, ProbeHead, Saliency)):
            # The gradient's arguments are float32 whatever the weights are.
            form = "" if isinstance(module, ProbeHead) else module.saliency.form
            origin = f"{_decoder_configuration(folders[0])} {form} {next(module.parameters()).dtype}"
        elif isinstance(module, ClipText):
            origin = _configuration(folders)
        else:
            # The parts of a layered tower have float32 arguments whatever the weights are.
            origin = f"{_configuration(folders, without='text_config')} {options.max_visual} {options.encoder_keep}"
            origin += f" {options.dtype}"
        arguments = {**settings, "args": _shapes(settings["args"])}
        wanted = f"{type(module).__name__} {origin} {sorted(arguments.items())}"
        name = f"trace-{hashlib.sha256(wanted.encode()).hexdigest()[:16]}.onnx"
        return _read(kept_between_runs(name, lambda out: _write(trace(module, **settings), out)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trio_edge.export.tracing.trace", trace_once)
        yield


def _write(model: ir.Model, path: Path) -> None:
    """Write a trace; weights, which have no values yet, are written as external data that is nowhere."""
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            value.const_value = ir.ExternalTensor(
                "nowhere", 0, 0, value.dtype, shape=value.shape, name=name, base_dir=path.parent
            )
    ir.save(model, path)


def _read(path: Path) -> ir.Model:
    model = ir.load(path)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = None
    return model


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


def _decoder_configuration(folder: Path) -> str:
    """Return all that one decoder layer and the head are built from; how many layers there are changes neither."""
    config = json.loads((folder / "config.json").read_bytes())
    decoder = dict(config["text_config"]) if "text_config" in config else config
    # One layer is traced, whatever kinds its followers are of; types are in the trace's arguments.
    for irrelevant in ("num_hidden_layers", "layer_types", "dtype", "torch_dtype"):
        decoder.pop(irrelevant, None)
    around = [config.get(name) for name in ("tie_word_embeddings", "quantization_config")]
    return f"{decoder.get('model_type', config['model_type'])} {sorted(decoder.items(), key=str)} {around}"


def _shapes(args: Any) -> Any:
    if isinstance(args, (tuple, list)):
        return [_shapes(part) for part in args]
    return tuple(args.shape), args.dtype
