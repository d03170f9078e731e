"""The camera example: always the newest frame, and a clean end."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import examples.camera as camera_example
from examples.camera import NewestFrame, main
from tests.bundles import export
from tests.videos import write_video
from trio_edge.runtime.bundle.errors import ImageError

ROOT = Path(__file__).parents[2]
SLOW = 0.4
"""Seconds that an answer takes here."""


@pytest.fixture(scope="module")
def bundle() -> Path:
    return export("tiny", dtype="float32")


def test_a_slow_reader_gets_the_newest_frame_and_no_queue(tmp_path: Path) -> None:
    clip = write_video(tmp_path / "clip.mp4", 60, fps=30, level_step=4)
    seen, number = [], -1
    with NewestFrame(str(clip)) as camera:
        while (frame := camera.after(number)) is not None:
            assert float(np.mean(np.asarray(frame.image()))) == pytest.approx(4 * frame.number, abs=5)
            seen.append(frame.number)
            number = frame.number
            assert frame.age() < SLOW  # it is not one that waited
            time.sleep(SLOW)
    assert seen == sorted(set(seen))
    assert len(seen) < 15  # 2 seconds of video; a queue would have given all 60


def test_it_answers_until_the_stream_ends(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = write_video(tmp_path / "clip.mp4", 12, size=(96, 96))
    assert main([str(clip), "--bundle", str(bundle), "--prompt", "where is the diamond ?"]) == 0
    lines, errors = capsys.readouterr()
    assert errors == ""
    assert lines.splitlines()
    assert all(line.startswith("frame ") and " s old: " in line for line in lines.splitlines())


def test_a_stream_that_falls_silent_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(camera_example, "SECONDS_TO_READ", 0.5)
    clip = write_video(tmp_path / "clip.ts", 120, fps=30)
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=_serve, args=(server, clip.read_bytes()), daemon=True).start()
        with NewestFrame(f"tcp://127.0.0.1:{server.getsockname()[1]}") as camera:
            frame = camera.after(-1)
            assert frame is not None
            with pytest.raises(
                ImageError, match=r"^camera [^\n]*: expected a stream that does not break off, got [^\n]*$"
            ):
                _drain(camera)


def _serve(server: socket.socket, data: bytes) -> None:
    """Send the data, then nothing, until the other side hangs up."""
    connection, _ = server.accept()
    with connection:
        connection.sendall(data)
        connection.recv(1)


def _drain(camera: NewestFrame) -> None:
    number = -1
    while (frame := camera.after(number)) is not None:
        number = frame.number


@pytest.mark.parametrize("source", ["none.mp4", "/dev/video99", "rtsp://127.0.0.1:9/none", "notes.txt"])
def test_a_stream_that_cannot_be_opened_is_one_line(
    source: str, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_bytes(b"")
    place = str(tmp_path / source) if source == "notes.txt" else source
    assert main([place, "--bundle", str(bundle)]) == 2
    lines, errors = capsys.readouterr()
    assert lines == ""
    assert errors.startswith(f"error: camera {place!r}: expected a stream that can be opened, got ")
    assert errors.count("\n") == 1


def test_a_missing_bundle_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["none.mp4", "--bundle", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_ctrl_c_ends_it_cleanly(bundle: Path, tmp_path: Path) -> None:
    clip = write_video(tmp_path / "clip.mp4", 600, size=(96, 96))  # a minute
    command = [sys.executable, "examples/camera.py", str(clip), "--bundle", str(bundle)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("frame 0, ")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "stopped\n")
