"""Questions about images, from a JSON-lines file, and their digest."""

from __future__ import annotations

import hashlib
import io
import json
import string
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from trio_edge.runtime.bundle.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_ID_LENGTH = 16  # 64 bits: in one of 10^7 data sets of a million images two ids are equal by chance


@dataclass(frozen=True, slots=True)
class Sample:
    """One question about one image or several, with its place in the data."""

    index: int
    """Place in the whole data set; it pairs the outcomes of different runs, and seeds random selections."""
    sample_id: str
    kind: str
    images: tuple[Path, ...]
    """In the order of the prompt; empty if there is a video."""
    image_names: tuple[str, ...]
    image_id: str
    """Digest of the images' contents; questions about the same images share it."""
    question: str
    """The whole prompt, with choices and suffix."""
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    where: str = ""
    """FILE:LINE, for messages."""
    prompt: str = ""
    """The question without choices and suffix."""
    video: Path | None = None
    """A video file, or a folder of frames."""
    options: tuple[str, ...] = ()
    """Answers that a question with a fixed set of them allows; see ``evaluate/decisions.py``."""


def read_questions(
    path: Path,
    *,
    split: str | None = None,
    suffix: str = "",
    count: int | None = None,
    need_answers: bool = True,
    videos: bool = False,
) -> list[Sample]:
    """Return at most ``count`` questions of a JSON-lines file with one object per line.

    Fields: ``image`` (a path relative to the file), ``images`` (a list of them) or, with ``videos``, ``video``; ``question``,
    ``answers`` (a list) or ``answer``; optional ``id``, ``kind``, ``ocr_tokens`` (a list, appended to the question),
    ``choices`` (a list, appended to the prompt with letters) and ``split``. Others are ignored. ``suffix`` is appended to
    every prompt, after a line break.

    Raises:
        DataError: If the file cannot be read or has no question, or a line has another form or names a missing or unreadable
            image; that message starts with FILE:LINE.
    """
    try:
        # some editors write a byte order mark; splitlines would also split at U+2028, which JSON texts may contain
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected a JSON-lines file ({error}); check the name") from None
    questions: list[Sample] = []
    image_ids: dict[Path, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if len(questions) == count:
            break
        where = f"{path}:{number}"
        entry = _entry(line, where=where)
        if split is not None and entry.get("split") != split:
            continue
        is_video = videos and "video" in entry
        names, prompt = _image_names(entry, where=where, is_video=is_video), _question(entry, where=where)
        answers = _texts(
            entry.get("answers", [entry["answer"]] if "answer" in entry else []),
            f"{where}: expected 'answer' or a list 'answers' of texts, got none; correct the line",
            at_least=int(need_answers),
        )
        choices, ocr = (
            _texts(entry.get(name, []), f"{where}: expected a list {name!r} of texts, got other; correct it")
            for name in ("choices", "ocr_tokens")
        )
        options = [f"{letter}. {choice}" for letter, choice in zip(string.ascii_uppercase, choices)]
        read = [f"Reference OCR token: {', '.join(ocr)}"] if ocr else []
        images = tuple(path.parent / name for name in names)
        for image in images:
            if image not in image_ids:
                image_ids[image] = image_id(image, where=where, is_video=is_video)
        questions.append(
            Sample(
                index=len(questions),
                sample_id=str(entry.get("id", number)),
                kind=str(entry.get("kind", "all")),
                images=() if is_video else images,
                video=images[0] if is_video else None,
                image_names=names,
                image_id=_joined_id([image_ids[image] for image in images]),
                question="\n".join([prompt, *read, *options, *([suffix] if suffix else [])]),
                answers=answers,
                choices=choices,
                where=where,
                prompt=prompt,
            )
        )
    if not questions:
        wanted = "" if split is None else f" of split {split!r}"
        raise DataError(f"{path}: expected at least one question{wanted}, got none; check the file")
    return questions


def digest_of(questions: Sequence[Sample], *, metric: str) -> str:
    """Return the SHA-256 of the questions and their metric.

    It has the images' names, not their contents: replacing one image invalidates only the outcomes of that image.
    """
    digest = hashlib.sha256(metric.encode())
    for question in questions:
        fields = [question.sample_id, question.kind, *question.image_names, question.question]
        options = [question.options] if question.options else []
        digest.update(json.dumps([*fields, question.answers, question.choices, *options]).encode())
    return digest.hexdigest()


def _entry(line: str, *, where: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        entry = None
    if not isinstance(entry, dict):
        raise DataError(f"{where}: expected one JSON object, got {line[:60]!r}; correct the line")
    return entry


def _question(entry: dict[str, Any], *, where: str) -> str:
    text = entry.get("question")
    if not _is_text(text):
        raise DataError(f"{where}: expected a text 'question', got {text!r}; correct the line")
    return str(text)


def _image_names(entry: dict[str, Any], *, where: str, is_video: bool) -> tuple[str, ...]:
    """Return the names in a line's 'image' or 'images', or that in its 'video'."""
    if is_video:
        if not _is_text(entry["video"]) or {"image", "images"} & entry.keys():
            raise DataError(f"{where}: expected a text 'video' and no image with it; correct the line")
        return (entry["video"],)
    if "images" not in entry:
        if not _is_text(entry.get("image")):
            raise DataError(
                f"{where}: expected a text 'image' or a list 'images' of them, got {entry.get('image')!r}; correct the line"
            )
        return (entry["image"],)
    names = entry["images"]
    if "image" in entry:
        raise DataError(f"{where}: expected 'image' or 'images', got both; leave one out")
    if not isinstance(names, list) or not names or not all(_is_text(name) for name in names):
        raise DataError(
            f"{where}: expected one text or more in the list 'images', got {str(names)[:60]!r}; correct the line"
        )
    return tuple(names)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _joined_id(ids: Sequence[str]) -> str:
    """Return one digest for several images; a single one keeps its own."""
    return ids[0] if len(ids) == 1 else hashlib.sha256(" ".join(ids).encode()).hexdigest()[:_ID_LENGTH]


def _texts(values: object, complaint: str, *, at_least: int = 0) -> tuple[str, ...]:
    """Return a list of texts and numbers as texts; raise DataError with ``complaint`` for anything else."""
    texts = values if isinstance(values, list) else [None]
    if len(texts) < at_least or not all(type(value) in (str, int, float) for value in texts):
        raise DataError(complaint)
    return tuple(map(str, texts))


def image_id(path: Path, *, where: str, is_video: bool = False) -> str:
    """Return the digest of an image's file, or of a video's file or folder of frames.

    Raises:
        DataError: If it cannot be read or is no image. Only its header is decoded, and nothing of a video.
    """
    noun = "a video" if is_video else "an image"
    try:
        files = sorted(path.iterdir()) if is_video and path.is_dir() else [path]
        data = b"".join(file.read_bytes() for file in files)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(f"{where}: expected {noun} at {path}, got none ({reason}); check the name") from None
    try:
        if not is_video:
            Image.open(io.BytesIO(data)).close()
    except Exception:  # Pillow's readers raise almost anything
        raise DataError(
            f"{where}: expected an image at {path}, got {len(data)} bytes of no known format; replace it"
        ) from None
    return hashlib.sha256(data).hexdigest()[:_ID_LENGTH]
