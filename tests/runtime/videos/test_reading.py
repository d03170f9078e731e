"""Reading videos: the frames that Hugging Face's PyAV decoder gives, and one line for whatever goes wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.video_utils import read_video_pyav

from tests.pictures import random_picture
from tests.videos import write_video
from trio_edge.runtime.bundle.errors import ImageError, install_command
from trio_edge.runtime.videos import reading
from trio_edge.runtime.videos.qwen import Qwen3Videos, Qwen25Videos
from trio_edge.runtime.videos.reading import Video, open_video

ALL = Qwen25Videos(tokens_per_second=2)
"""Takes all frames unless asked otherwise."""
TWO_PER_SECOND = Qwen3Videos()


def hugging_face(path: Path, video: Video) -> tuple[np.ndarray, Any]:
    """Return the frames that Hugging Face decodes for the same indices, and its metadata."""
    frames, metadata = read_video_pyav(str(path), lambda metadata: list(video.indices))
    return frames, metadata


def pixels(video: Video) -> np.ndarray:
    return np.stack([np.asarray(frame) for frame in video.frames])


@pytest.mark.parametrize("request_", [{}, {"fps": 2.0}, {"fps": 0.4}, {"num_frames": 2}], ids=str)
@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
@pytest.mark.parametrize("num_frames", [2, 3, 5, 37])
def test_frames_count_and_rate_equal_hugging_faces(
    num_frames: int, codec: str, request_: dict[str, Any], tmp_path: Path
) -> None:
    path = write_video(
        tmp_path / "clip.mp4", num_frames, codec=codec, fps=Fraction(30000, 1001), size=(50, 46)
    )
    video = open_video(path, ALL, **request_)
    frames, metadata = hugging_face(path, video)
    np.testing.assert_array_equal(pixels(video), frames)
    assert (video.total, video.fps) == (metadata.total_num_frames, metadata.fps) == (num_frames, 30000 / 1001)
    assert video.size == (50, 46)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".mov", ".ts"])
def test_frames_are_counted_in_every_container(suffix: str, tmp_path: Path) -> None:
    """Matroska's header has no count."""
    path = write_video(tmp_path / f"clip{suffix}", 7)
    video = open_video(str(path), ALL)
    assert (video.total, video.indices, video.fps) == (7, tuple(range(7)), 10.0)


def test_a_single_frame_is_a_video(tmp_path: Path) -> None:
    assert len(open_video(write_video(tmp_path / "clip.mp4", 1), ALL).frames) == 1


def test_frames_that_come_twice_are_decoded_once(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", 3, level_step=60)
    video = open_video(path, TWO_PER_SECOND, num_frames=5)
    assert video.indices == (0, 0, 1, 2, 2)
    assert video.frames[0] is video.frames[1]
    assert [round(float(np.mean(frame)) / 60) for frame in video.frames] == [0, 0, 1, 2, 2]


def test_a_phones_rotation_is_applied(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", 2, size=(64, 32))
    upright, data = open_video(path, ALL), bytearray(path.read_bytes())
    matrix = data.find(b"tkhd") + 44  # of the track's header, version 0
    one = 1 << 16
    turned = (0, one, 0, -one, 0, 0, 0, 0, 1 << 30)  # a quarter clockwise
    data[matrix : matrix + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in turned)
    path.write_bytes(data)
    video = open_video(path, ALL)
    assert video.size == (32, 64)
    np.testing.assert_array_equal(pixels(video), np.rot90(pixels(upright), -1, axes=(1, 2)))


def test_a_folder_is_read_in_natural_order(tmp_path: Path) -> None:
    for index in range(12):
        Image.new("RGB", (8, 6), (index, 0, 0)).save(tmp_path / f"frame{index}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    (tmp_path / ".hidden.png").write_text("no frame")
    video = open_video(tmp_path, ALL, source_fps=5.0)
    assert [frame.getpixel((0, 0))[0] for frame in video.frames] == list(range(12))  # type: ignore[index]
    assert (video.total, video.fps) == (12, 5.0)


def test_images_in_memory_are_a_video_of_unknown_rate() -> None:
    frames = [random_picture(9, 7, seed=index) for index in range(24)]
    video = open_video(frames, TWO_PER_SECOND)
    assert video.fps is None
    assert video.indices == (0, 8, 15, 23)  # as if it had 24 frames per second
    np.testing.assert_array_equal(pixels(video)[1], np.asarray(frames[8]))


def test_only_sampled_frames_of_a_folder_are_decoded(tmp_path: Path) -> None:
    for index in (0, 2):
        random_picture(8, 6).save(tmp_path / f"{index}.png")
    (tmp_path / "1.png").write_text("damaged")
    assert open_video(tmp_path, Qwen3Videos(), num_frames=2).indices == (0, 2)


def cut(path: Path, share: float) -> Path:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    return path


def fast_start(path: Path) -> Path:
    """Move an MP4's index to its front, so that a part of the file can still be opened."""
    import av

    moved = path.with_name("moved.mp4")
    with av.open(str(path)) as source, av.open(str(moved), "w", options={"movflags": "faststart"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    return moved


def test_a_file_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    for suffix in (".mkv", ".avi"):
        with pytest.raises(
            ImageError, match=r"expected \d.\d seconds \(its header\), got \d.\d with \d+ frames"
        ):
            open_video(cut(write_video(tmp_path / f"cut{suffix}", 30), 0.5), ALL)
    moved = fast_start(write_video(tmp_path / "clip.mp4", 30))
    with pytest.raises(ImageError, match=r"truncated or damaged|the file is damaged"):
        open_video(cut(moved, 0.5), ALL)
    with pytest.raises(ImageError, match=r"the file is damaged|without moving pictures"):
        open_video(cut(write_video(tmp_path / "end.mp4", 30), 0.5), ALL)


def test_damaged_bytes_are_one_line(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mkv", 30)
    data = bytearray(path.read_bytes())
    for start in range(600, len(data) - 40, 97):
        data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    with pytest.raises(ImageError, match=r"^video .*(damaged|cut short)[^\n]*$"):
        open_video(path, ALL)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".ts"])
def test_any_damaged_byte_is_one_line_or_harmless(suffix: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    path = write_video(tmp_path / f"clip{suffix}", 8)
    data, num_refused = path.read_bytes(), 0
    for _ in range(60):
        damaged = bytearray(data[: rng.integers(len(data) // 2, len(data) + 1)])
        for place in rng.integers(len(damaged), size=20):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            open_video(path, ALL)
        except ImageError as error:
            assert "\n" not in str(error)
            num_refused += 1
    assert num_refused > 0


def test_what_is_no_video_is_refused(tmp_path: Path) -> None:
    picture, text, empty = tmp_path / "cat.png", tmp_path / "cat.txt", tmp_path / "cat.mp4"
    random_picture(8, 6).save(picture)
    text.write_text("hello\n" * 100)
    empty.write_bytes(b"")
    playlist = tmp_path / "list.m3u8"
    playlist.write_text(f"#EXTM3U\n#EXTINF:1,\n{picture}\n")
    for path in (picture, text, empty, playlist):
        with pytest.raises(ImageError, match=r"^video '.*': expected a (readable )?video, got [^\n]*$"):
            open_video(path, ALL)


def test_sound_without_pictures_is_no_video(tmp_path: Path) -> None:
    for name in ("sound.wav", "sound.mka"):
        write_sound(tmp_path / name)
    with pytest.raises(ImageError, match="expected a video, got a file without moving pictures"):
        open_video(tmp_path / "sound.mka", ALL)
    with pytest.raises(ImageError, match="the file is damaged or of another kind; convert it to MP4"):
        open_video(tmp_path / "sound.wav", ALL)


def write_sound(path: Path) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))


LISTS = {
    "m3u8": "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{other}\n#EXT-X-ENDLIST\n",
    "ffconcat": "ffconcat version 1.0\nfile {other}\n",
    "mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period><AdaptationSet>'
    "<Representation><BaseURL>{other}</BaseURL></Representation></AdaptationSet></Period></MPD>",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
}
READS = "import sys; from trio_edge.runtime.videos.reading import open_video; open_video(sys.argv[1], None)"


@pytest.mark.parametrize("kind", LISTS)
@pytest.mark.parametrize("suffix", ["", ".mp4"])
def test_a_list_opens_no_file_that_it_names(suffix: str, kind: str, tmp_path: Path) -> None:
    """Here a pipe, which nobody writes to: a process that opens it waits forever."""
    os.mkfifo(tmp_path / "other.ts")
    path = tmp_path / f"list.{kind}{suffix}"
    path.write_text(LISTS[kind].format(other="other.ts"))
    result = subprocess.run(
        [sys.executable, "-c", READS, str(path)], capture_output=True, text=True, check=False, timeout=300
    )
    assert re.search(r"ImageError: video '.*': expected a readable video, got [^\n]*$", result.stderr.strip())


def test_a_pipe_is_no_video(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(ImageError, match="expected a regular file, got a device or pipe"):
        open_video(tmp_path / "pipe.mp4", ALL)


def test_a_rate_whose_times_are_no_positions_is_refused() -> None:
    frames = [random_picture(8, 6)] * 20
    video = open_video(frames, ALL, source_fps=1e-6)
    with pytest.raises(ImageError, match="expected a time below position 16777216, got 36000000 at 1e-06"):
        ALL.times(video.indices, video.total, video.fps)


def test_a_file_without_frames_is_refused(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.avi", 30)
    data = path.read_bytes()
    path.write_bytes(data[: data.find(b"movi") + 4])
    with pytest.raises(ImageError, match=r"got 0.0 with 0 frames; the file is truncated or damaged"):
        open_video(path, ALL)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("none.mp4", "expected an existing file, found none"),
        ("rtsp://camera/1", "expected a local file, got a URL"),
        ("https://example.com/a.mp4", "expected a local file, got a URL"),
        ("/dev/null", "expected a regular file, got a device or pipe"),
        ("a\0b.mp4", "expected an existing file|expected a readable file"),
        (b"bytes", "expected a path or a list of images, got bytes"),
        ([], "expected at least one image, got none"),
        (["none.png"], "expected an existing file, found none"),
    ],
)
def test_a_missing_or_foreign_source_is_one_line(source: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        open_video(source, ALL)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="expected at least one image, got none"):
        open_video(tmp_path, ALL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fps": 0}, "^fps: expected frames per second from 1e-06 to 1000000.0, got 0;"),
        ({"fps": float("nan")}, "fps: expected frames per second from 1e-06 to 1000000.0, got nan"),
        ({"source_fps": 0.0}, "source_fps: expected frames per second from 1e-06 to 1000000.0, got 0.0"),
        ({"fps": 1e300, "source_fps": 1e-300}, "^fps: expected frames per second from 1e-06"),
        ({"fps": 10**400}, "^fps: expected frames per second from 1e-06"),
        ({"num_frames": 0}, r"num_frames: expected 1\.\.4096, got 0"),
        ({"num_frames": 10**400}, r"num_frames: expected 1\.\.4096, got 10{79};"),
        ({"num_frames": 2, "fps": 1.0}, "expected fps or num_frames, got both"),
        ({"num_frames": 5000}, r"num_frames: expected 1\.\.4096, got 5000"),
    ],
)
def test_an_impossible_request_is_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ImageError, match=message):
        open_video([random_picture(8, 6)] * 3, TWO_PER_SECOND, **arguments)


def test_a_file_has_its_own_rate(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="source_fps: expected none with a video file"):
        open_video(write_video(tmp_path / "clip.mp4", 2), ALL, source_fps=3.0)


def test_frames_of_different_sizes_are_refused() -> None:
    with pytest.raises(ImageError, match="expected frames of one size, got 8x6 and 6x8"):
        open_video([random_picture(8, 6), random_picture(6, 8)], ALL)


def test_too_many_pixels_are_refused_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "clip.mp4", 5)
    monkeypatch.setattr(reading, "MAX_VIDEO_PIXELS", 4 * 64 * 48)
    with pytest.raises(ImageError, match="pixels in all frames, got 5 frames of 64x48; take fewer with fps"):
        open_video(path, ALL)
    assert len(open_video(path, ALL, num_frames=4).frames) == 4


def test_without_pyav_one_line_says_what_to_install(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", 2)
    code = (
        "import sys; sys.modules['av'] = None\n"
        "from trio_edge.runtime.bundle.errors import ImageError\n"
        "from trio_edge.runtime.videos.qwen import Qwen3Videos\n"
        "from trio_edge.runtime.videos.reading import open_video\n"
        "try: open_video(sys.argv[1], Qwen3Videos())\n"
        "except ImageError as error: print(error)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    assert (
        result.stdout == f"video: expected PyAV to be installed, it is not; run {install_command('video')}\n"
    )
