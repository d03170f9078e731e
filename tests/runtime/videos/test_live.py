"""Frames of cameras, streams, files and folders: all or the newest, again after a loss, and one line for what cannot be opened."""

from __future__ import annotations

import itertools
import os
import threading
from pathlib import Path
from queue import Queue
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from tests.camera_server import gray_part, serving
from tests.rtsp_server import rtsp_serving
from tests.runtime.videos.test_reading import LISTS, write_sound
from tests.videos import write_video
from trio_edge.runtime.bundle.errors import ImageError
from trio_edge.runtime.videos import live
from trio_edge.runtime.videos.live import Frame, put_newest, read_frames

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

STEP = 8
NUM_FRAMES = 12
EACH = 6
"""Frames of a connection."""


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(live, "_SECONDS_TO_LOOK", 0.01)


def gray_level(frame: Frame) -> int:
    """Return the number of the frame that was drawn, from its gray level."""
    return round(float(np.mean(np.asarray(frame.image()))) / STEP)


def folder_of_images(folder: Path) -> Path:
    folder.mkdir()
    for index in range(NUM_FRAMES):
        Image.new("RGB", (8, 6), (index * STEP,) * 3).save(folder / f"frame{index}.png")
    (folder / "notes.txt").write_text("no frame")
    return folder


FILES: dict[str, Callable[[Path], Path]] = {
    "folder": lambda tmp: folder_of_images(tmp / "frames"),
    **{
        suffix: lambda tmp, suffix=suffix: write_video(tmp / f"clip{suffix}", NUM_FRAMES, level_step=STEP)
        for suffix in (".mp4", ".mkv", ".avi", ".ts")
    },
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_or_folder_gives_every_frame_in_order(kind: str, tmp_path: Path) -> None:
    source = FILES[kind](tmp_path)
    frames = list(read_frames(str(source)))
    assert [frame.number for frame in frames] == list(range(NUM_FRAMES))
    assert [gray_level(frame) for frame in frames] == list(range(NUM_FRAMES))
    names = [str(source / f"frame{index}.png") for index in range(NUM_FRAMES)]
    assert [frame.source for frame in frames] == (names if kind == "folder" else [str(source)] * NUM_FRAMES)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".ts"])
def test_a_live_file_plays_at_its_speed_and_keeps_its_numbers(suffix: str, tmp_path: Path) -> None:
    clip = write_video(tmp_path / f"clip{suffix}", NUM_FRAMES, fps=30, level_step=STEP)
    frames = list(read_frames(str(clip), live=True))
    numbers = [frame.number for frame in frames]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == NUM_FRAMES - 1
    assert [gray_level(frame) for frame in frames] == numbers


def test_a_slow_reader_gets_the_newest_frame_and_no_queue() -> None:
    are_read = threading.Event()

    def frames() -> Iterator[Frame]:
        for number in range(100):
            yield Frame(number, 0.0, "", Image.new)  # type: ignore[arg-type]
        are_read.set()

    newest = live._newest(frames(), threading.Event(), lambda: None)
    first = next(newest)
    assert are_read.wait(60)
    assert [frame.number for frame in newest] == ([99] if first.number < 99 else [])


def test_a_live_folder_gives_the_newest_image_when_it_is_whole(tmp_path: Path) -> None:
    folder = folder_of_images(tmp_path / "frames")
    for index in range(NUM_FRAMES):
        os.utime(folder / f"frame{index}.png", ns=(index, index))
    frames = read_frames(str(folder), live=True)
    assert gray_level(next(frames)) == NUM_FRAMES - 1
    whole = (folder / "frame3.png").read_bytes()
    (folder / "frame99.png").write_bytes(whole[: len(whole) // 2])  # a camera is writing it
    timer = threading.Timer(0.2, (folder / "frame99.png").write_bytes, [whole])
    timer.start()
    frame = next(frames)
    assert (frame.number, frame.source, gray_level(frame)) == (1, str(folder / "frame99.png"), 3)
    frames.close()  # type: ignore[attr-defined]


def test_a_live_folder_may_be_empty_at_first_and_lose_its_images(tmp_path: Path) -> None:
    frames = read_frames(str(tmp_path), live=True)
    image = Image.new("RGB", (8, 6), (STEP,) * 3)
    threading.Timer(0.1, image.save, [tmp_path / "first.png"]).start()
    assert gray_level(next(frames)) == 1
    (tmp_path / "first.png").unlink()
    threading.Timer(0.1, image.save, [tmp_path / "second.png"]).start()
    assert next(frames).source == str(tmp_path / "second.png")
    frames.close()  # type: ignore[attr-defined]


def parts(connection: int) -> list[bytes]:
    """Return the frames of a connection, whose gray levels go on; FFmpeg gives none of fewer than five."""
    first = EACH * connection
    return [gray_part((first + index) % 30 * STEP) for index in range(EACH)]


def test_a_camera_that_goes_away_is_opened_again(tmp_path: Path) -> None:
    notes: list[str] = []
    with serving(parts) as server:
        frames = read_frames(server.address, note=notes.append)
        seen = list(itertools.takewhile(lambda frame: frame.number < 4 * EACH, frames))
    numbers = [frame.number for frame in seen]
    assert numbers == sorted(set(numbers))
    assert all(gray_level(frame) == frame.number % 30 for frame in seen)
    assert len(server.paths) >= 5
    lost, back = notes[:2]
    assert lost.startswith(f"source '{server.address}': ")
    assert lost.endswith("; opening it again until it is back")
    assert back == f"source '{server.address}': is back"
    assert all("\n" not in note for note in notes)


def test_a_loss_is_told_once_and_waits_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    notes, waits = [], []

    class Closed(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout)
            if len(waits) == 6:
                server.status = 200
            return super().wait(0.001)

    with serving(parts) as server:
        frames = live._camera(server.address, live._OPTIONS["http"], Closed(), notes.append)
        list(itertools.islice(frames, EACH))
        server.status = 503
        assert next(frames).number == EACH
    assert waits == [0.01, 0.02, 0.04, 0.08, 0.16, 0.32]
    assert len(notes) == 2


def test_the_longest_wait_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "LONGEST_WAIT", 0.05)
    waits: list[float | None] = []

    class Closed(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout)
            return self.is_set() or (len(waits) == 5 and self.set() is None)

    with serving(parts) as server:
        frames = live._camera(server.address, live._OPTIONS["http"], Closed(), lambda _note: None)
        list(itertools.islice(frames, EACH))
        server.status = 503
        assert list(frames) == []
    assert waits == [0.01, 0.02, 0.04, 0.05, 0.05]


def test_a_camera_that_falls_silent_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "SECONDS_WITHOUT_DATA", 0.5)
    notes: list[str] = []
    told = threading.Event()

    def note(text: str) -> None:
        notes.append(text)
        told.set()

    with serving(parts) as server:
        server.holds = True
        frames = read_frames(server.address, note=note)
        next(frames)
        assert told.wait(60)
        frames.close()  # type: ignore[attr-defined]
    assert notes[0] == (
        f"source '{server.address}': expected frames of a video, got nothing for 0.5 seconds; check the source; opening it again"
        " until it is back"
    )


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts", ".avi"])
def test_a_video_at_an_address_is_a_camera(suffix: str, tmp_path: Path) -> None:
    data = write_video(tmp_path / f"clip{suffix}", NUM_FRAMES, level_step=STEP).read_bytes()
    with serving(lambda _connection: [data], content_type="application/octet-stream") as server:
        server.headers["Content-Length"] = str(len(data))
        frames = read_frames(server.address)
        frame = next(frames)
        assert gray_level(frame) == frame.number
        later = next(frame for frame in frames if frame.number >= NUM_FRAMES)  # of a second connection
        assert gray_level(later) == later.number % NUM_FRAMES
        frames.close()  # type: ignore[attr-defined]


def test_a_camera_with_rtsp_is_read_and_opened_again(tmp_path: Path) -> None:
    """Its last frame is lost, because MPEG-TS does not say where it ends."""
    data = write_video(tmp_path / "clip.ts", NUM_FRAMES, level_step=STEP).read_bytes()
    notes: list[str] = []
    with rtsp_serving(lambda _connection: data) as server:
        frames = list(live._pictures(server.address, live._OPTIONS["rtsp"]))
        assert [gray_level(frame) for frame in frames] == list(range(NUM_FRAMES - 1))
        newest = read_frames(server.address, note=notes.append)
        later = next(frame for frame in newest if frame.number >= 2 * NUM_FRAMES)
        assert later.source == server.address
        newest.close()  # type: ignore[attr-defined]
    assert server.num_connections >= 4
    assert notes[1] == f"source '{server.address}': is back"


def test_a_file_in_memory_is_no_device(tmp_path: Path) -> None:
    with pytest.raises(
        ImageError, match=r"^video '/dev/shm/none.mp4': expected an existing file, found none"
    ):
        read_frames("/dev/shm/none.mp4")


def test_closing_ends_the_thread(tmp_path: Path) -> None:
    clip = write_video(tmp_path / "clip.mp4", 600, fps=1)
    for source in (str(clip), str(folder_of_images(tmp_path / "frames"))):
        frames = read_frames(source, live=True)
        next(frames)
        (thread,) = (thread for thread in threading.enumerate() if thread.name == "frames")
        frames.close()  # type: ignore[attr-defined]
        assert not thread.is_alive()


def test_a_queue_for_one_holds_the_newest() -> None:
    waiting: Queue[int] = Queue(1)
    for item in range(5):
        put_newest(waiting, item)
    assert (waiting.get_nowait(), waiting.empty()) == (4, True)


def test_what_cannot_be_decoded_is_skipped_by_a_camera_and_ends_a_file(tmp_path: Path) -> None:
    good, bad = gray_part(3 * STEP), gray_part(0)
    start = bad.index(b"\xff\xd8")
    bad = bad[:start] + b"\0" * (len(bad) - start - 2) + bad[-2:]
    with serving(lambda _connection: [good, good, good, bad, good, good]) as server:
        frames = read_frames(server.address)
        assert {gray_level(next(frames)) for _ in range(3)} == {3}
        frames.close()  # type: ignore[attr-defined]
    clip = write_video(tmp_path / "clip.avi", 8)
    data = clip.read_bytes()
    clip.write_bytes(data[: len(data) // 2] + os.urandom(40) * 200)
    assert_one_line(lambda: list(read_frames(str(clip))), allow_frames=True)


def assert_one_line(read: Callable[[], object], *, allow_frames: bool = False) -> None:
    try:
        read()
    except ImageError as error:
        assert "\n" not in str(error)
    else:
        assert allow_frames


BAD: dict[str, tuple[Callable[[Path], str], str]] = {
    "missing": (lambda tmp: str(tmp / "none.mp4"), "expected an existing file, found none"),
    "pipe": (lambda tmp: made(os.mkfifo, tmp / "pipe.mp4"), "expected a regular file, got a device or pipe"),
    "device": (lambda tmp: "/dev/null", "source '/dev/null': expected frames of a video, got "),
    "camera": (lambda tmp: "/dev/video99", "expected frames of a video, got "),
    "camera by number": (lambda tmp: "99", "source '/dev/video99': expected frames of a video, got "),
    "empty folder": (str, "expected images, got none"),
    "empty file": (lambda tmp: made(Path.touch, tmp / "a.mp4"), "expected frames of a video, got "),
    "text": (lambda tmp: made(write_text, tmp / "a.mp4"), "expected frames of a video, got "),
    "sound": (lambda tmp: made(write_sound, tmp / "a.mka"), "expected a video, got a file without moving"),
    "no camera there": (lambda tmp: "rtsp://127.0.0.1:9/1", "got ConnectionRefusedError"),
    "no server there": (lambda tmp: "http://127.0.0.1:9/1", "got ConnectionRefusedError"),
    "another protocol": (lambda tmp: "ftp://127.0.0.1:9/1", "expected a local file, got a URL"),
    "file address": (lambda tmp: "file:///etc/passwd", "expected a local file, got a URL"),
    "data address": (lambda tmp: "data:video/mp4;base64,AAAA", "expected a local file, got a URL"),
    "concat": (lambda tmp: "concat:a.ts|b.ts", "expected an existing file"),
    "null byte": (lambda tmp: "a\0b", "expected "),
    "long name": (lambda tmp: "x" * 5000, "expected "),
    "empty name": (lambda tmp: "", "expected "),
}


def made(make: Callable[[Path], object], path: Path) -> str:
    make(path)
    return str(path)


def write_text(path: Path) -> None:
    path.write_text("hello\n" * 100)


@pytest.mark.parametrize(
    ("kind", "live"),
    # A live folder may be empty at first.
    [(kind, live) for kind in BAD for live in (False, True) if (kind, live) != ("empty folder", True)],
)
def test_a_source_that_has_no_frames_is_one_line(kind: str, live: bool, tmp_path: Path) -> None:
    source, message = BAD[kind]
    with pytest.raises(ImageError, match=message) as caught:
        list(read_frames(source(tmp_path), live=live))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", LISTS)
@pytest.mark.parametrize("suffix", ["", ".mp4"])
def test_a_list_opens_no_file_that_it_names(suffix: str, kind: str, tmp_path: Path) -> None:
    """Here a pipe, which nobody writes to: who opens it waits forever."""
    os.mkfifo(tmp_path / "other.ts")
    path = tmp_path / f"list.{kind}{suffix}"
    path.write_text(LISTS[kind].format(other="other.ts"))
    with pytest.raises(ImageError, match="expected frames of a video, got "):
        list(read_frames(str(path)))


@pytest.mark.parametrize("kind", LISTS)
def test_a_list_at_an_address_opens_no_other_address(kind: str) -> None:
    with serving(lambda _connection: [server_list(kind)], content_type="video/mp2t") as server:
        with pytest.raises(ImageError, match="expected frames of a video, got "):
            next(read_frames(f"{server.address}/live.ts"))
        assert set(server.paths) == {"/live.ts"}


def server_list(kind: str) -> bytes:
    return LISTS[kind].format(other="/secret.ts").encode()


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1:9/1", "{file}"])
def test_an_address_leads_to_no_file(target: str, tmp_path: Path) -> None:
    clip = write_video(tmp_path / "clip.mp4", 2)
    with serving(lambda _connection: []) as server:
        server.status, server.headers["Location"] = 302, target.format(file=f"file:{clip}")
        with pytest.raises(ImageError, match="expected frames of a video, got "):
            next(read_frames(server.address))


@pytest.mark.parametrize("status", [401, 404, 500])
def test_a_server_that_refuses_is_one_line(status: int) -> None:
    with serving(parts) as server:
        server.status = status
        with pytest.raises(
            ImageError, match=r"^source 'http://127[^']*': expected frames of a video, got [^\n]*$"
        ):
            next(read_frames(server.address))


@pytest.mark.parametrize("scheme", ["rtsp", "http"])
def test_a_password_is_shown_nowhere(scheme: str) -> None:
    with pytest.raises(ImageError) as caught:
        next(read_frames(f"{scheme}://user:secret@127.0.0.1:9/live"))
    assert str(caught.value).startswith(f"source '{scheme}://127.0.0.1:9/live': ")
    assert "secret" not in str(caught.value)


def test_the_source_of_a_frame_has_no_password() -> None:
    with serving(parts) as server:
        place = server.address.replace("//", "//user:secret@")
        assert next(read_frames(place)).source == server.address


def test_an_image_above_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(live, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(ImageError, match="expected frames of a video, got "):
        list(read_frames(str(write_video(tmp_path / "clip.mp4", 2))))


def test_a_missing_pyav_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ImageError, match="expected PyAV to be installed"):
        next(read_frames("0"))


def test_a_wait_for_a_frame_can_be_ended(tmp_path: Path) -> None:
    def check() -> None:
        raise KeyboardInterrupt

    frames = read_frames(str(folder_of_images(tmp_path / "frames")), live=True, check=check)
    next(frames)
    with pytest.raises(KeyboardInterrupt):  # no image is written any more
        next(frames)
