"""Content parts as messages for ``Pipeline.chat``: text, images as bytes, videos as files."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from trio_edge.serving.requests.errors import RequestError
from trio_edge.serving.requests.protocol import ChatRequest, ImagePart, Part, TextPart

if TYPE_CHECKING:
    from collections.abc import Iterable

    from trio_edge.runtime.prompts.chat import Message
    from trio_edge.serving.requests.media import MediaReader


@final
class Prompt:
    """The messages of a request, and the video files that they name."""

    def __init__(self, messages: Iterable[Message]) -> None:
        """Write each video, given as bytes, to a file that exists until ``close``.

        Raises:
            RequestError: If the disk has no room for it.
        """
        self._files = ExitStack()
        self._folders: list[str] = []
        try:
            self.messages: list[Message] = [
                {**message, "content": [self._with_file(part) for part in message["content"]]}
                for message in messages
            ]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Remove the files."""
        self._files.close()

    def without_paths(self, text: str) -> str:
        """Return an error message without the folders of the files: clients must not learn this machine's paths."""
        for folder in self._folders:
            text = text.replace(f"{folder}/", "")
        return text

    def _with_file(self, part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] != "video":
            return part
        try:
            folder = self._files.enter_context(tempfile.TemporaryDirectory(prefix="trio-serve-"))
            self._folders.append(folder)
            path = Path(folder) / "video"
            path.write_bytes(part["video"])
        except OSError as error:
            message = f"video: expected room on the server's disk, got '{error.strerror}'; try again later"
            raise RequestError(503, message, code="disk_full", param="messages") from None
        return {**part, "video": path}


def read_prompt(chat: ChatRequest, media: MediaReader, *, max_pixels: int) -> Prompt:
    """Return the messages of a request with their images and videos. ``max_pixels`` bounds all images together.

    Raises:
        RequestError: If an image or a video is refused.
        ImageError: If an image is broken.
    """
    pixels_left = max_pixels

    def read(part: Part, *, where: str) -> dict[str, Any]:
        nonlocal pixels_left
        if isinstance(part, TextPart):
            return {"type": "text", "text": part.text}
        if isinstance(part, ImagePart):
            data = media.read(part.image_url.url, kind="image", where=where)
            pixels_left -= media.check_image(data, where=where, pixels_left=pixels_left)
            return {"type": "image", "image": data}
        video = part.video_url
        data = media.read(video.url, kind="video", where=where)
        return {"type": "video", "video": data, "fps": video.fps, "num_frames": video.num_frames}

    return Prompt(
        {
            "role": "system" if turn.role == "developer" else turn.role,
            "content": [
                read(part, where=f"messages[{number}].content[{place}]")
                for place, part in enumerate(turn.parts)
            ],
        }
        for number, turn in enumerate(chat.messages)
    )
