"""trio-watch for minutes at a camera that breaks off again and again: memory, open files and threads must not grow.

    python benchmarks/watch_soak.py out/tiny questions.json examples/pictures/*.png --minutes 10

The camera is a server of this script: JPEG frames with noise, each image for half a second, and the connection ends after 300
frames. The events go to a webhook and into a folder of at most 50 files, too.
"""

from __future__ import annotations

import io
import itertools
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from parts.arguments import errors_in_one_line, parser_for, positive
from parts.tables import head, row
from PIL import Image

from trio_edge.runtime.images.reading import open_image

if TYPE_CHECKING:
    from collections.abc import Sequence

_RATE, _FRAMES_OF_IMAGE, _FRAMES_OF_CONNECTION, _ROWS = 10, 5, 300, 10
_COMMAND = "import sys; from trio_edge.runtime.cli.watch import main; sys.exit(main())"
_HEADERS = (
    "minutes",
    "frames sent",
    "connections",
    "events",
    "posts",
    "resident MB",
    "open files",
    "threads",
)


class _Camera(ThreadingHTTPServer):
    """Serves frames at GET, and counts POSTs."""

    daemon_threads = True

    def __init__(self, images: Sequence[Image.Image]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.images, self.frames, self.connections, self.posts = images, itertools.count(), 0, 0
        self.num_frames = 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def jpeg(self) -> bytes:
        self.num_frames = next(self.frames)
        scene = np.asarray(self.images[self.num_frames // _FRAMES_OF_IMAGE % len(self.images)], np.float64)
        noise = np.random.default_rng(self.num_frames).normal(0, 3, scene.shape)
        buffer = io.BytesIO()
        Image.fromarray(np.rint(scene + noise).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        return buffer.getvalue()


class _Handler(BaseHTTPRequestHandler):
    server: _Camera

    def do_GET(self) -> None:
        self.server.connections += 1
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        with suppress(OSError):  # the watch has ended
            for _ in range(_FRAMES_OF_CONNECTION):
                jpeg = self.server.jpeg()
                start = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
                self.wfile.write(start.encode() + jpeg + b"\r\n")
                time.sleep(1 / _RATE)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.posts += 1
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("questions", type=Path)
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--minutes", type=positive, default=10)
    options = parser.parse_args()
    with errors_in_one_line(parser), tempfile.TemporaryDirectory() as folder:
        camera = _Camera([open_image(path).resize((192, 144)) for path in options.images])
        address = f"http://127.0.0.1:{camera.server_port}/"
        command = [sys.executable, "-c", _COMMAND, address, "--bundle", str(options.bundle)]
        command += ["--questions", str(options.questions), "--threads", "1", "--webhook", address]
        command += ["--save-frames", folder, "--max-saved", "50"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            lines: list[str] = []
            threading.Thread(target=lambda: lines.extend(process.stdout or ()), daemon=True).start()
            print(*head(_HEADERS), sep="\n")
            for number in range(1, _ROWS + 1):
                time.sleep(60 * options.minutes / _ROWS)
                counts = (camera.num_frames, camera.connections, len(lines), camera.posts)
                print(row(_row(process.pid, options.minutes * number / _ROWS, counts)), flush=True)
            process.terminate()
        print(f"\nexit code {process.returncode}, {len(list(Path(folder).iterdir()))} files saved")


def _row(pid: int, minutes: float, counts: Sequence[int]) -> Sequence[str]:
    status = Path(f"/proc/{pid}/status").read_text()
    found = {
        key: (value.split() or [""])[0]
        for key, _, value in (line.partition(":") for line in status.splitlines())
    }
    resident, files = int(found["VmRSS"]) / 1e3, len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return (f"{minutes:g}", *map(str, counts), f"{resident:.1f}", str(files), found["Threads"])


if __name__ == "__main__":
    main()
