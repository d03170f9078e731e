"""CDPruner and EADP in CLIP's space as modules, against plain loops; ``tests/spec/test_clip_selections.py`` runs bundles."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.reference.token_selectors import cdpruner, clip_importance, clip_relevance, cover
from tests.trio.selectors.token_graph import NUM_KEEP, Case, random_case
from trio_edge.trio.selectors.interface import ClipInputs, TokenInputs
from trio_edge.trio.selectors.tokens.cdpruner import CdPruner
from trio_edge.trio.selectors.tokens.eadp import Eadp

LENGTHS = (8, 5)
"""Tokens of the real texts, start and end among them; a third one is padding."""


def clip_case(seed: int) -> tuple[Case, TokenInputs, Any, list[Any]]:
    """Return a picture, its inputs with garbage in all padding, its patches and its texts."""
    case = random_case(seed, num_visual=36, newline_every=7)
    random = np.random.default_rng(seed)
    patches, rows = random.standard_normal((40, 6)), random.standard_normal((3, 8, 6))
    marks = np.zeros((3, 8), np.int32)
    for text, length in enumerate(LENGTHS):
        marks[text, 1 : length - 1], marks[text, length - 1] = 1, 2
        rows[text, length:] = np.nan
    rows[2], patches[36:] = 3e38, np.nan
    clip = ClipInputs(torch.from_numpy(patches), torch.from_numpy(rows), torch.from_numpy(marks))
    inputs = case.inputs(torch.float64)._replace(text_TD=None, num_text=None, clip=clip)
    return case, inputs, patches, [rows[text, :length] for text, length in enumerate(LENGTHS)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.2, 0.6, 1.0])
def test_eadp_weighs_words_and_whole_texts_as_plain_loops_do(
    share: float, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("_TEXT_SHARE", share), ("_GLOBAL_SHARE", 0.1)):
        monkeypatch.setattr(f"trio_edge.trio.selectors.tokens.eadp.{name}", value)
    case, inputs, patches, texts = clip_case(seed)
    selector = Eadp(num_keep=NUM_KEEP, clip=True)
    weights = clip_importance(case, patches, texts, text_share=share, global_share=0.1)
    assert selector(inputs).kept_K.tolist() == cover(case, weights, NUM_KEEP)


@pytest.mark.parametrize("seed", range(3))
def test_cdpruner_takes_the_mean_over_whole_texts_as_plain_loops_do(seed: int) -> None:
    case, inputs, patches, texts = clip_case(seed)
    kept = CdPruner(num_keep=NUM_KEEP, clip=True)(inputs).kept_K.tolist()
    assert kept == cdpruner(case, NUM_KEEP, worth=clip_relevance(case, patches, texts))


def test_a_question_without_words_is_its_whole_text() -> None:
    case, inputs, patches, _ = clip_case(4)
    assert inputs.clip is not None
    marks = torch.zeros(3, 8, dtype=torch.int32)
    marks[0, 1] = 2
    end = inputs.clip.texts_MLZ[0, 1].numpy()
    inputs = inputs._replace(clip=inputs.clip._replace(marks_ML=marks))
    worth = clip_relevance(case, patches, [[end]])
    assert CdPruner(num_keep=9, clip=True)(inputs).kept_K.tolist() == cdpruner(case, 9, worth=worth)
    assert Eadp(num_keep=9, clip=True)(inputs).kept_K.tolist() == cover(case, worth, 9)
