"""The chain on a device gives, bit for bit, what the same graphs give when each is called with arrays.

On the CPU as the device, and on a GPU as the runtime sees it (tests/cuda_on_host.py): its stream is lazy, so that these numbers
also show that nothing is read or overwritten too early.
"""

from __future__ import annotations

import gc
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest

from tests.bundles import INT8_CACHES, export
from tests.conftest import REDUCED_STAGES
from tests.cuda_on_host import CudaOnHost, pretend_gpu, write_engines
from tests.decode_logits import record_logits
from tests.engine_bundles import HOST, copy_bundle
from tests.pictures import random_picture
from tests.qwen_checkpoints import CAMERA, REDUCED, save_qwen_checkpoint
from tests.reference.plain_decoder import PlainDecoder
from trio_edge.export.quantize.plan import parse_plan
from trio_edge.runtime.backends.registry import make_backend
from trio_edge.runtime.bundle.errors import BackendError
from trio_edge.runtime.bundle.graph_io import bucket_of
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.runtime.model.decoder_prompt import write_prompt
from trio_edge.runtime.pipeline import Pipeline
from trio_edge.runtime.prompts.chat import build_messages

if TYPE_CHECKING:
    from collections.abc import Callable

PROMPTS = ["w1 w2 w3 w4 w5 w6", " ".join(["w7"] * 40)]
"""For the smallest and for the largest text bucket."""
UNSETTLED = Schedule(
    stages=(Stage(layer=1, keep=14), Stage(layer=2, keep=6)), nms_rounds=1, nms_threshold=0.02
)
NUM_STEPS = 6


class Answer(NamedTuple):
    logits: Any
    """[steps, V]."""
    kept: list[list[int]]
    tokens: list[int]
    repaired: int


def plain_answer(pipeline: Pipeline, plain: PlainDecoder, picture: Any, prompt: str) -> Answer:
    """Return the greedy answer of the graphs alone; the pipeline only prepares text and picture."""
    manifest, embedding = pipeline.manifest, pipeline._embedding
    images = [] if picture is None else [picture]
    ids = pipeline._encode(build_messages(prompt, images=images))
    prepared_images = [pipeline._level.vision.prepare(image, prompt) for image in images]
    bucket = bucket_of(ids.num_tokens, manifest.text_buckets)
    after = embedding[ids.after]
    seen = pipeline._level.vision.encode_images(prepared_images, after=after, text_bucket=bucket)
    visual: Any = seen.tokens
    for prepared in prepared_images:
        pipeline._graphs.device.synchronize()
        outputs = plain.run("vision", prepared.inputs)
        visual = outputs["visual_tokens"]
        if manifest.token_keep is not None:
            more, _ = pipeline._level.vision._inputs_of_reduce(prepared, after, bucket)
            known = {name: outputs[name] for name in manifest.graph("reduce").input_names if name in outputs}
            visual = plain.run("reduce", more | known)["reduced_tokens"]
        visual = visual[: seen.tokens.shape[0]]
    prompt_rows = np.concatenate([embedding[ids.before], visual, embedding[ids.after]])
    embeds = np.zeros((1, seen.rows + bucket, prompt_rows.shape[1]), manifest.dtype)
    embeds[0, : len(prompt_rows)] = prompt_rows
    positions = write_prompt(ids, seen, manifest=manifest, embedding=embedding, text_bucket=bucket).positions
    logits = [
        plain.prefill(
            embeds,
            positions=positions.ids,
            next_position=positions.next,
            start=len(ids.before),
            num_visual=len(visual),
            rows=seen.rows,
            length=len(prompt_rows),
        )
    ]
    tokens = [int(np.argmax(logits[0]))]
    while len(tokens) < NUM_STEPS and tokens[-1] not in manifest.text.stop_token_ids:
        logits.append(plain.decode(np.asarray(embedding[tokens[-1]])))
        tokens.append(int(np.argmax(logits[-1])))
    return Answer(np.stack(logits), [kept.tolist() for kept in plain.kept], tokens, plain.num_repaired)


def device_answer(pipeline: Pipeline, picture: Any, prompt: str, patch: pytest.MonkeyPatch) -> Answer:
    with patch.context() as undone:
        seen = record_logits(pipeline, undone)
        answer = pipeline.generate(picture, prompt, max_new_tokens=NUM_STEPS)
        _ = answer.text
    logits = np.stack([answer.first_logits, *seen])
    kept = [kept.tolist() for kept in answer.kept]
    return Answer(logits, kept, answer.token_ids, answer.statistics.repaired_stages)


BUNDLES: dict[str, Callable[[Path, Path], Path]] = {
    "keep-all": lambda checkpoint, _: export(checkpoint),
    "two TRIO stages": lambda checkpoint, _: export(
        checkpoint, schedule=Schedule(stages=(Stage(layer=1, keep=14), Stage(layer=2, keep=6)))
    ),
    "TRIO, unsettled": lambda checkpoint, _: export(checkpoint, schedule=UNSETTLED),
    "FastV, with the layer before": lambda checkpoint, _: export(
        checkpoint,
        schedule=Schedule(stages=(Stage(layer=2, keep=9),), method="fastv", positions="preserved"),
    ),
    "SparseVLM, with the prompt": lambda checkpoint, _: export(
        checkpoint,
        schedule=Schedule(stages=(Stage(layer=1, keep=20), Stage(layer=2, keep=9)), method="sparsevlm"),
    ),
    "CDPruner before the decoder, with the text": lambda checkpoint, _: export(
        checkpoint, token_method="cdpruner", token_keep=15
    ),
    "KV caches in INT8": lambda checkpoint, _: export(
        checkpoint,
        schedule=Schedule(stages=tuple(Stage(layer=layer, keep=keep) for layer, keep in REDUCED_STAGES)),
        scales=INT8_CACHES,
        quantize=parse_plan("kv=int8"),
    ),
    "M-RoPE": lambda _, folder: export(
        save_qwen_checkpoint(folder / "ck"), schedule=REDUCED, image_sizes=(CAMERA,)
    ),
}


@pytest.fixture(scope="module", params=BUNDLES)
def bundle(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return BUNDLES[request.param](checkpoint, tmp_path_factory.mktemp("bundle"))


@pytest.fixture(params=["the CPU", "TensorRT"])
def pipeline(
    request: pytest.FixtureRequest, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    if request.param == "the CPU":
        with Pipeline.from_bundle(bundle, backend="onnxruntime", threads=1) as opened:
            yield opened
        return
    copy = copy_bundle(bundle, tmp_path / "bundle")
    write_engines(copy, host=HOST)
    cuda = CudaOnHost()
    pretend_gpu(monkeypatch, cuda, HOST)
    with Pipeline.from_bundle(copy, backend="tensorrt") as opened:
        yield opened
    assert not cuda.device and not cuda.pinned and cuda.open_handles == 0


def test_every_answer_equals_that_of_the_graphs_alone(
    bundle: Path, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other, so that what an answer leaves in the buffers would show in the next."""
    plain = PlainDecoder(bundle, open_bundle(bundle).manifest)
    big, small = random_picture(70, 45, seed=1), random_picture(24, 24, seed=2)
    for picture, prompt in ((big, PROMPTS[0]), (None, PROMPTS[0]), (small, PROMPTS[1]), (big, PROMPTS[0])):
        wanted = plain_answer(pipeline, plain, picture, prompt)
        answer = device_answer(pipeline, picture, prompt, monkeypatch)
        assert answer.tokens == wanted.tokens
        assert answer.kept == wanted.kept
        assert answer.repaired == wanted.repaired
        np.testing.assert_array_equal(answer.logits, wanted.logits)
    assert (plain.num_repaired > 0) == (pipeline.manifest.schedule == UNSETTLED)


def test_a_closed_pipeline_refuses_to_answer(keep_all_bundle: Path) -> None:
    pipeline = Pipeline.from_bundle(keep_all_bundle, backend="onnxruntime", threads=1)
    lazy = pipeline.generate(None, PROMPTS[0], max_new_tokens=3)
    half = pipeline.generate(None, PROMPTS[0], max_new_tokens=3)
    next(iter(half))
    pipeline.close()
    pipeline.close()
    for ask in (lambda: pipeline.generate(None, PROMPTS[0]), lambda: lazy.text, lambda: half.text):
        with pytest.raises(BackendError, match="pipeline: expected an open one, got a closed one"):
            ask()


def test_loading_and_closing_again_and_again_keeps_no_memory(keep_all_bundle: Path) -> None:
    """benchmarks/load_cycles.py does so a thousand times."""
    bundle = open_bundle(keep_all_bundle)
    sizes = {}
    for cycle in range(20):
        with Pipeline(bundle, make_backend("onnxruntime", threads=1)) as pipeline:
            _ = pipeline.generate(None, PROMPTS[0], max_new_tokens=2).text
        del pipeline
        if cycle in (7, 19):
            sizes[cycle] = resident_bytes()
    assert sizes[19] - sizes[7] < 5e6  # a session alone is 2 MB


def resident_bytes() -> int:
    gc.collect()
    found = re.search(r"^VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return 1024 * int(found[1]) if found else 0
