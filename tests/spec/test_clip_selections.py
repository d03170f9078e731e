"""CDPruner and EADP in CLIP's space: the bundle keeps what plain float64 loops keep on Hugging Face's own embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np
import pytest
import torch

from tests.bundles import export
from tests.clip_checkpoints import LENGTH, save_clip_checkpoint
from tests.engine_bundles import build_here
from tests.hugging_face import Original
from tests.matmul_flops import example_feeds, matmul_flops
from tests.pictures import random_picture
from tests.reference.token_selectors import cdpruner, clip_importance, clip_relevance, cover
from tests.spec.test_selectors_through_bundles import Sequence, rows_after, through_the_decoder
from tests.tolerances import LOGITS_FLOAT32
from tests.trio.selectors.token_graph import Case
from trio_edge.calibration.evaluate.answer_cost import prefill_flops
from trio_edge.profiling.predict.answer import memory_of
from trio_edge.profiling.predict.plan import plan_for
from trio_edge.runtime.backends.registry import make_backend
from trio_edge.runtime.backends.single_graph import SingleGraph
from trio_edge.runtime.bundle.errors import ShapeError
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.bundle.schedule import Schedule
from trio_edge.runtime.pipeline import Pipeline
from trio_edge.trio.cost.bundle_work import counted

if TYPE_CHECKING:
    from pathlib import Path

METHODS = ["cdpruner", "eadp"]
QUESTIONS = {"one text": "w1 w2 w3 w4 w5 w6", "three texts": " ".join(f"w{7 * i % 50}" for i in range(19))}
NUM_KEEP = 15
ROOM = LENGTH - 2


class Clip(NamedTuple):
    """A small CLIP checkpoint, and its model in float64."""

    folder: Path
    model: Any

    def texts(self, question: str) -> list[Any]:
        """Return for each run of eight words its projected tokens, start and end among them."""
        words = [int(word[1:]) for word in question.split()]
        texts = []
        for start in range(0, len(words), ROOM):
            ids = torch.tensor([[58, *words[start : start + ROOM], 59]])
            hidden = self.model.text_model(input_ids=ids).last_hidden_state
            projected = self.model.text_projection(hidden)[0]
            pooled = self.model.get_text_features(input_ids=ids).pooler_output[0]
            torch.testing.assert_close(projected[-1], pooled)
            texts.append(projected.numpy())
        return texts

    def patches(self, sequence: Sequence) -> Any:
        """Return each visual token's patch: last norm and projection of the tower's features, 0 at newlines."""
        states = sequence.model.model.vision_tower(sequence.pixels, output_hidden_states=True).hidden_states
        features = states[sequence.model.config.vision_feature_layer][:, 1:].double()
        rows = self.model.visual_projection(self.model.vision_model.post_layernorm(features)).flatten(0, 1)
        return torch.cat([rows, torch.zeros_like(rows[:1])])[sequence.index].numpy()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    import transformers

    folder = save_clip_checkpoint(tmp_path_factory.mktemp("clip"))
    return Clip(folder, transformers.CLIPModel.from_pretrained(folder).double().eval().requires_grad_(False))


@pytest.fixture(scope="module")
def original(checkpoint: Path) -> Original:
    return Original.load(checkpoint)


def bundle_of(method: Any, checkpoint: Path, clip: Clip) -> Path:
    return export(checkpoint, token_method=method, token_keep=NUM_KEEP, clip=str(clip.folder))


def test_a_prediction_counts_the_text_towers_memory(checkpoint: Path, clip: Clip) -> None:
    manifest = open_bundle(bundle_of("eadp", checkpoint, clip)).manifest
    plain = msgspec.structs.replace(
        manifest,
        clip_text=None,
        graphs=tuple(graph for graph in manifest.graphs if graph.role != "clip_text"),
    )
    with_it, without = (memory_of(plan_for(manifest=one, keep="all"), usable=0) for one in (manifest, plain))
    assert 2 * (with_it.weights - without.weights) == manifest.graph("clip_text").weight_bytes > 0


def test_a_prediction_runs_the_texts_that_there_are_shapes_for(checkpoint: Path, clip: Clip) -> None:
    manifest = open_bundle(bundle_of("eadp", checkpoint, clip)).manifest
    one, two = (plan_for(manifest=manifest, num_text=ROOM + more) for more in (0, 1))
    rows = [dict(setting.before)["clip_text"].products[0].rows for setting in (one, two)]
    assert rows == [LENGTH, 8 * LENGTH]
    for setting, index in ((one, 0), (two, 1)):
        assert [name for name, _ in setting.before] == ["clip_text", "reduce"]
        for name, work in setting.before:
            graph = manifest.graph(name)
            assert counted(manifest, graph, graph.profiles[index]).flops == pytest.approx(work.flops)


def expected(method: str, sequence: Sequence, clip: Clip, question: str) -> list[int]:
    count = len(sequence.visual)
    empty = np.zeros((count, 1))
    case = Case(
        tokens=sequence.tokens.double().numpy(), num_visual=count,
        newline=(sequence.index == len(sequence.pixels) * 9).numpy(), features=empty, keys=empty,
        attention=empty[:, 0], text=empty, num_text=0, previous=empty,
    )  # fmt: skip
    patches, texts = clip.patches(sequence), clip.texts(question)
    if method == "cdpruner":
        return cdpruner(case, NUM_KEEP, worth=clip_relevance(case, patches, texts))
    return cover(case, clip_importance(case, patches, texts), NUM_KEEP)


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_the_bundle_keeps_what_plain_loops_keep_and_gives_the_logits_of_these_tokens(
    method: str, question: str, checkpoint: Path, clip: Clip, original: Original
) -> None:
    with Pipeline.from_bundle(bundle_of(method, checkpoint, clip)) as pipeline:
        for size in ((48, 48), (70, 30)):
            picture = random_picture(*size, seed=size[0])
            answer = pipeline.generate(picture, question, max_new_tokens=1)
            assert answer.text is not None
            sequence = Sequence(original, pipeline, picture, question)
            kept = expected(method, sequence, clip, question)
            rows, visual = rows_after(kept, sequence.visual, sequence.embeds.shape[1])
            logits, _ = through_the_decoder(sequence, sequence.embeds[:, rows], visual, Schedule())
            np.testing.assert_allclose(answer.first_logits, logits, **LOGITS_FLOAT32)
            assert list(answer.statistics.graph_ms)[:3] == ["vision", "clip_text", "reduce"]


@torch.no_grad()
def test_the_text_tower_gives_hugging_faces_tokens_whatever_stands_behind_the_end(
    checkpoint: Path, clip: Clip
) -> None:
    graphs = make_backend("onnxruntime").load(open_bundle(bundle_of("eadp", checkpoint, clip)), ["clip_text"])
    profiles = graphs.engines["clip_text"].spec.profiles
    assert [profile.sizes["M"] for profile in profiles] == [1, 8]
    ids = np.full((8, LENGTH), 59, np.int32)
    ids[0, :4], ids[1, :6] = [58, 3, 4, 59], [58, 1, 2, 3, 4, 59]
    ids[1, 6:] = 7
    texts = SingleGraph(graphs, "clip_text", profile=profiles[-1].name).run({"clip_ids": ids})["clip_texts"]
    graphs.close()
    np.testing.assert_allclose(texts[0, :4], clip.texts("w3 w4")[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(texts[1, :6], clip.texts("w1 w2 w3 w4")[0], rtol=1e-4, atol=1e-5)


def test_a_question_of_more_texts_than_there_is_room_for_is_refused(checkpoint: Path, clip: Clip) -> None:
    with (
        Pipeline.from_bundle(bundle_of("cdpruner", checkpoint, clip)) as pipeline,
        pytest.raises(ShapeError, match=r"prompt: expected at most 64 tokens of CLIP, got 70"),
    ):
        pipeline.generate(random_picture(48, 48), "_".join(["w1"] * 70))


@pytest.mark.parametrize("method", METHODS)
def test_every_graph_before_the_decoder_computes_what_the_formulas_count(
    method: str, checkpoint: Path, clip: Clip
) -> None:
    bundle = bundle_of(method, checkpoint, clip)
    manifest = open_bundle(bundle).manifest
    for name in ("vision", "clip_text", "reduce"):
        graph = manifest.graph(name)
        looked = matmul_flops(bundle / graph.file, example_feeds(graph, graph.profiles[-1]))
        steps = 0 if name != "reduce" else _steps(method, graph.profiles[-1].sizes["N"])
        work = counted(manifest, graph, graph.profiles[-1])
        assert work.flops == pytest.approx(looked + steps, rel=1e-6)
        if name == "reduce":
            assert work.other_elements == steps / 2  # each is read once, for two FLOPs
            setting = plan_for(manifest=manifest)
            read_bytes = dict(setting.before)["reduce"].other_elements * setting.formats.bytes_per_element
            assert read_bytes == 4 * steps / 2  # in float32
        if name == "clip_text":
            assert work.products[0].rows == 8 * LENGTH
            assert work.products[0].weights == "layer"
    written = manifest.cost
    answer = prefill_flops(manifest, image_tokens=[written.num_visual], kept=(), num_text=written.num_text)
    assert answer == pytest.approx(sum(written.reduced_flops.values()), rel=1e-6)


def _steps(method: str, num_visual: int) -> int:
    """Return the sums over pairs inside the greedy loop, which no matrix product shows."""
    return 2 * NUM_KEEP * num_visual * (NUM_KEEP if method == "cdpruner" else num_visual)


@pytest.mark.parametrize("method", METHODS)
def test_tensorrt_builds_the_graphs_before_the_decoder(
    method: str, checkpoint: Path, clip: Clip, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="has wheels for x86-64 Linux only; runs in CI")
    bundle = open_bundle(bundle_of(method, checkpoint, clip))
    graphs = {"vision", "clip_text", "reduce"} if method == "eadp" else {"reduce"}
    assert build_here(bundle, tmp_path, graphs=graphs).keys() == graphs
