"""Turns a question into CLIP's texts, for reduce graphs that compare it with the image in CLIP's space.

CLIP reads texts of a fixed length, 77 tokens including start and end. A longer question is split into several texts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import numpy as np

from trio_edge.runtime.bundle.errors import ShapeError
from trio_edge.runtime.bundle.graph_io import CLIP_TEXT, END, WORD, num_clip_texts
from trio_edge.runtime.prompts.tokenizer import Tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from trio_edge.runtime.bundle.reader import Bundle


@final
class ClipTexts:
    """Turns questions into inputs of the ``clip_text`` graph."""

    def __init__(self, bundle: Bundle) -> None:
        """Read the tokenizer of CLIP's text tower, which the bundle must have.

        Raises:
            BundleError: If the tokenizer is missing or broken.
        """
        manifest = bundle.manifest
        assert manifest.clip_text is not None
        self._spec = manifest.clip_text
        self._tokenizer = Tokenizer.from_file(bundle.path(self._spec.tokenizer))
        graph = manifest.graph(CLIP_TEXT)
        self._counts = sorted(profile.sizes["M"] for profile in graph.profiles)

    def arrays(self, question: str) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return the token ids and their marks, both [M, L], for the smallest exported M with enough room.

        Raises:
            ShapeError: If the question needs more texts than the bundle has room for.
        """
        # Two tokens of each text are start and end.
        words, room = self._tokenizer.plain_ids(question), self._spec.length - 2
        needed = num_clip_texts(len(words), length=self._spec.length)
        count = next((count for count in self._counts if count >= needed), None)
        if count is None:
            raise ShapeError(
                f"prompt: expected at most {self._counts[-1] * room} tokens of CLIP, got {len(words)};"
                " shorten it or export with a larger --max-text"
            )
        ids = np.full((count, self._spec.length), self._spec.end_id, np.int32)
        marks = np.zeros_like(ids)
        ids[:, 0] = self._spec.start_id
        for index in range(needed):
            part = words[index * room : (index + 1) * room]
            ids[index, 1 : 1 + len(part)] = part
            marks[index, 1 : 1 + len(part)] = WORD
            marks[index, 1 + len(part)] = END
        return ids, marks
