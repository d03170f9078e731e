"""benchmarks/gpu.py at small sizes on a CPU: what it counts, that its ways agree, and the script itself."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import REDUCED_STAGES
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.images.interface import image_processing
from trio_edge.trio.cost.flops import count_prefill
from trio_edge.trio.cost.work import vision_work

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FAMILIES = ["llava-1.5-7b", "llava-next-7b", "qwen2.5-vl-7b"]
CPU = torch.device("cpu")
NUM_TEXT = 24


@pytest.fixture(autouse=True)
def _benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@functools.cache
def full_sizes(family: str) -> Any:
    from gpu_parts.subjects import SHAPES, sizes_of

    return sizes_of(SHAPES["full"][family], dtype="float16")


def small_subject(family: str) -> Any:
    from gpu_parts.subjects import SHAPES, random_subject

    return random_subject(SHAPES["small"][family], num_text=NUM_TEXT, device=CPU, dtype="float32")


def run(arguments: list[str]) -> int:
    import gpu

    settings = ["--device", "cpu", "--shapes", "small", "--repeats", "1", "--tokens", "1", "--no-compile"]
    return int(gpu.main([*settings, *arguments]))


# ------------------------------------------------------------------------------------------------------ counting


@pytest.mark.parametrize("keep", [1.0, 0.111])
@pytest.mark.parametrize("family", FAMILIES)
def test_counts_add_up_to_the_cost_of_the_schedule(family: str, keep: float) -> None:
    from gpu_parts.count import flops

    sizes = full_sizes(family)
    counted = sizes.count(keep, num_text=64)
    cost = count_prefill(sizes.decoder, sizes.schedule(keep), num_visual=sizes.num_visual, num_text=64)
    vision = vision_work(sizes.tower, sizes.vision_sizes).flops
    assert flops(counted.prefill()) == pytest.approx(vision + cost.flops, rel=1e-9)
    assert flops(counted.selects()) == pytest.approx(cost.select_flops, rel=1e-9)
    assert counted.kv_bytes == cost.kv_bytes


def test_the_decoder_of_llava_next_could_be_more_than_seven_times_faster() -> None:
    """The number of docs/results/counted.md; whole layers of 7B models are read for every decoded token."""
    full, reduced = (full_sizes("llava-next-7b").count(keep, num_text=64) for keep in (1.0, 0.111))
    ratio = sum(work.causal_flops for work in full.decoder()) / sum(
        work.causal_flops for work in reduced.decoder()
    )
    assert round(ratio, 1) == 7.5
    assert full.decode.num_bytes > reduced.decode.num_bytes > 2 * 6.6e9


def test_least_time_is_that_of_the_slower_of_computing_and_reading() -> None:
    from gpu_parts.ceilings import Ceilings
    from gpu_parts.count import Work

    work = Work(flops=8.0, causal_flops=6.0, num_bytes=10.0)
    rates = {"matmul_size": 1, "copy_bytes": 1}
    assert work.seconds(Ceilings(flops_per_s=2.0, bytes_per_s=100.0, **rates)) == 3.0
    assert work.seconds(Ceilings(flops_per_s=100.0, bytes_per_s=2.0, **rates)) == 5.0


def test_count_prints_graphs_and_devices_without_any_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    import gpu

    assert gpu.main(["--count", "--keep", "11.1", "--families", "llava-1.5-7b"]) == 0
    printed = capsys.readouterr().out
    assert "| llava-1.5-7b | 11.1 % |" in printed
    assert "| jetson-agx-orin-64 |" in printed
    assert "| jetson-orin-nano-8 |" not in printed  # has no room for the weights


# ---------------------------------------------------------------------------------------------------- the ways


@pytest.mark.parametrize("family", FAMILIES)
def test_a_subject_lies_on_its_device_whatever_the_default_device(family: str) -> None:
    with torch.device("meta"):  # as a GPU would be: no value of it can be read on the host
        subject = small_subject(family)
    tensors = [*subject.vision_inputs.values(), subject.text_embeds, subject.position_ids]
    tensors += [*subject.root.parameters(), *subject.model.vision.module.parameters()]
    assert {tensor.device for tensor in tensors} == {CPU}


@pytest.mark.parametrize("keep", [1.0, 0.111], ids=["every token", "reduced"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_and_graphs_answer_alike(family: str, keep: float) -> None:
    from gpu_parts.graphs_in_torch import GraphsInTorch
    from gpu_parts.layers_in_torch import LayersInTorch

    subject = small_subject(family)
    ways = [way(subject, subject.sizes.schedule(keep), max_new_tokens=4) for way in (LayersInTorch, GraphsInTorch)]  # fmt: skip
    with torch.no_grad():
        for part in [part for way in ways for part in way.parts]:
            part.run()
        first, second = (way.buffers.logits.clone() for way in ways)
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
        for way in ways:
            way.decode()
            way.decode()
    torch.testing.assert_close(ways[0].buffers.logits, ways[1].buffers.logits, rtol=1e-4, atol=1e-5)
    theirs, ours = ([kept.tolist() for kept in way.buffers.kept] for way in ways)
    assert theirs == ours
    assert ways[0].buffers.kv_bytes == subject.sizes.count(keep, num_text=NUM_TEXT).kv_bytes


def test_every_way_has_the_parts_of_the_count(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "folder" / "gpu.json"
    arguments = ["--families", "llava-next-7b", "--keep", "11.1", "--no-parity", "--json", str(file)]
    assert run(arguments) == 0
    report = json.loads(file.read_text())
    assert [(row["way"], row["keep"]) for row in report["rows"]] == [
        ("whole model in torch", 1.0),
        ("graphs in torch", 1.0),
        ("the paper's code in torch", 0.111),
        ("graphs in torch", 0.111),
    ]
    for row in report["rows"]:
        assert [*row["measured"]["parts_ms"], "decode"] == list(row["counted"]["graphs"])
        assert row["measured"]["kv_bytes"] == row["counted"]["kv_bytes"]
        assert row["measured"]["ttft_ms"] > 0
    table = capsys.readouterr().out
    assert "| llava-next-7b | 11.1 % | graphs in torch |" in table
    assert "ceilings: " in table


def test_a_way_that_fails_has_a_line_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gpu_parts.layers_in_torch import LayersInTorch

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA out of memory\nwith details")

    monkeypatch.setattr(LayersInTorch, "decode", fail)
    assert run(["--families", "llava-1.5-7b", "--keep", "100", "--no-parity"]) == 0
    printed = capsys.readouterr().out
    assert "| llava-1.5-7b | 100.0 % | whole model in torch | failed: CUDA out of memory |" in printed
    assert "100.0%, graphs in torch: TTFT" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_without_a_gpu_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    import gpu

    assert gpu.main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "gpu.py: expected an NVIDIA GPU that torch can use, got none; run with --device cpu"
    )


# -------------------------------------------------------------------------------------------- bundles next to them


def test_graphs_in_torch_keep_what_the_bundle_keeps(checkpoint: Path, reduced_bundle: Path) -> None:
    from gpu_parts.parity import compare
    from gpu_parts.prompts import random_picture

    with torch.no_grad():
        found = compare(
            checkpoint, reduced_bundle, picture=random_picture((60, 40)), num_text=NUM_TEXT, device=CPU
        )
    ours = found[-1]
    assert (ours.way, ours.runs, ours.same_kept, ours.within) == ("graphs in torch", True, True, True)
    assert all(this.runs or "; " in this.reason for this in found)


def test_a_bundle_is_timed_graph_by_graph(reduced_bundle: Path) -> None:
    from gpu_parts.bundles_at_runtime import measure_bundle
    from gpu_parts.prompts import random_picture

    picture = random_picture((48, 48))
    measured = measure_bundle(
        reduced_bundle, "onnxruntime", picture=picture, num_text=NUM_TEXT, repeats=1, num_tokens=2
    )
    manifest = open_bundle(reduced_bundle).manifest
    assert list(measured.parts_ms) == [spec.name for spec in manifest.graphs]
    assert sum(measured.parts_ms.values()) <= measured.ttft_ms
    visual = image_processing(manifest.image_processing, encoder_keep=None).sizes(*picture.size)["N"]
    rows = [count + NUM_TEXT for count in (visual, *(keep for _, keep in REDUCED_STAGES))]
    row_bytes = 2 * manifest.dimensions.num_kv_heads * manifest.dimensions.head_size * 4
    layers = [spec.num_layers for spec in manifest.ranges]
    assert measured.kv_bytes == row_bytes * sum(count * num for count, num in zip(rows, layers))
