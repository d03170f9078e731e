"""Answers questions that have a fixed set of answers, at one level or at the first level that is sure.

The probabilities are those of the first token's labels, so a question costs a prefill; or less, where several questions share
the rows of one prompt, or two levels share their first layers.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, final

import numpy as np

from trio_edge.runtime.answer import Statistics
from trio_edge.runtime.bundle.errors import ShapeError
from trio_edge.runtime.decisions.labels import log_probabilities, normalized
from trio_edge.runtime.decisions.questions import Decision

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from PIL import Image

    from trio_edge.runtime.decisions.questions import Question
    from trio_edge.runtime.decisions.wording import Asked, Plan, Sharing, Wording
    from trio_edge.runtime.model.answers.running import RunningAnswers
    from trio_edge.runtime.model.decoder import PrefillResult
    from trio_edge.runtime.model.host_selection import SelectorOverride
    from trio_edge.runtime.model.levels import Level
    from trio_edge.runtime.model.vision import PreparedImage, VisualInput
    from trio_edge.runtime.prompts.chat import Message
    from trio_edge.runtime.prompts.tokenizer import PromptIds
    from trio_edge.runtime.videos.reading import Video

Ready: TypeAlias = "tuple[Plan, Mapping[str, Sequence[PreparedImage]]]"
"""A plan of questions, and the images for each question's text."""


class Subject(NamedTuple):
    """A conversation, and how questions about it are put; see ``Pipeline.decide``."""

    wording: Wording
    messages: Sequence[Message]
    parts: Sequence[Image.Image | Video]
    """The decoded images and videos of ``messages``."""
    sharing: Sharing
    both_orders: bool
    override: SelectorOverride | None


@final
class Decider:
    """Asks questions about one subject at one level."""

    def __init__(self, subject: Subject, level: Level, answers: RunningAnswers) -> None:
        """Take turns with the other ``answers`` of the pipeline."""
        self._subject, self._level, self._answers = subject, level, answers
        self._visual: VisualInput | None = None
        self._result: PrefillResult | None = None
        """The last prefill's, whose rows are in the KV caches."""
        self._plan: Plan | None = None
        """The plan that has run last, at this level or the one below."""
        self._after: Level | None = None
        """The level below, if it has just run the same prompt."""

    def ready(self, questions: Sequence[Question]) -> Ready:
        """Return the plan of ``questions``, and the images for each question's text.

        Raises:
            ImageError: If an image cannot be processed.
            ShapeError: If a question or an image does not fit the bundle, or an answer cannot be told from the others.
            BundleError: If a template is broken.
        """
        wording, messages, parts, sharing, both_orders, _ = self._subject
        level = self._level
        shown = level.show(parts, wording.text_of(questions, messages))
        plan = wording.plan(
            questions,
            messages,
            [part.inset for part in shown],
            sharing=sharing,
            both_orders=both_orders,
            can_branch=level.decoder.can_branch,
        )
        prepared = [image for part in shown for image in part.prepared]
        level.vision.rows_for(prepared)  # refuses too many
        images = {asked.text: prepared for orders in plan.rounds for asked in orders}
        if level.vision.reads_question and plan.joint is None:
            for text in images:
                images[text] = [image for part in level.show(parts, text) for image in part.prepared]
        return plan, images

    def goes_on(self, below: Decider, *, is_one: bool) -> None:
        """Keep what the level ``below`` has computed; ``is_one`` if it ran one prompt, the same as here."""
        if self._level.vision is below._level.vision:
            self._visual, self._plan = below._visual, below._plan
            self._after = below._level if is_one else None

    def decisions(self, ready: Ready, *, prepare_ms: float) -> Iterator[Decision]:
        """Yield the answers to the questions of a plan one by one.

        Raises:
            ShapeError: If an answer was started between them.
            BackendError: If the pipeline is closed, or a graph fails.
        """
        plan, images = ready
        for number, orders in enumerate(plan.rounds):
            statistics, start = Statistics(ttft_ms=prepare_ms * (number == 0)), time.perf_counter()
            with self._answers.turn():
                if number > 0 and self._answers.owner is not plan:
                    raise ShapeError(
                        "questions: expected no answer between them, one was started; ask the questions again"
                    )
                if number == 0 and self._answers.owner is not self._plan:
                    self._visual = self._after = None
                self._answers.make_way(plan)
                self._plan, self._answers.last = plan, self._level
                if plan.joint is not None and self._visual is not None:
                    statistics.cached_tokens = plan.joint.text_before[-1] + self._visual.num_visual
                reads = []
                for asked in orders:
                    logits = self._first_logits(asked, plan.joint, images[asked.text], statistics)
                    reads.append(self._probabilities(asked, logits))
                assert self._result is not None, "the questions have run"
                shown = tuple(self._result.kept), self._level.vision.layouts
            statistics.ttft_ms += 1e3 * (time.perf_counter() - start)
            # The second of two orders has the options reversed.
            shares = np.mean([shares[:: -1 if turn else 1] for turn, (shares, _) in enumerate(reads)], axis=0)
            mass = float(np.mean([mass for _, mass in reads]))
            answer = orders[0].question, tuple(shares.tolist()), mass
            yield Decision(*answer, statistics, *shown)

    def _first_logits(
        self,
        asked: Asked,
        joint: PromptIds | None,
        prepared: Sequence[PreparedImage],
        statistics: Statistics,
    ) -> NDArray[np.float32]:
        """Return the logits [V] of a question's first answer token."""
        start, ids, level = time.perf_counter(), joint or asked.ids, self._level
        is_own = joint is None and level.vision.reads_question
        statistics.image_was_kept = self._visual is not None and not is_own
        if self._visual is None or is_own:
            self._visual = level.see(ids, prepared)
            statistics.image_was_kept = self._visual.was_kept
        if self._result is None or joint is None:
            after, self._after = self._after, None
            self._result = level.prefill(
                ids, self._visual, prepared, override=self._subject.override, after=after
            )
            statistics.add_times(level.vision.graph_ms)
        level.count(statistics, self._visual, self._result, num_images=len(prepared))
        logits = self._result.logits
        if joint is not None and asked.ids is not joint:
            logits = level.decoder.branch(level.embedding[asked.ids.after])
        statistics.text_tokens += asked.ids.num_tokens
        statistics.prefill_ms += 1e3 * (time.perf_counter() - start)
        return logits

    def _probabilities(self, asked: Asked, logits: NDArray[np.float32]) -> tuple[NDArray[np.float64], float]:
        """Return the options' probabilities, whose sum is 1, and their share of the whole, from the first token's logits."""
        decoder, embedding = self._level.decoder, self._level.embedding

        def step(tokens: Sequence[int]) -> list[NDArray[np.float32]]:
            decoder.remember()
            return [decoder.logits(row) for row, _ in enumerate(decoder.decode(embedding[[*tokens]]))]

        logs = log_probabilities(
            asked.labels,
            logits,
            stop_ids=self._level.manifest.text.stop_token_ids,
            step=step,
            back=decoder.back,
            most_rows=decoder.max_rows,
        )
        mass = float(np.exp(np.logaddexp.reduce(logs)))
        temperature = self._subject.wording.temperature(asked.question)
        return normalized(logs, temperature=temperature), mass


def surest(
    answers: Iterator[Decision],
    questions: Sequence[Question],
    deciders: Sequence[Decider],
    margins: Sequence[float],
) -> Iterator[Decision]:
    """Yield ``answers``, the lowest level's, except those in doubt, which come from the next levels.

    ``deciders`` are those of all levels from low to high, ``margins`` the ones that are sure enough.
    """
    found = [*answers]
    doubtful = [*range(len(found))]
    for below, own, margin in zip(deciders, deciders[1:], margins):
        doubtful = [index for index in doubtful if found[index].margin < margin]
        if not doubtful:
            break
        start = time.perf_counter()
        ready = own.ready([questions[index] for index in doubtful])
        own.goes_on(below, is_one=len(found) == 1 and len(ready[0].rounds[0]) == 1)
        prepare_ms = 1e3 * (time.perf_counter() - start)
        for index, answer in zip(doubtful, own.decisions(ready, prepare_ms=prepare_ms)):
            before = found[index].statistics
            answer.statistics.ttft_ms += before.ttft_ms
            answer.statistics.levels_below = (*before.levels_below, before.level)
            found[index] = answer
    yield from found
