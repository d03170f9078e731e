"""All logits of every decode step, which the runtime itself does not fetch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import pytest
    from numpy.typing import NDArray

    from trio_edge.runtime.model.answers.sampling import TopTokens
    from trio_edge.runtime.pipeline import Pipeline


def record_logits(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> list[NDArray[np.float32]]:
    """Return a list to which each later decode step of ``pipeline`` appends its logits [V]."""
    seen: list[Any] = []
    decoder = pipeline._level.decoder
    decode = decoder.decode

    def decode_and_record(embeds: NDArray[Any]) -> list[TopTokens]:
        tops = decode(embeds)
        seen.extend(decoder.logits(row) for row, _ in enumerate(tops))
        return tops

    monkeypatch.setattr(decoder, "decode", decode_and_record)
    return seen
