"""Samples to calibrate on: a JSON-lines file, or a folder of images with one prompt; and their split.

The split is by image: questions about one image are never in both parts. The order in which images are held out follows
from their content and the seed, so that adding samples moves few others.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from trio_edge.calibration.questions import Sample, image_id, read_questions
from trio_edge.runtime.bundle.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


class Split(NamedTuple):
    """The samples to search with and those held out for the report, each in the order of the data."""

    search: list[Sample]
    held_out: list[Sample]


def read_samples(source: str, *, prompt: str | None, count: int | None) -> list[Sample]:
    """Return at most ``count`` samples.

    ``source`` is a JSON-lines file as for ``trio-eval`` (answers may be missing), or a folder of images, sub-folders
    included, with one ``prompt`` for all.

    Raises:
        DataError: If there are none, or one cannot be read.
    """
    path = Path(source)
    if not path.exists():
        raise DataError(
            f"--samples {source}: expected a folder of images or a JSON-lines file, got no such file; check the name"
        )
    if path.is_dir() != (prompt is not None):
        raise DataError(
            f"--samples {source}: expected --prompt with a folder of images and only there,"
            f" got {'none' if prompt is None else 'one'}; {'add it' if prompt is None else 'leave it out'}"
        )
    if prompt is not None:
        return _folder_questions(path, prompt, count=count)
    return read_questions(path, count=count, need_answers=False)


def split_samples(questions: Sequence[Sample], *, held_out: float, seed: int) -> Split:
    """Return the samples in two non-empty parts that share no image; ``held_out`` is the second part's share of the images.

    Raises:
        DataError: If there are fewer than two images.
    """
    images = sorted(
        {question.image_id for question in questions},
        key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).hexdigest(),
    )
    if len(images) < 2:
        raise DataError(
            f"--samples: expected at least 2 different images (one is held out), got {len(images)}; add some"
        )
    num_held_out = min(max(round(held_out * len(images)), 1), len(images) - 1)
    kept_back = set(images[:num_held_out])
    return Split(
        search=[question for question in questions if question.image_id not in kept_back],
        held_out=[question for question in questions if question.image_id in kept_back],
    )


def _folder_questions(folder: Path, prompt: str, *, count: int | None) -> list[Sample]:
    try:
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    except OSError as error:
        raise DataError(f"--samples {folder}: cannot be read ({error.strerror}); check its rights") from None
    if not paths:
        raise DataError(
            f"--samples {folder}: expected images ({', '.join(sorted(IMAGE_SUFFIXES))}), got none; check the folder"
        )
    return [
        Sample(
            index=index,
            sample_id=path.relative_to(folder).as_posix(),
            kind="all",
            images=(path,),
            image_names=(path.relative_to(folder).as_posix(),),
            image_id=image_id(path, where=str(path)),
            question=prompt,
            answers=(),
            where=str(path),
        )
        for index, path in enumerate(paths[:count])
    ]
