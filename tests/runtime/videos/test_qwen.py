"""Videos of Qwen2.5-VL and Qwen3-VL: the same frames, sizes, patches, times and texts as Hugging Face."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel, Qwen3VLConfig, Qwen3VLModel
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

from tests.pictures import random_picture
from tests.torchvision_reference import TorchvisionReference
from tests.video_reference import CONFIGS, PROMPT, VIDEO_CASES, VideoCase
from trio_edge.runtime.bundle.errors import CheckpointError, ImageError, ManifestError
from trio_edge.runtime.images.qwen import Qwen3Images, QwenImages
from trio_edge.runtime.videos.qwen import Qwen3Videos, Qwen25Videos, VideoProcessing, video_processing
from trio_edge.runtime.videos.reading import Video, open_video

EXACT = {"rtol": 0, "atol": 3e-7}
"""Both divide in float32; torch may use the reciprocal."""
TOKENS_PER_SECOND = 2
ANY_SIZE = 2**40
NO_LIMITS = {"min_pixels": 1, "max_pixels": ANY_SIZE}


def images_of(config: str) -> QwenImages | Qwen3Images:
    """Return the processing of images of any size with the patches of a video processor."""
    side = CONFIGS[config].get("patch_size", 14 if "Qwen2.5" in config else 16)
    if "Qwen2.5" in config:
        return QwenImages(patch_size=side, window_size=8 * side, **NO_LIMITS)
    return Qwen3Images(patch_size=side, table_size=7, **NO_LIMITS)


def constants_of(config: str, values: dict[str, Any]) -> Qwen25Videos | Qwen3Videos:
    images = images_of(config)
    if "Qwen2.5" in config:
        return Qwen25Videos.from_preprocessor_config(
            values, images=images, tokens_per_second=TOKENS_PER_SECOND
        )
    return Qwen3Videos.from_preprocessor_config(values, images=images)


def processing_of(config: str) -> VideoProcessing:
    return VideoProcessing(constants_of(config, CONFIGS[config]), images_of(config))


def opened(case: VideoCase, processing: VideoProcessing) -> Video:
    return open_video(case.frames(), processing.sampling, source_fps=case.fps, **case.request)  # type: ignore[arg-type]


def still(num_frames: int, width: int = 40, height: int = 30, *, fps: float | None = 10.0) -> Video:
    frame = random_picture(width, height)
    return Video(frames=(frame,) * num_frames, indices=tuple(range(num_frames)), total=num_frames, fps=fps)


@pytest.mark.parametrize("config", CONFIGS)
def test_sampled_frames_equal_hugging_faces(config: str, torchvision_reference: TorchvisionReference) -> None:
    sampling = processing_of(config).sampling
    for (total, video_fps, request), theirs in torchvision_reference.samplings(config):
        asked: dict[str, Any] = {"fps": None, "num_frames": None, **request}
        if theirs is None:
            with pytest.raises(ImageError, match="frames to take, got a video of"):
                sampling.indices(total, video_fps, **asked)
            continue
        ours = sampling.indices(total, video_fps, **asked)
        # torch.arange may give one frame too many, and Hugging Face then reads beyond the video
        assert ours == [index for index in theirs if index < total], (total, video_fps, request)


@pytest.mark.parametrize("name", VIDEO_CASES)
def test_patches_texts_and_times_equal_hugging_faces(
    name: str, torchvision_reference: TorchvisionReference
) -> None:
    case, theirs = VIDEO_CASES[name], torchvision_reference.video(name)
    processing = processing_of(case.config)
    video = opened(case, processing)
    layouts = processing.layouts(video)
    assert list(video.indices) == theirs["indices"].tolist()
    (units, rows, columns) = theirs["video_grid_thw"][0].tolist()
    assert len(layouts) == units
    assert processing.grid(video) == (rows // 2, columns // 2)
    patches = []
    for unit, layout in enumerate(layouts):
        inputs = processing.prepare(video, unit)
        by_token = inputs["pixel_values"].reshape(layout.sizes["N"], 4, -1)
        patches.append(by_token[inputs["token_index"]].reshape(layout.sizes["P"], -1))
    np.testing.assert_allclose(np.concatenate(patches), theirs["pixel_values_videos"], **EXACT)
    texts = (before + "<|video_pad|>" * rows_N + after for (before, after), rows_N in _runs(layouts))
    assert PROMPT.replace("<|video_pad|>", "".join(texts)) == str(theirs["prompt"])
    if "second_per_grid_ts" in theirs:
        interval = torch.tensor(theirs["second_per_grid_ts"])[0] * TOKENS_PER_SECOND
        times = [layout.positions[0, 0] for layout in layouts if layout.positions is not None]
        assert times == (torch.arange(units) * interval).long().tolist()


def _runs(layouts: Any) -> list[tuple[tuple[str, str], int]]:
    return [(layout.text, layout.num_visual) for layout in layouts]


@settings(max_examples=300)
@given(st.integers(2, 60), st.integers(1, 4000), st.integers(1, 4000), st.booleans())
@example(5, 31, 31, True)
@example(2, 1, 200, False)
def test_grids_equal_qwen3_vls_for_any_size(num_frames: int, width: int, height: int, is_small: bool) -> None:
    limits = {"min_pixels": 4096, "max_pixels": 90 * 1024} if is_small else {"max_pixels": 25_165_824}
    ours = Qwen3Videos(**limits)
    try:
        theirs = smart_resize(
            num_frames, height, width, factor=32, min_pixels=ours.min_pixels, max_pixels=ours.max_pixels
        )
    except ValueError:
        with pytest.raises(ImageError, match="aspect ratio of at most 200"):
            ours.grid(num_frames, width, height, size=32)
        return
    assert ours.grid(num_frames, width, height, size=32) == (theirs[0] // 32, theirs[1] // 32)


VISION = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 14,
}
TEXT = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 100,
    "num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
}  # fmt: skip


def model_of(family: str) -> Any:
    torch.manual_seed(3)
    if family == "Qwen2.5-VL":
        vision = {
            **VISION,
            "window_size": 56,
            "fullatt_block_indexes": [1],
            "tokens_per_second": TOKENS_PER_SECOND,
        }
        return Qwen2_5_VLModel(Qwen2_5_VLConfig(text_config=TEXT, vision_config=vision)).eval()
    vision = {**VISION, "num_position_embeddings": 25, "deepstack_visual_indexes": [0, 1]}
    return Qwen3VLModel(Qwen3VLConfig(text_config=TEXT, vision_config=vision)).eval()


@pytest.mark.parametrize("family", ["Qwen2.5-VL", "Qwen3-VL"])
def test_hugging_faces_encoders_see_one_pair_of_frames_at_a_time(family: str) -> None:
    """The ground on which a video is several runs of the vision graph."""
    visual = model_of(family).visual
    grid = torch.tensor([[3, 10, 6]])
    patches = torch.randn(3 * 60, 3 * 2 * 14 * 14)
    with torch.no_grad():
        whole = visual(patches, grid_thw=grid)
        parts = [visual(part, grid_thw=torch.tensor([[1, 10, 6]])) for part in patches.split(60)]
    expected = torch.cat([part.pooler_output for part in parts])
    torch.testing.assert_close(whole.pooler_output, expected, rtol=1e-4, atol=1e-5)
    for plane, planes in enumerate(getattr(whole, "deepstack_features", ()) or ()):
        expected = torch.cat([part.deepstack_features[plane] for part in parts])
        torch.testing.assert_close(planes, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_frames", [2, 5, 37])
@pytest.mark.parametrize("fps", [0.7, 12.0])
@pytest.mark.parametrize("family", ["Qwen2.5-VL", "Qwen3-VL"])
def test_positions_equal_the_models(family: str, fps: float, num_frames: int) -> None:
    """A prompt of 3 words before the video and 4 after it, put together from the layouts as a pipeline does."""
    processing, model = processing_of(f"{family} small"), model_of(family)
    video = still(num_frames, fps=fps)
    layouts, (rows, columns) = processing.layouts(video), processing.grid(video)
    words = 3 if family == "Qwen3-VL" else 0  # tokens that stand for the text of a unit
    types, ours, start = [0] * 3, [np.tile(np.arange(3), (3, 1))], 3
    for layout in layouts:
        assert layout.positions is not None
        types += [0] * words + [2] * layout.num_visual
        ours += [start + np.tile(np.arange(words), (3, 1)), start + words + layout.positions]
        start += words + layout.position_span
    ours.append(start + np.tile(np.arange(4), (3, 1)))
    theirs, delta = model.get_rope_index(
        torch.zeros(1, len(types) + 4, dtype=torch.long),
        mm_token_type_ids=torch.tensor([types + [0] * 4]),
        video_grid_thw=torch.tensor([[len(layouts), 2 * rows, 2 * columns]]),
        second_per_grid_ts=torch.tensor([2 / fps]),
    )
    np.testing.assert_array_equal(np.concatenate(ours, axis=1), theirs[:, 0])
    assert np.concatenate(ours, axis=1).max() + 1 == delta.item() + len(types) + 4  # where the answer goes on


@pytest.mark.parametrize("config", CONFIGS)
def test_constants_of_a_loaded_processor_are_those_of_its_file(
    config: str, torchvision_reference: TorchvisionReference
) -> None:
    constants = torchvision_reference.video_constants(config)
    assert constants_of(config, constants) == constants_of(config, CONFIGS[config])


@pytest.mark.parametrize("config", ["Qwen2.5-VL small", "Qwen3-VL capped"])
def test_constants_survive_the_manifest(config: str) -> None:
    processing, images = processing_of(config), images_of(config)
    again = video_processing(processing.sampling.to_dict(), images=images)
    assert again.sampling == processing.sampling


def test_a_checkpoint_without_a_file_for_videos_takes_the_images_constants() -> None:
    """As transformers does: a released Qwen2.5-VL has preprocessor_config.json alone."""
    file = {
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "image_processor_type": "Qwen2VLImageProcessor",
        "merge_size": 2,
    }
    ours = constants_of("Qwen2.5-VL", file)
    assert (ours.min_pixels, ours.max_pixels, ours.max_frames) == (3136, 12845056, 768)


@pytest.mark.parametrize(
    ("config", "changed", "message"),
    [
        ("Qwen2.5-VL", {"video_processor_type": "Qwen3VLVideoProcessor"}, "expected Qwen2VLVideoProcessor, got 'Qwen3VL"),
        ("Qwen3-VL", {"do_resize": False}, "do_resize: expected true, got false"),
        ("Qwen3-VL", {"do_convert_rgb": False}, "do_convert_rgb: expected true, got false"),
        ("Qwen3-VL", {"patch_size": 14}, r"patch_size: expected 16 \(the image processor's\), got 14"),
        ("Qwen3-VL", {"temporal_patch_size": 4}, "temporal_patch_size: expected 2"),
        ("Qwen3-VL", {"size": {"height": 3, "width": 3}}, "size: expected areas 'shortest_edge' and 'longest_edge'"),
        ("Qwen3-VL", {"size": {"shortest_edge": 5}}, "size: expected areas"),
        ("Qwen2.5-VL", {"min_pixels": 1_000_000}, "min_pixels: expected <= max_pixels 602112, got 1000000"),
        ("Qwen3-VL", {"max_frames": 3}, "min_frames: expected <= max_frames 3, got 4"),
        ("Qwen3-VL", {"resample": 4}, "preprocessor_config resample: expected one of"),
        ("Qwen3-VL", {"fps": -1}, "video_preprocessor_config: expected values that trio-edge can follow"),
        ("Qwen3-VL", {"image_mean": 0.5}, "video_preprocessor_config: expected values that trio-edge can follow"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_followed_are_refused_by_name(
    config: str, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        constants_of(config, {**CONFIGS[config], **changed})


def test_unknown_and_foreign_constants_are_refused() -> None:
    values = processing_of("Qwen3-VL").sampling.to_dict()
    with pytest.raises(ManifestError, match="video_processing: Object contains unknown field `colour`"):
        video_processing({**values, "colour": 1}, images=images_of("Qwen3-VL"))
    with pytest.raises(ManifestError, match="expected 'frames_at_positions' or 'frames_after_timestamps'"):
        video_processing(values, images=images_of("Qwen2.5-VL"))
    with pytest.raises(ManifestError, match="expected patches of 2 frames, got 3"):
        video_processing(values, images=Qwen3Images(patch_size=16, table_size=7, temporal_patch_size=3))


@pytest.mark.parametrize("config", ["Qwen2.5-VL", "Qwen3-VL"])
def test_frames_have_no_more_tokens_than_the_graph_takes(config: str) -> None:
    import msgspec

    images = msgspec.structs.replace(images_of(config), max_pixels=20 * images_of(config).token_size ** 2)
    processing = VideoProcessing(processing_of(config).sampling, images)
    video = still(4, 640, 480)
    assert processing.grid(video) == images.token_grid(640, 480) == (3, 5)
    sizes = images.any_image_sizes()[0]
    for unit, layout in enumerate(processing.layouts(video)):
        assert all(layout.sizes[axis] <= sizes[axis] for axis in sizes)
        inputs = processing.prepare(video, unit, sizes)
        assert len(inputs["pixel_values"]) == sizes["P"]
        assert len(inputs["token_index"]) == sizes["N"]


def test_a_pair_of_equal_frames_has_an_images_patches() -> None:
    images = QwenImages(patch_size=14, window_size=56, min_pixels=4 * 784, max_pixels=20 * 784)
    sampling = Qwen25Videos(tokens_per_second=2, min_pixels=4 * 784, max_pixels=20 * 784)
    video = still(3, 90, 50)
    for unit in range(2):
        inputs = VideoProcessing(sampling, images).prepare(video, unit)
        expected = images.prepare(video.frames[0])
        assert inputs.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_array_equal(inputs[name], values)


def test_one_frame_alone_is_a_video_of_qwen2_5_vl_only() -> None:
    assert len(processing_of("Qwen2.5-VL").layouts(still(1))) == 1
    with pytest.raises(ImageError, match="expected at least 2 frames, got 1; ask about it as an image"):
        processing_of("Qwen3-VL").layouts(still(1))


@pytest.mark.parametrize("config", ["Qwen2.5-VL", "Qwen3-VL"])
def test_thin_frames_are_refused(config: str) -> None:
    video = Video(frames=(Image.new("RGB", (500, 2)),) * 2, indices=(0, 1), total=2, fps=1.0)
    with pytest.raises(ImageError, match="aspect ratio of at most 200"):
        processing_of(config).layouts(video)


def test_sampling_by_rate_needs_the_videos_rate_with_qwen2_5_vl() -> None:
    with pytest.raises(ImageError, match="its frames per second to sample by fps, got none; give source_fps"):
        processing_of("Qwen2.5-VL").sampling.indices(9, None, fps=2.0, num_frames=None)


def test_the_class_own_numbers_are_used_where_nobody_asks() -> None:
    own = {**CONFIGS["Qwen2.5-VL"], "do_sample_frames": True, "num_frames": 4}
    assert constants_of("Qwen2.5-VL", own).indices(8, 10.0, fps=None, num_frames=None) == [0, 2, 4, 6]
    every = constants_of("Qwen3-VL", {**CONFIGS["Qwen3-VL"], "fps": None, "max_frames": 5})
    assert every.indices(9, 10.0, fps=None, num_frames=None) == [0, 2, 4, 6, 8]
