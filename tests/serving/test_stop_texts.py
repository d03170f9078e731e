"""Stop texts are found across pieces, and nothing of them is sent."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_edge.serving.answers.worker import StopTexts


def streamed(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    texts, sent = StopTexts(stops), ""
    for piece in pieces:
        sent += texts.push(piece)
        if texts.is_found:
            return sent, True
    return sent + texts.finish(), False


@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        (["one ", "two"], [], ("one two", False)),
        (["one two three"], ["two"], ("one ", True)),
        (["one t", "w", "o"], ["two"], ("one ", True)),
        (["one t", "w", "in"], ["two"], ("one twin", False)),
        (["aab"], ["ab"], ("a", True)),
        (["a", "a", "a", "b"], ["aab"], ("a", True)),
        (["x\n", "\n", "y"], ["\n\n"], ("x", True)),
        (["one two"], ["two", "one"], ("", True)),
        (["one tw"], ["two"], ("one tw", False)),
    ],
)
def test_an_answer_ends_before_its_first_stop(
    pieces: list[str], stops: list[str], expected: tuple[str, bool]
) -> None:
    assert streamed(pieces, stops) == expected


@given(
    st.lists(st.text("ab", max_size=4), max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=2),
)
def test_pieces_make_no_difference_to_where_an_answer_first_stops(
    pieces: list[str], stops: list[str]
) -> None:
    sent, is_found = streamed(pieces, stops)
    text = "".join(pieces)
    assert is_found == any(stop in text for stop in stops)
    assert text.startswith(sent)
    assert not any(stop in sent for stop in stops)
    assert is_found or sent == text
