"""Whole answers of a keep-all bundle next to Hugging Face's ``generate()``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tests.decode_logits import record_logits
from tests.tolerances import LOGITS_FLOAT32

if TYPE_CHECKING:
    import pytest

    from trio_edge.runtime.pipeline import Pipeline

NUM_STEPS = 12


def generate(
    model: Any, inputs: dict[str, torch.Tensor], *, num_steps: int = NUM_STEPS
) -> tuple[list[int], np.ndarray[Any, Any]]:
    """Return the tokens of Hugging Face's greedy answer, and the logits that each was chosen from."""
    model.model.rope_deltas = None  # Qwen's remember the prompt before
    with torch.no_grad():
        output = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=num_steps,
            return_dict_in_generate=True,
            output_logits=True,
        )
    tokens = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    return tokens, torch.stack(output.logits)[:, 0].numpy()


def assert_same_answer(
    model: Any,
    pipeline: Pipeline,
    inputs: dict[str, torch.Tensor],
    *,
    picture: Any,
    prompt: str,
    monkeypatch: pytest.MonkeyPatch,
    num_steps: int = NUM_STEPS,
) -> None:
    """Compare tokens, and the logits of every step.

    Args:
        model: Hugging Face's.
        pipeline: A keep-all bundle's.
        inputs: Of the model: what its processor makes of picture and prompt.
        picture: None for text only.
        prompt: The question.
        monkeypatch: Records the logits of decode steps.
        num_steps: Tokens of the answer, at most.
    """
    tokens, logits = generate(model, inputs, num_steps=num_steps)
    seen = record_logits(pipeline, monkeypatch)
    answer = pipeline.generate(picture, prompt, max_new_tokens=num_steps)
    assert answer.text is not None
    assert answer.token_ids == tokens
    np.testing.assert_allclose(np.stack([answer.first_logits, *seen]), logits, **LOGITS_FLOAT32)
