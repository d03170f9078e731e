"""The operators of the exported selection, which a real TensorRT accepts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaDecoderLayer, LlamaRMSNorm

from tests.trio.decoder_layers import VOCAB, random_decoder
from tests.trio.select_graph import INPUTS, SelectGraph, example_inputs, export_select
from trio_edge.trio.nms import FeatureNms
from trio_edge.trio.saliency import ProxySaliency

DYNAMIC_OUTPUT_OPERATORS = {"NonZero", "Unique", "Compress", "NonMaxSuppression", "If", "Loop", "Scan"}
CASES = {
    "multi-head float32, mirrored similarities": (4, "direct", torch.float32, 1030, False),
    "grouped-query float16": (2, "key_gram", torch.float16, 40, False),
    "multi-query float16 with all probe rows": (1, "key_value_gram", torch.float16, 40, False),
    "several picture sizes": (4, "direct", torch.float32, 50, True),
}


def _module(num_kv_heads: int, form: Any, dtype: torch.dtype, max_visual: int) -> SelectGraph:
    decoder = random_decoder("qwen2", num_kv_heads=num_kv_heads, dtype=dtype)
    saliency = ProxySaliency(
        decoder.layer, decoder.final_norm, decoder.lm_head, max_visual=max_visual, form=form
    )
    return SelectGraph(saliency, FeatureNms(num_keep=12, threshold=0.8, rounds=4))


class Exported(NamedTuple):
    module: SelectGraph
    path: Path
    num_visual: int
    several_sizes: bool


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    num_kv_heads, form, dtype, num_visual, several = request.param
    module = _module(num_kv_heads, form, dtype, num_visual)
    path = tmp_path_factory.mktemp("select") / "select.onnx"
    return Exported(
        module, export_select(module, path, num_visual=num_visual, several_sizes=several, dtype=dtype),
        num_visual, several,
    )  # fmt: skip


def test_graph_uses_standard_operators_of_opset_19_or_less(exported: Exported) -> None:
    model = onnx.load(exported.path)
    assert [(entry.domain, entry.version <= 19) for entry in model.opset_import] == [("", True)]
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions


def test_graph_has_no_data_dependent_shape_and_no_fused_attention(exported: Exported) -> None:
    operators = {node.op_type for node in onnx.load(exported.path).graph.node}
    assert not operators & (DYNAMIC_OUTPUT_OPERATORS | {"Attention", "RotaryEmbedding", "RMSNormalization"})


def test_only_rows_and_visual_tokens_are_dynamic(exported: Exported) -> None:
    graph = onnx.load(exported.path).graph
    shapes = {
        value.name: [axis.dim_value or "any" for axis in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert shapes["hidden"] == ["any", 64]
    assert shapes["kept"] == [12]
    assert shapes["scores"] == ["any" if exported.several_sizes else exported.num_visual]
    assert shapes["unsettled"] == [1]


def test_products_with_the_head_and_the_keys_keep_the_weights_type(
    exported: Exported,
) -> None:
    """A float32 copy of half-precision weights would cost more memory than the stage."""
    module, path = exported.module, exported.path
    weights = [tensor for tensor in onnx.load(path).graph.initializer if list(tensor.dims) == [VOCAB, 64]]
    expected = onnx.TensorProto.FLOAT16 if module.saliency.head.lm_head.weight.dtype == torch.float16 else 1
    assert [tensor.data_type for tensor in weights] == [expected]


def test_onnx_runtime_agrees_with_torch_at_another_length(exported: Exported) -> None:
    module, path = exported.module, exported.path
    dtype = module.saliency.layer.self_attn.k_proj.weight.dtype
    num_visual = exported.num_visual - 7 if exported.several_sizes else exported.num_visual
    inputs = list(example_inputs(module, num_visual=num_visual, num_text=77, dtype=dtype))
    inputs[4], inputs[5] = torch.tensor([33], dtype=torch.int32), torch.tensor([70], dtype=torch.int32)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    kept, scores, _, rows, visual_rows = session.run(None, {k: v.numpy() for k, v in zip(INPUTS, inputs)})
    expected = module(*inputs)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    np.testing.assert_allclose(scores, expected[1], rtol=tolerance, atol=tolerance * float(expected[1].max()))
    np.testing.assert_array_equal(visual_rows, 3 + np.arange(12))
    if dtype == torch.float32:
        np.testing.assert_array_equal(kept, expected[0])
        np.testing.assert_array_equal(rows, expected[3])


def _build(path: Path, *, num_visual: int, hidden: int, head_size: int, several_sizes: bool = False) -> int:
    """Build an engine for one length and return its size in bytes."""
    trt = pytest.importorskip("tensorrt_rtx", reason="needs the rtx extra")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(path.read_bytes()), [str(parser.get_error(i)) for i in range(parser.num_errors)]
    profile = builder.create_optimization_profile()
    for name, width in (("hidden", hidden), ("cos", head_size), ("sin", head_size)):
        profile.set_shape(name, *((num_visual + text, width) for text in (8, 40, 512)))
    if several_sizes:
        profile.set_shape("visual_rows", *[(num_visual,)] * 3)
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None
    return int(engine.nbytes)


def test_tensorrt_parses_and_builds_a_strongly_typed_engine(exported: Exported) -> None:
    several = exported.several_sizes
    _build(exported.path, num_visual=exported.num_visual, hidden=64, head_size=16, several_sizes=several)


def test_tensorrt_stores_a_weight_once_that_is_used_forwards_and_backwards(tmp_path: Path) -> None:
    """The probe multiplies with every weight in both directions; a second copy would cost as much as the layer."""
    settings = LlamaConfig(
        hidden_size=512, intermediate_size=4096, num_attention_heads=4, num_key_value_heads=4, vocab_size=4096
    )
    layer = LlamaDecoderLayer(settings, 0).half().requires_grad_(False)
    norm, head = LlamaRMSNorm(512).half(), nn.Linear(512, 4096, bias=False).half()
    saliency = ProxySaliency(layer, norm.requires_grad_(False), head.requires_grad_(False), max_visual=40)
    module = SelectGraph(saliency, FeatureNms(num_keep=12, threshold=0.8, rounds=4))
    path = export_select(module, tmp_path / "select.onnx", num_visual=40, dtype=torch.float16)
    weights = 2 * sum(parameter.numel() for parameter in saliency.parameters())
    smallest_of_mlp = 2 * layer.mlp.up_proj.weight.numel()
    engine = _build(path, num_visual=40, hidden=512, head_size=128)
    assert (
        weights < engine < weights + 1.5 * smallest_of_mlp
    )  # code and tables of the engine, but not two weights
