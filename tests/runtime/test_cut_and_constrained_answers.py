"""Answers that are cancelled, that a constraint leads, and prompts that are too long."""

from __future__ import annotations

import io
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.pictures import random_picture
from trio_edge.runtime.bundle.errors import ImageError, PromptTooLongError
from trio_edge.runtime.images.reading import image_header
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

PICTURE = random_picture(48, 48)


@pytest.fixture(scope="module")
def pipeline(reduced_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.from_bundle(reduced_bundle) as pipeline:
        yield pipeline


class Counting:
    """Lets an answer count: 10, 11, 12, and then end."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens, self.said = num_tokens, list[int]()

    def allowed(self) -> NDArray[np.bool_]:
        allowed_V = np.zeros(self.num_tokens, np.bool_)
        allowed_V[10 + len(self.said) if len(self.said) < 3 else 2] = True
        return allowed_V

    def add(self, token: int) -> None:
        self.said.append(token)


def test_a_cancelled_answer_ends_at_the_next_token(pipeline: Pipeline) -> None:
    whole = pipeline.generate(PICTURE, "w1").text
    answer = pipeline.generate(PICTURE, "w1")
    pieces = []
    for piece in answer:
        pieces.append(piece)
        if len(pieces) == 3:
            num_tokens = answer.statistics.new_tokens
            thread = threading.Thread(target=answer.cancel)
            thread.start()
            thread.join()
    assert answer.statistics.new_tokens == num_tokens
    assert answer.text == "".join(pieces)
    assert whole.startswith(answer.text)
    assert len(answer.text) < len(whole)


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 1}, {"repetition_penalty": 1.3}])
def test_a_constraint_says_which_tokens_come(pipeline: Pipeline, settings: dict[str, float]) -> None:
    constraint = Counting(pipeline.manifest.token_embedding.shape[0])
    answer = pipeline.chat(
        [{"role": "user", "content": "w1"}],
        constraint=constraint,
        **settings,  # type: ignore[arg-type]
    )
    assert answer.text == pipeline.tokenizer.decode([10, 11, 12])
    assert answer.token_ids == constraint.said == [10, 11, 12, 2]


def test_a_constraint_that_allows_all_changes_nothing(pipeline: Pipeline) -> None:
    class Free:
        def allowed(self) -> NDArray[np.bool_]:
            return np.ones(pipeline.manifest.token_embedding.shape[0], np.bool_)

        def add(self, token: int) -> None:
            pass

    settings = {"temperature": 0.8, "seed": 3}
    messages = [{"role": "user", "content": "w1"}]
    own = pipeline.chat(messages, **settings).text  # type: ignore[arg-type]
    assert pipeline.chat(messages, constraint=Free(), **settings).text == own  # type: ignore[arg-type]


def test_too_much_text_and_too_many_images_are_one_kind_of_error(pipeline: Pipeline) -> None:
    with pytest.raises(PromptTooLongError, match="largest bucket"):
        pipeline.generate(None, "w1 " * 100)
    with pytest.raises(PromptTooLongError, match="visual tokens in all"):
        pipeline.generate([PICTURE] * 8, "w1")


def test_a_header_tells_size_and_format_without_the_pixels() -> None:
    file = io.BytesIO()
    PICTURE.save(file, "PNG")
    assert image_header(file.getvalue()[:60]) == ((48, 48), "PNG")
    with pytest.raises(ImageError, match="no known format"):
        image_header(b"nothing")
