"""The exported graphs on ONNX Runtime reproduce the reference implementation, stage by stage and token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.goldens import GOLDEN_NAMES, Golden, golden_bundle, load_golden, needs_goldens
from tests.tolerances import LOGITS_FLOAT32, SALIENCY_FLOAT32
from trio_edge.runtime.backends.registry import make_backend
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.model.decoder import Decoder, PrefillResult
from trio_edge.runtime.model.decoder_prompt import DecoderPrompt
from trio_edge.runtime.model.programs import Programs
from trio_edge.runtime.prompts.tokenizer import plain_positions

if TYPE_CHECKING:
    from numpy.typing import NDArray

pytestmark = needs_goldens


class Run:
    """A golden's prompt through the exported graphs: prefill and six decode steps with the golden's tokens."""

    def __init__(self, golden: Golden, decoder: Decoder, *, max_visual: int, bucket: int) -> None:
        embeds = golden.arrays["inputs_embeds"].astype(np.float32)
        start = golden.settings["visual_start"]
        end = start + golden.settings["visual_tokens"]
        self.golden = golden
        self.prefill: PrefillResult = decoder.prefill(
            DecoderPrompt(
                text=np.concatenate([embeds[:start], embeds[end:]]),
                visual=embeds[start:end],
                visual_rows=np.arange(start, end, dtype=np.int32),
                max_visual=max_visual,
                text_bucket=bucket,
                positions=plain_positions(num_rows=max_visual + bucket, length=len(embeds)),
            )
        )
        table = golden.weights["model.embed_tokens.weight"].numpy()
        logits = [self.prefill.logits]
        for token in golden.arrays["tokens"]:
            decoder.decode(table[[token]])
            logits.append(decoder.logits())
        self.logits: NDArray[np.float32] = np.stack(logits)
        self.kv_lengths = [cache.length for cache in decoder.caches]


@pytest.fixture(scope="module", params=GOLDEN_NAMES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    golden, folder = load_golden(request.param), tmp_path_factory.mktemp(request.param)
    bundle = open_bundle(golden_bundle(golden, folder / "ck"))
    decoder = Decoder(Programs(bundle.manifest, make_backend("onnxruntime").load(bundle)))
    return Run(golden, decoder, max_visual=bundle.manifest.max_visual, bucket=bundle.manifest.text_buckets[0])


def test_kept_tokens_are_equal_at_every_stage(run: Run) -> None:
    original = np.arange(run.golden.settings["visual_tokens"])
    for stage in range(run.golden.num_stages):
        original = original[run.golden.arrays[f"stage{stage}_kept"]]
        np.testing.assert_array_equal(run.prefill.kept[stage], original)


def test_scores_are_equal_at_every_stage(run: Run) -> None:
    for stage in range(run.golden.num_stages):
        np.testing.assert_allclose(
            run.prefill.scores[stage], run.golden.arrays[f"stage{stage}_scores"], **SALIENCY_FLOAT32
        )


def test_logits_of_prefill_and_decode_are_equal(run: Run) -> None:
    np.testing.assert_allclose(run.logits, run.golden.arrays["logits"], **LOGITS_FLOAT32)


def test_no_stage_needed_repair(run: Run) -> None:
    assert run.prefill.num_repaired == 0


def test_kv_caches_hold_as_many_rows_as_the_reference(run: Run) -> None:
    starts = [0, *run.golden.settings["stage_layers"]]
    layers = run.golden.arrays["kv_len"]
    assert run.kv_lengths == [int(layers[start]) for start in starts]
