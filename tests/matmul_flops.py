"""FLOPs of an ONNX graph's matrix products, from the shapes that ONNX Runtime saw when it ran them one by one."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from trio_edge.runtime.bundle.manifest import GraphSpec, Profile


def matmul_flops(graph: Path, feeds: dict[str, NDArray[Any]]) -> int:
    """Return two FLOPs for each multiplication and addition of MatMul and Gemm, in loops each time that they run."""
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.enable_profiling, options.profile_file_prefix = True, f"{folder}/run"
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        names = {value.name for value in session.get_inputs()}
        session.run(None, {name: feeds[name] for name in names})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    nodes = (event["args"] for event in events if event.get("cat") == "Node")
    return sum(
        _flops(node)
        for node in nodes
        if node.get("op_name") in ("MatMul", "Gemm") and "input_type_shape" in node
    )


def example_feeds(spec: GraphSpec, profile: Profile) -> dict[str, NDArray[Any]]:
    """Return inputs for one profile of a vision, reduce or select graph, or of a probe: every row real, the picture first."""
    sizes = profile.sizes
    counts = {
        "num_visual": "N",
        "length": "S",
        "prompt_length": "F",
        "num_text": "T",
        "probe_length": "PS",
        "gradient_num_visual": "GN",
    }
    random, feeds = np.random.default_rng(0), {}
    for tensor in spec.inputs:
        shape = [size if isinstance(size, int) else sizes[size] for size in tensor.shape]
        values: NDArray[Any] = random.standard_normal(shape)
        if tensor.name in counts:
            values = np.array([sizes[counts[tensor.name]]])
        elif tensor.dtype == "int32":
            values = np.broadcast_to(np.arange(shape[-1]), shape)
        if tensor.name in ("is_newline", "token_index", "table_index"):
            values = np.zeros(shape)
        feeds[tensor.name] = values.astype(tensor.dtype)
    return feeds


def _flops(node: dict[str, Any]) -> int:
    (output,), (first,) = node["output_type_shape"][0].values(), node["input_type_shape"][0].values()
    return 2 * math.prod(output) * int(first[-1])
