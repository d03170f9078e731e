"""One random decoder layer and one stage as the exporter's graphs in ONNX Runtime, and the CPU's peak rates.

For ``cost_growth.py`` and ``predict_validation.py --cpu``. Times are processor times of one thread, which other programs
hardly affect.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from trio_edge.export.graphs.attention import ATTENTION_NAME, DecoderRange, RotaryTables, register_attention
from trio_edge.export.graphs.select import Select
from trio_edge.profiling.predict.speed import Rates
from trio_edge.runtime.bundle.manifest import Dimensions
from trio_edge.trio.nms import FeatureNms
from trio_edge.trio.saliency import ProxySaliency
from trio_edge.trio.selectors.stages.trio import Trio

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

HEAD_SIZE, VOCABULARY, TEXT_BEFORE = 128, 32064, 35
THRESHOLD, ROUNDS = 0.8, 16


def dimensions(hidden: int) -> Dimensions:
    """Return Vicuna-7B's decoder with another hidden size."""
    heads = hidden // HEAD_SIZE
    return Dimensions(
        num_layers=1, hidden_size=hidden, num_heads=heads, num_kv_heads=heads, head_size=HEAD_SIZE,
        intermediate_size=hidden * 11008 // 4096, vocab_size=VOCABULARY,
    )  # fmt: skip


class LayerGraphs:
    """A random layer as ``prefix`` and ``select`` graphs."""

    def __init__(self, hidden: int, folder: Path) -> None:
        torch.manual_seed(0)
        register_attention()
        self.dims, self.folder = dimensions(hidden), folder
        self.config = LlamaConfig(
            hidden_size=hidden, intermediate_size=self.dims.intermediate_size, vocab_size=VOCABULARY,
            num_attention_heads=self.dims.num_heads, num_key_value_heads=self.dims.num_kv_heads,
            num_hidden_layers=1, attn_implementation=ATTENTION_NAME,
        )  # fmt: skip
        self.layer: Any = LlamaDecoderLayer(self.config, 0).eval().requires_grad_(False)
        frequencies = 1e4 ** -(torch.arange(0, HEAD_SIZE, 2) / HEAD_SIZE)
        self.rotary = RotaryTables(frequencies[None], attention_scaling=1.0)

    def range_session(self) -> Any:
        """Return the layer for S new rows over C of the cache, both open."""
        rows, past = torch.export.Dim("S"), torch.export.Dim("C")
        key = torch.zeros(1, self.dims.num_kv_heads, 7, HEAD_SIZE)
        args = (
            torch.zeros(1, 5, self.dims.hidden_size),
            *_positions(5),
            torch.zeros(1, dtype=torch.int32),
            key,
            key,
        )
        shapes = ({1: rows}, {1: rows}, None, ({2: past}, {2: past}))
        names = ["hidden_states", "position_ids", "past_length", "key", "value"]
        return self._session(DecoderRange([self.layer], self.rotary), args, shapes, names, "range")

    def select_session(self, *, num_visual: int, num_text: int) -> Any:
        """Return TRIO's stage for N visual tokens, of which it keeps a sixth."""
        torch.manual_seed(0)
        head = nn.Linear(self.dims.hidden_size, VOCABULARY, bias=False)
        saliency = ProxySaliency(
            self.layer, LlamaRMSNorm(self.dims.hidden_size), head.requires_grad_(False), max_visual=num_visual
        )
        nms = FeatureNms(num_keep=num_visual // 6, threshold=THRESHOLD, rounds=ROUNDS)
        module = Select(Trio(saliency, nms), self.rotary, preserve_positions=False)
        rows = num_visual + num_text
        scalars = (torch.tensor([count], dtype=torch.int32) for count in (num_visual, rows))
        visual_rows = torch.arange(TEXT_BEFORE, TEXT_BEFORE + num_visual, dtype=torch.int32)
        args = (torch.randn(1, rows, self.dims.hidden_size), *_positions(rows), visual_rows, *scalars)
        names = ["hidden_states", "position_ids", "visual_rows", "num_visual", "length"]
        return self._session(module, args, None, names, f"select{num_visual}")

    def _session(self, module: nn.Module, args: Any, shapes: Any, names: list[str], name: str) -> Any:
        path = self.folder / f"{name}_{self.dims.hidden_size}.onnx"
        with torch.no_grad():
            program = torch.onnx.export(
                module.eval(),
                args,
                dynamo=True,
                opset_version=18,
                input_names=names,
                dynamic_shapes=shapes,
                verbose=False,
            )
        assert program is not None
        program.save(path, external_data=True)
        del program
        return single_thread_session(path)

    def range_feeds(self, *, rows: int, past: int) -> dict[str, Any]:
        """Return inputs of the range."""
        generator = np.random.default_rng(0)
        cache = generator.standard_normal((1, self.dims.num_kv_heads, past, HEAD_SIZE), np.float32)
        return {
            "hidden_states": generator.standard_normal((1, rows, self.dims.hidden_size), np.float32),
            "position_ids": np.arange(rows, dtype=np.int32)[None],
            "past_length": np.array([past], np.int32),
            "key": cache,
            "value": cache,
        }

    def select_feeds(self, *, num_visual: int, num_text: int) -> dict[str, Any]:
        """Return inputs of a stage: clustered tokens, so that the NMS has something to suppress."""
        generator, rows = np.random.default_rng(0), num_visual + num_text
        hidden = generator.standard_normal((1, rows, self.dims.hidden_size), np.float32)
        centres = generator.standard_normal((num_visual // 5, self.dims.hidden_size), np.float32)
        span = slice(TEXT_BEFORE, TEXT_BEFORE + num_visual)
        hidden[0, span] = 0.4 * hidden[0, span] + centres[generator.integers(len(centres), size=num_visual)]
        return {
            "hidden_states": hidden,
            "position_ids": np.arange(rows, dtype=np.int32)[None],
            "visual_rows": np.arange(TEXT_BEFORE, TEXT_BEFORE + num_visual, dtype=np.int32),
            "num_visual": np.array([num_visual], np.int32),
            "length": np.array([rows], np.int32),
        }


def single_thread_session(path: Path) -> Any:
    """Return an ONNX Runtime session on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def median_seconds(function: Callable[[], Any], *, repeats: int = 5, enough: float = 6.0) -> float:
    """Return the median processor time of a call after a warm-up; slow functions are called less often."""
    function()
    times: list[float] = []
    while len(times) < repeats and (len(times) < 2 or sum(times) < enough):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return statistics.median(times)


def measured_rates() -> Rates:
    """Return this CPU's rates on one thread: of a large matrix product, and of one that reads more than the caches hold."""
    torch.set_num_threads(1)
    side = 1536
    square = torch.randn(side, side)
    product = median_seconds(lambda: square @ square, repeats=9)
    wide, vector = torch.randn(8192, 8192), torch.randn(8192)
    reading = median_seconds(lambda: wide @ vector, repeats=9)
    return Rates(flops=2 * side**3 / product, bandwidth=wide.nelement() * 4 / reading)


def _positions(rows: int) -> tuple[torch.Tensor]:
    return (torch.arange(rows, dtype=torch.int32)[None],)
