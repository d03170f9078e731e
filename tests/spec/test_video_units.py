"""A video is runs of the exported vision graph: its visual tokens and planes equal Hugging Face's for the whole video."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from tests.bundles import export
from tests.pictures import random_picture
from tests.qwen_checkpoints import CAMERA, PIXELS
from tests.spec.test_qwen_vl import KEEP_ALL, SAVE, load
from trio_edge.runtime.pipeline import Pipeline
from trio_edge.runtime.videos.qwen import Qwen3Videos, Qwen25Videos, VideoProcessing
from trio_edge.runtime.videos.reading import Video, open_video
from trio_edge.trio.selectors.interface import TokenInputs
from trio_edge.trio.selectors.tokens.evs import Evs

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


def sampling_of(family: str) -> Qwen25Videos | Qwen3Videos:
    if family == "qwen2_5_vl":
        return Qwen25Videos(tokens_per_second=2, **PIXELS)
    total = {name: 6 * pixels for name, pixels in PIXELS.items()}  # limits of all frames together
    return Qwen3Videos(**total, do_sample_frames=False)


def graph_outputs(pipeline: Pipeline, videos: VideoProcessing, video: Video) -> list[NDArray[np.float32]]:
    """Return tokens and planes of all units, [units * N, D] each."""
    vision, units = pipeline._level.vision, []
    for unit, layout in enumerate(videos.layouts(video)):
        spec = pipeline.manifest.graph("vision")
        profile = next(
            profile
            for profile in spec.profiles
            if all(profile.sizes[axis] >= size for axis, size in layout.sizes.items())
        )
        tensors = vision.run_vision(videos.prepare(video, unit, profile.sizes), profile)
        rows = [np.empty(tensor.shape, np.float32) for tensor in tensors]
        for host, tensor in zip(rows, tensors):
            vision._device.download(host, tensor)
        vision._device.synchronize()
        units.append([host[: layout.num_visual] for host in rows])
    return [np.concatenate(planes) for planes in zip(*units)]


@pytest.mark.parametrize("size", [CAMERA, (61, 59)], ids=str)
@pytest.mark.parametrize("family", SAVE)
def test_units_through_the_graph_equal_the_whole_video(
    family: str, size: tuple[int, int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder: Path = SAVE[family](tmp_path_factory.mktemp(family) / "ck")
    model: Any = load(folder)
    with Pipeline.from_bundle(export(folder, schedule=KEEP_ALL, image_sizes=(CAMERA,))) as pipeline:
        images: Any = pipeline.images
        videos = VideoProcessing(sampling_of(family), images)
        video = open_video([random_picture(*size, seed=index) for index in range(5)], videos.sampling)
        ours = graph_outputs(pipeline, videos, video)
        rows, columns = videos.grid(video)
        patches = []
        for unit in range(3):
            inputs = videos.prepare(video, unit)
            by_token = inputs["pixel_values"].reshape(rows * columns, 4, -1)
            patches.append(by_token[inputs["token_index"]].reshape(rows * columns * 4, -1))
    with torch.no_grad():
        theirs = model.model.get_video_features(
            torch.from_numpy(np.concatenate(patches)), torch.tensor([[3, 2 * rows, 2 * columns]])
        )
    planes = getattr(theirs, "deepstack_features", None) or ()
    expected = [
        torch.cat(list(parts)) for parts in (theirs.pooler_output, *planes)
    ]  # one part for each video
    assert len(ours) == len(expected)
    for found, wanted in zip(ours, expected):
        np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", SAVE)
def test_evs_keeps_what_changed_between_two_pairs_of_frames(
    family: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The graph's selection, given the tokens of the pair before, is its module's."""
    folder: Path = SAVE[family](tmp_path_factory.mktemp(family) / "ck")
    bundle = export(folder, schedule=KEEP_ALL, image_sizes=(CAMERA,), token_method="evs", token_keep=7)
    frames = [random_picture(*CAMERA, seed=1) for _ in range(4)]
    frames[3].paste(random_picture(70, 60, seed=5), (20, 20))  # a part of the second pair changes
    with Pipeline.from_bundle(bundle) as pipeline:
        images: Any = pipeline.images
        videos = VideoProcessing(sampling_of(family), images)
        video = open_video(frames, videos.sampling)
        before, after = np.split(graph_outputs(pipeline, videos, video)[0], 2)
        (layout, _), rows = videos.layouts(video), pipeline.manifest.graph("reduce").profiles[0].sizes["N"]
        padded = np.full((rows, before.shape[1]), np.nan, pipeline.manifest.dtype)
        padded[: len(before)] = before
        pipeline._level.vision.reduce_tokens(
            {
                "num_visual": np.array([layout.num_visual], np.int32),
                "is_newline": np.zeros(rows, np.int32),
                "previous_tokens": padded,
                "has_previous": np.ones(1, np.int32),
            },
            sizes={"N": rows},
        )
        pipeline._level.vision._device.synchronize()
        kept = pipeline._level.vision._kept["reduce"]
    inputs = TokenInputs(
        torch.from_numpy(after),
        torch.tensor([layout.num_visual], dtype=torch.int32),
        previous_ND=torch.from_numpy(before),
        has_previous=torch.ones(1, dtype=torch.int32),
    )
    np.testing.assert_array_equal(kept, Evs(num_keep=7)(inputs).kept_K)
    assert layout.taken(kept).boxes.shape == (7, 4)
