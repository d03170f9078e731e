"""A camera with RTSP for tests: MPEG-TS in RTP packets over one TCP connection, which then hangs up."""

from __future__ import annotations

import socketserver
import struct
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_SDP = "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=camera\r\nt=0 0\r\nm=video 0 RTP/AVP 33\r\na=control:track\r\n"
_TS_PACKETS = 7 * 188


class _Camera(socketserver.StreamRequestHandler):
    server: RtspServer

    def handle(self) -> None:
        self.server.num_connections += 1
        number = self.server.num_connections
        with suppress(OSError):
            while (method := self._request()) not in ("", "PLAY", "TEARDOWN"):
                pass
            if method == "PLAY":
                self._play(self.server.stream(number - 1))

    def _request(self) -> str:
        """Answer one request and return its method; empty at the end."""
        lines = []
        while line := self.rfile.readline().decode().strip():
            lines.append(line)
        if not lines:
            return ""
        method = lines[0].split()[0]
        sequence = next(line for line in lines if line.lower().startswith("cseq"))
        body = _SDP if method == "DESCRIBE" else ""
        heads = [
            "RTSP/1.0 200 OK",
            sequence,
            "Session: 1",
            "Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN",
        ]
        if method == "SETUP":
            heads.append("Transport: RTP/AVP/TCP;unicast;interleaved=0-1")
        if body:
            heads += ["Content-Type: application/sdp", f"Content-Length: {len(body)}"]
        self.wfile.write(("\r\n".join(heads) + "\r\n\r\n" + body).encode())
        return method

    def _play(self, stream: bytes) -> None:
        for number, start in enumerate(range(0, len(stream), _TS_PACKETS)):
            payload = struct.pack(">BBHII", 0x80, 33, number & 0xFFFF, 900 * number, 7)
            payload += stream[start : start + _TS_PACKETS]
            self.wfile.write(b"$\0" + struct.pack(">H", len(payload)) + payload)


class RtspServer(socketserver.ThreadingTCPServer):
    """Plays ``stream``, which is told the connection's number from 0, at each connection."""

    daemon_threads = allow_reuse_address = True

    def __init__(self, stream: Callable[[int], bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Camera)
        self.stream, self.num_connections = stream, 0
        self.address = f"rtsp://127.0.0.1:{self.server_address[1]}/live"


@contextmanager
def rtsp_serving(stream: Callable[[int], bytes]) -> Iterator[RtspServer]:
    """Yield a running server."""
    with RtspServer(stream) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
