"""Checkpoints that were quantized before: their integers are taken over bit for bit, or one line says why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.export.packed_checkpoints import CONFIGS, Integers, write_packed
from tests.shared_traces import shared_traces
from trio_edge.export.bundle import export_bundle
from trio_edge.export.checkpoints.checkpoint import canonical_name, read_checkpoint
from trio_edge.export.families import family_of
from trio_edge.export.options import ExportOptions
from trio_edge.export.quantize.graph import SCALE_SUFFIX
from trio_edge.export.quantize.plan import QuantizePlan, parse_plan
from trio_edge.export.quantize.unpacking import read_weight, taken_over
from trio_edge.runtime.bundle.errors import CheckpointError
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.bundle.schedule import Schedule, Stage

if TYPE_CHECKING:
    from collections.abc import Callable

SCHEDULE = Schedule(stages=(Stage(layer=1, keep=6),))


def export(checkpoint: Path, out: Path, *, plan: str | None = None) -> Path:
    quantize = QuantizePlan() if plan is None else parse_plan(plan)
    options = ExportOptions(
        model=str(checkpoint), out=out, schedule=SCHEDULE, max_text=16, max_new_tokens=4, quantize=quantize
    )
    with shared_traces():
        export_bundle(options)
    return out


@pytest.mark.parametrize("method", list(CONFIGS))
def test_integers_and_scales_are_read_as_they_were_packed(
    checkpoint: Path, tmp_path: Path, method: str
) -> None:
    known = write_packed(checkpoint, tmp_path / "packed", method=method)
    packed = read_checkpoint(str(tmp_path / "packed"), check_config=family_of)
    assert len(packed.packed) == len(known) == 3 * 7
    for module, integers in known.items():
        name = canonical_name(f"{module}.weight")
        found = taken_over(packed, name, dtype="float32")
        assert torch.equal(found.values_OI.to(torch.int64), integers.values)
        assert torch.equal(found.scales_OB, integers.scales)
        assert packed.tensor(name).shape == tuple(integers.values.shape)


def dequantized(bundle: Path, graph: str) -> dict[str, torch.Tensor]:
    """Return the linear weights [O, I] that a graph computes with, by initializer."""
    initializers = ir.load(bundle / f"{graph}.onnx").graph.initializers
    result = {}
    for name, value in initializers.items():
        scales = initializers.get(name + SCALE_SUFFIX)
        if scales is not None:
            assert value.const_value is not None and scales.const_value is not None
            rows = torch.from_numpy(value.const_value.numpy().astype("float32")).T
            blocks = torch.from_numpy(scales.const_value.numpy().copy()).T
            result[name] = (rows.unflatten(1, (blocks.shape[1], -1)) * blocks[..., None]).flatten(1)
    return result


def weight_of(known: dict[str, Integers], layer: int, module: str) -> torch.Tensor:
    (name,) = (name for name in known if name.endswith(f"layers.{layer}.{module}"))
    return known[name].dequantized()


def test_graphs_compute_with_exactly_the_packed_weights(checkpoint: Path, tmp_path: Path) -> None:
    """Also its probe: there is no other copy of the layer."""
    known = write_packed(checkpoint, tmp_path / "packed", method="awq")
    bundle = export(tmp_path / "packed", tmp_path / "bundle")
    for layer, graph, prefix in ((0, "prefix", "layers.0."), (2, "suffix", "layers.1.")):
        weights = dequantized(bundle, graph)
        assert len(weights) == (14 if graph == "suffix" else 7)
        for module in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
            (name,) = (one for one in weights if one.endswith(f"{prefix}{module}.weight"))
            assert torch.equal(weights[name], weight_of(known, layer, module))
    quantization = open_bundle(bundle).manifest.quantization
    assert quantization is not None
    assert quantization.method == "checkpoint"
    assert quantization.formats == {"prefix": "int4", "suffix": "int4"}
    assert not dequantized(bundle, "select_1")
    assert not dequantized(bundle, "head")
    (name,) = (one for one in dequantized(bundle, "probe_1") if one.endswith("self_attn.o_proj.weight"))
    assert torch.equal(dequantized(bundle, "probe_1")[name], weight_of(known, 1, "self_attn.o_proj"))


def test_zero_points_are_read_and_need_rounding_again(checkpoint: Path, tmp_path: Path) -> None:
    known = write_packed(checkpoint, tmp_path / "packed", method="awq", settings={"zero_point": True}, zero=5)
    packed = read_checkpoint(str(tmp_path / "packed"))
    module, integers = next(iter(known.items()))
    shifted = Integers(integers.values + 3, integers.scales).dequantized()
    assert torch.equal(read_weight(packed, canonical_name(f"{module}.weight")), shifted)
    with pytest.raises(CheckpointError, match=r"symmetric integers.*--quantize int4 to round"):
        export(tmp_path / "packed", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_zero_points_that_the_configuration_denies_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    write_packed(checkpoint, tmp_path / "packed", method="gptq", zero=7)
    packed = read_checkpoint(str(tmp_path / "packed"))
    with pytest.raises(CheckpointError, match="expected zero points of 8"):
        taken_over(packed, next(iter(packed.packed)), dtype="float32")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"quant_method": "bitsandbytes"},
            "expected awq, gptq, compressed-tensors or modelopt, got 'bitsandbytes'",
        ),
        ({"quant_method": "gptq", "bits": 8}, "bits: expected 4, got 8"),
        ({"quant_method": "gptq", "bits": 4, "desc_act": True}, "desc_act: expected False, got True"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version: expected 'gemm'"),
        (
            {"quant_method": "compressed-tensors", "format": "float-quantized"},
            "format: expected 'pack-quantized'",
        ),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": [4]},
            "num_bits: expected 4, got None",
        ),
        (
            {"quant_method": "modelopt", "quant_algo": "NVFP4"},
            "quant_algo: expected 'W4A16_AWQ', got 'NVFP4'",
        ),
    ],
    ids=lambda value: value.get("quant_method") if isinstance(value, dict) else "",
)
def test_other_packings_are_refused_before_weights_are_read(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        family_of(Path("folder"), {"model_type": "llava", "quantization_config": settings})


def write_damaged(
    checkpoint: Path, folder: Path, *, method: str, part: str, change: Callable[[Any], torch.Tensor]
) -> str:
    """Write a packed checkpoint with another tensor ``part`` (None if there is none) in its first layer; return the folder."""
    known = write_packed(checkpoint, folder, method=method)
    tensors = load_file(folder / "model.safetensors")
    name = f"{next(iter(known))}.{part}"
    tensors[name] = change(tensors.get(name))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize(
    ("method", "part", "change", "message"),
    [
        (
            "modelopt",
            "pre_quant_scale",
            lambda _: torch.ones(4),
            r"pre_quant_scale.*expected no scales of a layer.s inputs",
        ),
        (
            "compressed-tensors",
            "weight_scale",
            torch.flatten,
            r"weight_scale': expected two axes, got shape \[\d+\]",
        ),
    ],
    ids=["inputs with factors of their own", "scales of one axis"],
)
def test_layers_that_cannot_be_read_are_refused(
    method: str, part: str, change: Any, message: str, checkpoint: Path, tmp_path: Path
) -> None:
    folder = write_damaged(checkpoint, tmp_path / "packed", method=method, part=part, change=change)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(folder)


def test_shuffled_blocks_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = write_damaged(
        checkpoint, tmp_path / "packed", method="gptq", part="g_idx", change=lambda order: order.flip(0)
    )
    packed = read_checkpoint(folder)
    with pytest.raises(CheckpointError, match="blocks of neighbouring inputs"):
        taken_over(packed, next(iter(packed.packed)), dtype="float32")


def test_a_configuration_that_is_no_object_is_refused() -> None:
    config = json.loads('{"model_type": "llava", "quantization_config": 4}')
    with pytest.raises(CheckpointError, match="expected awq, gptq"):
        family_of(Path("folder"), config)
