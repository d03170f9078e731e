"""How a question is put to the model, and which texts count as which answer.

The wording is a Jinja template in the bundle, because models were trained on different forms. It sees ``kind``, ``question``,
``evidence`` (text, or empty) and ``options`` with ``label``, ``name`` and ``description``. An option's label is a letter, a
digit for levels, yes and no, or its own name where letters do not suffice.
"""

from __future__ import annotations

import string
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, TypeAlias, final

import msgspec
import numpy as np

from trio_edge.runtime.bundle.errors import BundleError, PromptTooLongError, ShapeError
from trio_edge.runtime.bundle.reader import read_regular
from trio_edge.runtime.decisions.labels import label_tokens
from trio_edge.runtime.decisions.questions import QuestionKind
from trio_edge.runtime.prompts.chat import (
    check_length,
    last_question,
    prompt_text,
    render,
    visual_parts,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from trio_edge.runtime.bundle.reader import Bundle
    from trio_edge.runtime.decisions.labels import Tokens
    from trio_edge.runtime.decisions.questions import Question
    from trio_edge.runtime.prompts.chat import Message
    from trio_edge.runtime.prompts.tokenizer import Inset, PromptIds, Tokenizer

WORDING_VERSION = "1"
TEMPERATURES_NAME = "temperatures.json"
"""File next to the manifest, which does not list it, so that engines stay valid when temperatures are fitted."""
Temperature: TypeAlias = Annotated[float, msgspec.Meta(ge=1e-3, le=1e3)]
_MOST_BYTES = 4096

LETTERS_TEMPLATE = (
    "{% if evidence %}{{ evidence + '\n\n' }}{% endif %}{{ question }}"
    "{% if kind != 'yes-no' or options[0].description or options[1].description %}"
    "{% for option in options %}"
    "{{ '\n' + (option.label + ': ' + option.name if option.label != option.name else option.name) }}"
    "{% if option.description %}{{ ' - ' + option.description }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if kind == 'yes-no' %}{{ '\nAnswer with yes or no.' }}"
    "{% elif options[0].label == options[0].name %}{{ '\nAnswer with one of these.' }}"
    "{% elif kind == 'score' %}{{ '\nAnswer with one digit.' }}"
    "{% else %}{{ '\nAnswer with one letter.' }}{% endif %}"
)
"""Options as lettered lines, levels as numbered lines."""

WORDS_TEMPLATE = "{% if evidence %}{{ evidence + ' ' }}{% endif %}{{ question }}"
"""The bare question, for models that know neither letters nor instructions; the options' names are the labels."""


Sharing = Literal["auto", "each", "joint"]


class Asked(NamedTuple):
    """A question in one order of its options, ready to run."""

    question: Question
    text: str
    """The user's text."""
    ids: PromptIds
    labels: list[set[Tokens]]
    """The token sequences that count as each option."""


class Plan(NamedTuple):
    """How several questions run."""

    rounds: list[list[Asked]]
    """Each question in one order of its options, or in both."""
    joint: PromptIds | None
    """The prompt whose prefill all of them share; None if each has its own."""


@final
class Wording:
    """Writes a bundle's questions as prompts."""

    def __init__(self, bundle: Bundle, tokenizer: Tokenizer) -> None:
        """Read the bundle's templates.

        Raises:
            BundleError: If one is missing.
        """
        self._manifest, self._tokenizer = bundle.manifest, tokenizer
        if self._manifest.decisions is None:
            raise BundleError(
                "decisions: expected a bundle with a template for questions, got one of an older release; export it again"
            )
        self._spec = self._manifest.decisions
        self._template = bundle.read_text(self._spec.template)
        self._chat_template = bundle.read_text(self._manifest.text.chat_template)
        self._temperatures = read_temperatures(bundle.folder)

    def text_of(self, questions: Sequence[Question], messages: Sequence[Message]) -> str:
        """Return the user's text for questions about a conversation, whose last turn's text is evidence.

        Raises:
            BundleError: If the template is broken.
            ShapeError: If the template refuses a question.
        """
        evidence, texts = last_question(messages), []
        for question in questions:
            options = [
                {"label": label, "name": option.name, "description": option.description}
                for label, option in zip(self.labels(question), question.options)
            ]
            values = {
                "kind": question.kind,
                "question": question.text,
                "evidence": evidence,
                "options": options,
            }
            texts.append(render(self._template, values, what="decision template"))
            evidence = ""
        return "\n".join(texts)

    def labels(self, question: Question) -> list[str]:
        """Return the text that stands for each option."""
        names = [option.name for option in question.options]
        if (
            question.kind == "yes-no"
            or self._spec.labels == "words"
            or len(names) > len(string.ascii_uppercase)
        ):
            return names
        return list((string.digits if question.kind == "score" else string.ascii_uppercase)[: len(names)])

    def plan(
        self,
        questions: Sequence[Question],
        messages: Sequence[Message],
        insets: Sequence[Inset],
        *,
        sharing: Sharing,
        both_orders: bool,
        can_branch: bool,
    ) -> Plan:
        """Return all questions ready to run.

        Args:
            questions: The questions.
            messages: The conversation; the last turn is evidence.
            insets: Texts that replace its images and videos.
            sharing: See ``Pipeline.decide``.
            both_orders: Likewise.
            can_branch: Whether the bundle can run a question after the rows of another prompt.

        Raises:
            PromptTooLongError: If a prompt has more tokens than the bundle has room for.
            ShapeError: If an answer cannot be told from the others, or the questions cannot share a prefill as wanted.
        """
        if sharing not in ("auto", "each", "joint"):
            raise ShapeError(f"sharing: expected 'auto', 'each' or 'joint', got {sharing!r:.80}; choose one")
        rounds = []
        for question in questions:
            orders = {self.text_of([question], messages): question}
            if both_orders and question.kind != "yes-no":
                orders.setdefault(self.text_of([question.reversed()], messages), question.reversed())
            rounds.append([self._ask(one, text, messages, insets) for text, one in orders.items()])
        prompts = [asked.ids for orders in rounds for asked in orders]
        if sharing == "each" or (sharing == "auto" and len(prompts) == 1):
            return Plan(rounds, None)
        joint = prompts[0]  # any question will do, if nothing is dropped
        if self._manifest.schedule.stages or self._manifest.token_method is not None:
            with suppress(PromptTooLongError):
                joint = self._encode(self.text_of(questions, messages), messages, insets)[1]
        can_share = can_branch and _differ_only_at_the_end([joint, *prompts])
        if sharing == "joint" and not can_share:
            raise ShapeError(
                "sharing: expected an image, a bundle exported with --follow-ups, and a chat template that writes the question"
                " after the image, got others; use sharing='each'"
            )
        return Plan(rounds, joint if can_share else None)

    def _ask(
        self, question: Question, text: str, messages: Sequence[Message], insets: Sequence[Inset]
    ) -> Asked:
        tokenizer, spec = self._tokenizer, self._manifest.text
        rendered, ids = self._encode(text, messages, insets)
        labels = self.labels(question)
        for label in labels:
            tokenizer.check_user_text(label)
        found = label_tokens(
            labels,
            encode=lambda texts: [
                ids.tolist() for ids in tokenizer.with_endings(rendered, spec, insets, texts)
            ],
            decode=tokenizer.decode,
            most_tokens=self._manifest.max_new_tokens,
        )
        return Asked(question, text, ids, found)

    def _encode(
        self, text: str, messages: Sequence[Message], insets: Sequence[Inset]
    ) -> tuple[str, PromptIds]:
        """Return the rendered prompt and its ids."""
        spec, most = self._manifest.text, self._manifest.text_buckets[-1]
        rendered = prompt_text(
            with_text(messages, text),
            tokenizer=self._tokenizer,
            template=self._chat_template,
            text=spec,
            max_tokens=most,
        )
        ids = self._tokenizer.encode_prompt(rendered, spec, insets)
        check_length(ids.num_tokens, most, "text tokens")
        return rendered, ids

    def temperature(self, question: Question) -> float:
        """Return the number that divides the logarithms of a question's probabilities."""
        return self._temperatures.get(question.kind, 1.0)


def read_temperatures(bundle: Path) -> dict[QuestionKind, float]:
    """Return what ``trio-calibrate --temperatures`` stored in a bundle, by kind of question; nothing if it did not run.

    Raises:
        BundleError: If the file is broken.
    """
    path = bundle / TEMPERATURES_NAME
    try:
        if not path.exists():
            return {}
        content = read_regular(path, max_bytes=_MOST_BYTES)
        return msgspec.json.decode(content, type=dict[QuestionKind, Temperature])
    except (OSError, msgspec.DecodeError, UnicodeError) as error:
        raise BundleError(
            f"{path}: expected temperatures by kind of question, got {error}; fit them again"
        ) from None


def with_text(messages: Sequence[Message], text: str) -> list[Message]:
    """Return the conversation with ``text`` in place of the last turn's text, after its images."""
    return [
        *messages[:-1],
        {"role": "user", "content": [*visual_parts(messages[-1:]), {"type": "text", "text": text}]},
    ]


def _differ_only_at_the_end(prompts: Sequence[PromptIds]) -> bool:
    """Return whether all prompts show an image, and are equal up to their last visual token."""
    first, *rest = prompts
    if not first.text_before:
        return False
    start = first.text[: first.text_before[-1]]
    return all(
        ids.text_before == first.text_before and np.array_equal(ids.text[: len(start)], start) for ids in rest
    )
