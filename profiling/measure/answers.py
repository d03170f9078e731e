"""One timed answer of a bundle: the moment of each token, and the graphs' launches."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import msgspec

from trio_edge.profiling.measure.recording import GraphCall, RecordingBackend, is_decode
from trio_edge.runtime.bundle.reader import Bundle, open_bundle
from trio_edge.runtime.model.levels import one_level
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image

    from trio_edge.runtime.answer import Statistics
    from trio_edge.runtime.backends.interface import Backend


@dataclass(frozen=True, slots=True, kw_only=True)
class RunQuestion:
    """The question of every run."""

    image: Path | Image.Image | None
    prompt: str
    new_tokens: int
    image_words: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer. Moments are ``time.perf_counter`` seconds."""

    start: float
    end: float
    token_moments: list[float]
    token_ids: list[int]
    statistics: Statistics
    calls: list[GraphCall]
    """The answer's launches."""

    @property
    def answer_ms(self) -> float:
        """Time from the question to the end of the answer."""
        return 1e3 * (self.end - self.start)

    @property
    def ttft_ms(self) -> float:
        """Time from the question to the first token."""
        return 1e3 * (self.token_moments[0] - self.start)

    @property
    def token_ms(self) -> list[float]:
        """Time of each token after the first."""
        return [1e3 * (after - before) for before, after in zip(self.token_moments, self.token_moments[1:])]

    @property
    def host_first_ms(self) -> float:
        """Time to the first token outside of graphs."""
        return self.ttft_ms - sum(call.milliseconds for call in self.calls if not is_decode(call.profile))

    @property
    def host_token_ms(self) -> float | None:
        """Mean time of a later token outside of graphs; None if their graphs were not timed."""
        graphs = [call.milliseconds for call in self.calls if is_decode(call.profile)]
        times = self.token_ms
        return (sum(times) - sum(graphs)) / len(times) if graphs and times else None


@final
class _StampedIds(list[int]):
    """Token ids with the moment at which each was appended."""

    def __init__(self) -> None:
        super().__init__()
        self.moments: list[float] = []

    def append(self, token: int) -> None:
        # the pipeline appends a token when it is known, but yields text only at the end of a word
        self.moments.append(time.perf_counter())
        super().append(token)


@final
class LoadedBundle:
    """A loaded bundle whose answers all have the same number of tokens: no token stops them."""

    def __init__(
        self, folder: Path, backend: Backend, *, capture: bool = True, level: str | None = None
    ) -> None:
        """Open and load the bundle, and time both; ``capture`` is ``RecordingBackend``'s.

        Raises:
            ShapeError: If the bundle has no such ``level``; None is its default.
        """
        start = time.perf_counter()
        self.bundle = open_bundle(folder)
        self.level = one_level(self.bundle.manifest, level)
        self.manifest = self.bundle.manifest.at_level(self.level)
        opened = time.perf_counter()
        recorded = RecordingBackend(backend, capture=capture)
        self.pipeline = Pipeline(without_stop_tokens(self.bundle), recorded)
        self.recording = recorded.recording
        self.open_ms = 1e3 * (opened - start)
        self.graphs_ms = 1e3 * (time.perf_counter() - opened)

    def answer(self, question: RunQuestion) -> Answer:
        """Ask a question and return the timed answer."""
        self.recording.take()
        ids = _StampedIds()
        start = time.perf_counter()
        generation = self.pipeline.generate(
            question.image, question.prompt, max_new_tokens=question.new_tokens, level=self.level
        )
        generation.token_ids = ids
        for _ in generation:
            pass
        end = time.perf_counter()
        assert len(ids) == question.new_tokens, "no token ends an answer"
        return Answer(
            start=start,
            end=end,
            token_moments=ids.moments,
            token_ids=list(ids),
            statistics=generation.statistics,
            calls=self.recording.take(),
        )

    def close(self) -> None:
        """Release the graphs."""
        self.pipeline.close()


def without_stop_tokens(bundle: Bundle) -> Bundle:
    """Return ``bundle`` without stop tokens, so that every run does the same work."""
    text = msgspec.structs.replace(bundle.manifest.text, stop_token_ids=())
    return Bundle(folder=bundle.folder, manifest=msgspec.structs.replace(bundle.manifest, text=text))
