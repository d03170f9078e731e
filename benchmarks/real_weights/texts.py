"""Text on every machine: Python's own reference topics and short questions; and text as the sequence that enters a decoder."""

from __future__ import annotations

import re
from pydoc_data.topics import topics
from typing import TYPE_CHECKING

import torch

from trio_edge.calibration.model.sequence import Sequence
from trio_edge.runtime.prompts.chat import build_messages, prompt_ids

if TYPE_CHECKING:
    from trio_edge.calibration.model.torch_model import TorchModel

MEASURED = ("exceptions", "booleans", "slicings")
CALIBRATING = ("types", "operator-summary", "class", "import", "with", "function")
QUESTIONS = (
    ("What is the capital of France?", "Paris"),
    ("What is the capital of Italy?", "Rome"),
    ("What is the capital of Japan?", "Tokyo"),
    ("What is the capital of Egypt?", "Cairo"),
    ("Which planet is closest to the Sun?", "Mercury"),
    ("What is the largest planet in the solar system?", "Jupiter"),
    ("What color is the sky on a clear day?", "blue"),
    ("What color do you get when you mix blue and yellow?", "green"),
    ("How many legs does a spider have?", "eight"),
    ("How many days are in a week?", "seven"),
    ("What is 2 plus 2?", "4"),
    ("What is the opposite of hot?", "cold"),
    ("What is the freezing point of water in degrees Celsius?", "0"),
    ("What gas do plants absorb from the air?", "carbon dioxide"),
    ("What is the chemical symbol for gold?", "Au"),
    ("Who wrote Romeo and Juliet?", "Shakespeare"),
    ("What is the largest ocean on Earth?", "Pacific"),
    ("On which continent is Kenya?", "Africa"),
    ("What language is spoken in Brazil?", "Portuguese"),
    ("What animal says meow?", "cat"),
)
"""Twenty questions, each with a word of the right answer."""


def is_right(answer: str, word: str) -> bool:
    """Return whether an answer has the whole word, or the digit of a number word."""
    digits = {"eight": "8", "seven": "7", "4": "four", "0": "zero"}
    wanted = "|".join(map(re.escape, {word, digits.get(word, word)}))
    return re.search(rf"\b(?:{wanted})\b", answer, re.IGNORECASE) is not None


def pieces(model: TorchModel, names: tuple[str, ...], *, count: int, length: int) -> list[list[int]]:
    """Return ``count`` pieces of ``length`` tokens from the topics ``names`` in turn."""
    found: list[list[int]] = []
    for name in names:
        ids = model.tokenizer.plain_ids(topics[name]).tolist()
        found += [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)][:2]
    if len(found) < count:
        raise ValueError(
            f"texts: expected {count} pieces of {length} tokens, got {len(found)}; name more topics"
        )
    return found[:count]


def as_chat(model: TorchModel, request: str, answer: list[int]) -> list[int]:
    """Return the ids of a chat with ``request`` and the beginning of its ``answer``."""
    ids = prompt_ids(
        build_messages(request), tokenizer=model.tokenizer, template=model.template, text=model.text
    )
    return [*ids.text.tolist(), *answer]


def as_sequence(model: TorchModel, ids: list[int], visual: range = range(0)) -> Sequence:
    """Return token ids as the sequence that enters layer 0, with the rows ``visual`` marked as visual tokens."""
    rows_S = torch.arange(len(ids), dtype=torch.int32, device=model.device)
    return Sequence(
        hidden_SD=model.embedding_VD[torch.tensor(ids, device=model.device)],
        positions_AS=rows_S[None],
        next_position=len(ids),
        visual_rows_N=torch.tensor(visual, dtype=torch.int64, device=model.device),
        original_N=torch.arange(len(visual), device=model.device),
    )
