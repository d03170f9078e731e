"""Lets the bundles that a test run exports of one model share what is traced alike for them: vision, decoder layer, head."""

from __future__ import annotations

import functools
import hashlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn
from torch.onnx._internal.exporter._registration import ONNXRegistry
from transformers import PreTrainedConfig

from tests.shared_folder import kept_between_runs
from trio_edge.export.graphs.assembly.onnx_graph import trace_graph

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


_make_registry = ONNXRegistry.from_torchlib
_OF_TORCH = set(vars(nn.Module())) - {"_parameters", "_buffers", "_modules"}
# One layer is traced, whatever the number and kinds of its followers are; types are in the shapes of the weights.
_IRRELEVANT = {
    "num_hidden_layers",
    "layer_types",
    "dtype",
    "torch_dtype",
    "_name_or_path",
    "architectures",
    "layer_idx",
    "vocab_size",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
}
# In a configuration, these only make the modules: what a layer computes with stands in its modules and in the rotary tables.
_OF_CONSTRUCTION = {
    "initializer_range",
    "max_position_embeddings",
    "max_window_layers",
    "rope_parameters",
    "head_dim",
}


@contextmanager
def shared_traces() -> Iterator[None]:
    """Let an export trace only what no test run has traced yet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trio_edge.export.tracing.graphs.trace_graph", trace_once)
        yield


def trace_once(module: nn.Module, **settings: Any) -> ir.Model:
    """Return what ``trace_graph`` does; a module of equal structure and arguments gives the same graph."""

    def make(out: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(_registry))
            _write(trace_graph(module, **settings), out)

    arguments = {**settings, "args": _shapes(settings["args"], settings["dynamic_shapes"])}
    wanted = f"{_structure(module, {})} {sorted(arguments.items())}"
    return _read(kept_between_runs(f"trace-{hashlib.sha256(wanted.encode()).hexdigest()[:16]}.onnx", make))


@functools.cache
def _registry(*, opset_version: int) -> ONNXRegistry:
    """Return torch's table of operators; torch makes it anew for each trace, which takes half a second."""
    return _make_registry(opset_version=opset_version)


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


def _structure(value: Any, seen: dict[int, int]) -> Any:
    """Return all of a module, or of what it holds, that its trace can depend on: classes, settings and shapes, no weights.

    Args:
        value: The module, or a part of it.
        seen: Numbers of the tensors so far, by their ids: a shared tensor is another structure than two equal ones.
    """
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        return value
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype, seen.setdefault(id(value), len(seen))
    if isinstance(value, np.ndarray):
        return value.shape, value.dtype.str, hashlib.sha256(value.tobytes()).hexdigest()
    if isinstance(value, (list, tuple)):
        return [_structure(part, seen) for part in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, dict):
        return [(name, _structure(part, seen)) for name, part in value.items() if name not in _IRRELEVANT]
    if isinstance(value, PreTrainedConfig):
        settings = {key: part for key, part in value.to_dict().items() if key not in _OF_CONSTRUCTION}
        rope = getattr(value, "rope_parameters", None) or {}
        if "llama_4_scaling_beta" in rope:  # Ministral 3's layers compute with it
            settings["rope_parameters"] = rope
        return _structure(settings, seen)
    if isinstance(value, functools.partial):
        return _structure([value.func, value.args, value.keywords], seen)
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    if not hasattr(value, "__dict__"):
        return str(value)
    own = {name: part for name, part in vars(value).items() if name not in _OF_TORCH}
    return [f"{type(value).__module__}.{type(value).__qualname__}", _structure(own, seen)]


def _shapes(args: Any, dynamic_shapes: Any) -> list[tuple[list[int | str], torch.dtype]]:
    """Return shapes and types of the example tensors. Sizes of dynamic axes have numbers: a trace depends only on which are equal.

    Sizes 0 and 1 keep their values, because torch treats them in another way.
    """
    numbers: dict[int, str] = {}
    found = []
    for tensor, axes in zip(_leaves(args), _leaves(dynamic_shapes), strict=True):
        sizes: list[int | str] = list(tensor.shape)
        for axis in axes:
            if (size := tensor.shape[axis]) > 1:
                sizes[axis] = numbers.setdefault(size, f"size {len(numbers)}")
        found.append((sizes, tensor.dtype))
    return found


def _leaves(tree: Any) -> list[Any]:
    """Return what is in nested tuples and lists; arguments of ``*others`` are in a tuple of their own in dynamic shapes only."""
    if not isinstance(tree, (tuple, list)):
        return [tree]
    return [leaf for part in tree for leaf in _leaves(part)]
