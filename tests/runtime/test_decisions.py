"""Questions and their wording, the tokens of their labels, the shares of their answers, and trio-run's table of them."""

from __future__ import annotations

import itertools
import json
import math
import string
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from tests.bundles import export
from tests.checkpoints import save_checkpoint
from tests.pictures import random_picture
from trio_edge.runtime.bundle.errors import BackendError, BundleError, ManifestError, ShapeError
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.cli import run as cli_run
from trio_edge.runtime.decisions.labels import label_tokens, log_probabilities, normalized
from trio_edge.runtime.decisions.questions import Decision, Option, Question, check_questions
from trio_edge.runtime.decisions.wording import LETTERS_TEMPLATE
from trio_edge.runtime.pipeline import Pipeline
from trio_edge.runtime.prompts.chat import render

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

PICTURE = random_picture(48, 48)


# Questions


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Question.yes_no(""), "expected text, got none"),
        (lambda: Question.yes_no(3), "expected text, got none"),
        (lambda: Question.choice("w1", []), "expected 2..255 options, got 0"),
        (lambda: Question.choice("w1", ["w2"]), "expected 2..255 options, got 1"),
        (lambda: Question.choice("w1", [f"w{i}" for i in range(256)]), "expected 2..255 options, got 256"),
        (lambda: Question.score("w1", [f"w{i}" for i in range(11)]), "expected 2..10 levels, got 11"),
        (lambda: Question.choice("w1", ["w2", " w2 "]), "expected different options, got 'w2' twice"),
        (lambda: Question.choice("w1", ["w2", ""]), "expected a name for each of its options"),
        (lambda: Question.choice("w1", ["w2", 3]), "expected a name for each of its options"),
        (lambda: Question.choice("w1", {"w2": 3, "w3": ""}), "expected a name for each of its options"),
        (lambda: Question.choice("w1", "w2"), "expected a list of names, or descriptions by name, got str"),
        (
            lambda: Question.score("w1", None),
            "expected a list of names, or descriptions by name, got NoneType",
        ),
        (lambda: Question("rank", "w1", (Option("a"), Option("b"))), "expected the kind 'yes-no', 'choice'"),
        (lambda: "w1", "expected a list of 1..400 questions"),
    ],
)
def test_a_question_that_cannot_be_asked_is_one_line(make: Any, message: str) -> None:
    with pytest.raises(ShapeError, match=message.replace("(", r"\(")) as caught:
        check_questions([make()])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given", [[], None, "w1", [Question.yes_no("w1")] * 401, {"w1": 2}])
def test_questions_of_another_number_or_form(given: Any) -> None:
    with pytest.raises(ShapeError, match=r"questions: expected a list of 1\.\.400 questions"):
        check_questions(given)


def test_what_a_decision_says() -> None:
    question = Question.score("how full", {"empty": "nothing", "half": "", "full": "all"})
    decision = Decision(question, (0.2, 0.5, 0.3), 0.9, None)  # type: ignore[arg-type]
    assert (decision.choice, decision.confidence) == ("half", 0.5)
    assert decision.score == pytest.approx(1.1)
    assert decision.by_name() == {"empty": 0.2, "half": 0.5, "full": 0.3}
    assert Decision(Question.yes_no("open?"), (0.25, 0.75), 1.0, None).score == 0.25  # type: ignore[arg-type]


# The wording with letters


def rendered(question: Question, labels: Sequence[str], evidence: str = "") -> str:
    options = [
        {"label": label, "name": option.name, "description": option.description}
        for label, option in zip(labels, question.options)
    ]
    values = {"kind": question.kind, "question": question.text, "evidence": evidence, "options": options}
    return render(LETTERS_TEMPLATE, values)


def test_the_wording_with_letters() -> None:
    assert rendered(Question.yes_no("Is it open?"), ["yes", "no"]) == "Is it open?\nAnswer with yes or no."
    assert rendered(Question.yes_no("Is it open?", no="shut"), ["yes", "no"], "A gate.") == (
        "A gate.\n\nIs it open?\nyes\nno - shut\nAnswer with yes or no."
    )
    assert rendered(Question.choice("State?", {"open": "one can pass", "shut": ""}), ["A", "B"]) == (
        "State?\nA: open - one can pass\nB: shut\nAnswer with one letter."
    )
    assert rendered(Question.score("How full?", ["empty", "full"]), ["0", "1"]) == (
        "How full?\n0: empty\n1: full\nAnswer with one digit."
    )
    names = [f"n{i}" for i in range(27)]
    assert rendered(Question.choice("Which?", names), names).endswith("\nn26\nAnswer with one of these.")


# Labels and their tokens


class Letters:
    """A tokenizer of single characters, after which it knows some words: the longest that fits is one token."""

    def __init__(self, *words: str, lowercase: bool = False, merges: str = "") -> None:
        self.tokens = [*string.printable, *words]
        self.lowercase, self.merges = lowercase, merges

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode_one(text) for text in texts]

    def encode_one(self, text: str) -> list[int]:
        text = ("Q:" + text).lower() if self.lowercase else "Q:" + text
        ids = []
        while text:
            token = max((one for one in self.tokens if text.startswith(one)), key=len)
            ids.append(self.tokens.index(token))
            text = text[len(token) :]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.tokens[token] for token in ids)

    def labels(self, *labels: str, most: int = 4) -> list[set[str]]:
        found = label_tokens(labels, encode=self.encode, decode=self.decode, most_tokens=most)
        return [{"|".join(self.decode([token]) for token in way) for way in ways} for ways in found]


def test_a_label_counts_as_it_is_and_capitalized_with_a_blank_or_not() -> None:
    assert Letters("yes", " Yes").labels("yes", "no") == [
        {"yes", " |yes", "Y|e|s", " Yes"},
        {"n|o", " |n|o", "N|o", " |N|o"},
    ]


def test_a_spelling_of_two_labels_counts_for_the_one_that_is_written_so() -> None:
    assert Letters().labels("us", "Us") == [{"u|s", " |u|s"}, {"U|s", " |U|s"}]


@pytest.mark.parametrize(
    ("letters", "labels"),
    [
        (Letters(lowercase=True), ("us", "US")),  # the tokenizer makes them equal
        (Letters(), ("a", "é")),  # a character that it does not know
        (Letters(), ("a", "word")),  # more tokens than there is room for
        (Letters(":a"), ("a", "b")),  # the prompt's last token changes
    ],
)
def test_a_label_that_cannot_be_told_from_others_is_refused(
    letters: Letters, labels: tuple[str, ...]
) -> None:
    if labels == ("a", "é"):
        letters.encode_one = lambda text: [0, *(1 for _ in text)]  # type: ignore[method-assign]
    if labels == ("a", "b"):
        letters.tokens += [":A", ": "]
    with pytest.raises(
        ShapeError, match="expected one that the model's tokenizer can write after this prompt"
    ):
        letters.labels(*labels, most=3)


class Chain:
    """A model whose logits depend on the tokens so far."""

    def __init__(self, num_tokens: int = 6, most_rows: int = 8) -> None:
        self.so_far: list[int] = []
        self.num_tokens, self.most_rows = num_tokens, most_rows
        self.steps: list[tuple[int, ...]] = []
        self.open: list[int] = []

    def logits(self) -> NDArray[np.float32]:
        seed = 1 + sum((place + 1) * (token + 1) for place, token in enumerate(self.so_far))
        return np.random.default_rng(seed).normal(size=self.num_tokens).astype(np.float32)

    def step(self, tokens: Sequence[int]) -> list[NDArray[np.float32]]:
        rows = []
        for token in tokens:
            self.so_far.append(token)
            rows.append(self.logits())
        self.steps.append(tuple(tokens))
        self.open.append(len(tokens))
        return rows

    def back(self) -> None:
        del self.so_far[-self.open.pop() :]

    def logs(
        self, options: Sequence[set[tuple[int, ...]]], stops: Sequence[int] = (5,)
    ) -> NDArray[np.float64]:
        how: Any = {"step": self.step, "back": self.back, "most_rows": self.most_rows}
        found = log_probabilities(options, self.logits(), stop_ids=stops, **how)
        assert self.so_far == []
        assert max(map(len, self.steps), default=1) <= self.most_rows
        return found

    def expected(self, tokens: Sequence[int], ends: Sequence[int] = ()) -> float:
        chain, total = Chain(self.num_tokens), 0.0
        for token in tokens:
            logits = chain.logits().astype(float)
            total += logits[token] - math.log(np.exp(logits).sum())
            chain.step([token])
        if ends:
            logits = chain.logits().astype(float)
            total += math.log(np.exp(logits[list(ends)]).sum() / np.exp(logits).sum())
        return total


@pytest.mark.parametrize(
    ("most_rows", "steps"),
    [(8, [(1,), (3,), (2, 2, 4)]), (2, [(1,), (3,), (2, 2), (4,)]), (1, [(1,), (3,), (2,), (2,), (4,)])],
)
def test_every_answer_has_the_product_of_its_tokens_and_shares_their_beginnings(
    most_rows: int, steps: list[tuple[int, ...]]
) -> None:
    options = [{(0,), (1, 2)}, {(1, 3, 4), (1, 3, 0)}, {(2, 2, 4, 1)}]
    chain = Chain(most_rows=most_rows)
    expected = [np.logaddexp.reduce([chain.expected(way) for way in ways]) for ways in options]
    np.testing.assert_allclose(chain.logs(options), expected, rtol=1e-12)
    assert chain.steps == steps


@pytest.mark.parametrize("most_rows", [1, 2, 8])
def test_an_answer_that_begins_another_counts_with_its_end(most_rows: int) -> None:
    options = [{(0,)}, {(0, 1, 2, 4)}, {(3,)}]
    for stops in ((5,), (4, 5)):
        chain = Chain(most_rows=most_rows)
        expected = [chain.expected(way, stops) for ways in options for way in ways]
        np.testing.assert_allclose(chain.logs(options, stops), expected, rtol=1e-12)
    chain = Chain()  # no token ends an answer
    np.testing.assert_allclose(
        chain.logs(options, ()), [chain.expected(*ways) for ways in options], rtol=1e-12
    )


def test_all_answers_of_a_length_have_the_whole_probability() -> None:
    options = [{way} for way in itertools.product(range(6), repeat=2)]
    assert np.exp(Chain().logs(options)).sum() == pytest.approx(1.0)


def test_logits_that_overflowed_are_an_error() -> None:
    broken = np.array([1.0, np.nan, 2.0], np.float32)
    with pytest.raises(BackendError, match="expected finite numbers"):
        log_probabilities(
            [{(0,)}, {(1,)}], broken, stop_ids=(), step=lambda _: [broken], back=lambda: None, most_rows=1
        )


def test_a_temperature_evens_shares_out() -> None:
    logs = np.log([0.02, 0.06, 0.12])
    np.testing.assert_allclose(normalized(logs), [0.1, 0.3, 0.6])
    np.testing.assert_allclose(
        normalized(logs, temperature=2.0), np.sqrt([0.1, 0.3, 0.6]) / np.sqrt([0.1, 0.3, 0.6]).sum()
    )
    np.testing.assert_allclose(normalized(np.array([-1e5, -2e5])), [1.0, 0.0])


# Bundles


def test_the_wording_of_a_checkpoint_is_kept(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "ck")
    (folder / "decision_template.jinja").write_text("w9 {{ evidence }} {{ question }} {{ options[1].name }}")
    bundle = open_bundle(export(folder))
    assert bundle.manifest.decisions is not None
    assert (bundle.manifest.decisions.version, bundle.manifest.decisions.labels) == ("own", "words")
    with Pipeline.from_bundle(bundle.folder, threads=1) as pipeline:
        (asked,) = pipeline.decide(PICTURE, Question.choice("w1", ["w2", "w3"]), evidence="w4")
        answer = pipeline.generate(PICTURE, "w9 w4 w1 w3", max_new_tokens=1)
        assert answer.text is not None
        ids = [int(pipeline.tokenizer.plain_ids(word)[0]) for word in ("w2", "w3")]
        logits = answer.first_logits[ids].astype(float)
        np.testing.assert_allclose(
            np.log(asked.probabilities), logits - np.logaddexp.reduce(logits), atol=1e-6
        )
        mean = pipeline.decide(PICTURE, Question.choice("w1", ["w2", "w3"]), both_orders=True)[0]
        turned = pipeline.decide(PICTURE, Question.choice("w1", ["w3", "w2"]))[0]
        one = pipeline.decide(PICTURE, Question.choice("w1", ["w2", "w3"]))[0]
        expected = (np.array(one.probabilities) + np.array(turned.probabilities[::-1])) / 2
        np.testing.assert_allclose(mean.probabilities, expected, rtol=1e-12)


def test_a_broken_wording_is_refused_at_export(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "ck")
    (folder / "decision_template.jinja").write_text("{% for %}")
    with pytest.raises(BundleError, match="decision template: expected valid Jinja text"):
        export(folder)


def test_a_bundle_without_a_wording_says_so(reduced_bundle: Path, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(reduced_bundle, tmp_path / "copy")
    manifest = json.loads((copy / "trio.json").read_text())
    (copy / "trio.json").write_text(json.dumps({**manifest, "decisions": None}))
    with (
        Pipeline.from_bundle(copy, threads=1) as pipeline,
        pytest.raises(BundleError, match=r"expected a bundle with a template for questions.*export it again"),
    ):
        pipeline.decide(PICTURE, Question.choice("w1", ["w2", "w3"]))
    (copy / "decision_template.jinja").unlink()
    (copy / "trio.json").write_text(json.dumps(manifest))
    with pytest.raises((BundleError, ManifestError), match=r"decision_template\.jinja"):
        Pipeline.from_bundle(copy)


def test_another_question_in_between_ends_the_decisions(reduced_bundle: Path) -> None:
    question = Question.choice("w1", ["w2", "w3"])
    with Pipeline.from_bundle(reduced_bundle, threads=1) as pipeline:
        messages = [{"role": "user", "content": [{"type": "image", "image": PICTURE}]}]
        first = pipeline.iter_decisions(messages, [question, question])
        next(first)
        assert pipeline.generate(PICTURE, "w1", max_new_tokens=1).text is not None
        with pytest.raises(
            ShapeError, match="expected no answer between them, one was started; ask the questions again"
        ):
            next(first)
    with pytest.raises(BackendError, match="expected an open one"):
        pipeline.decide(PICTURE, question)


# trio-run


@pytest.mark.parametrize(
    ("options", "question"),
    [
        (["--choices", "w2, w3 w4"], Question.choice("w1", ["w2", "w3 w4"])),
        (["--levels", "w9,w8,w7"], Question.score("w1", ["w9", "w8", "w7"])),
    ],
)
def test_trio_run_prints_probabilities(
    options: list[str],
    question: Question,
    reduced_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    PICTURE.save(tmp_path / "one.png")
    arguments = [str(reduced_bundle), "--image", str(tmp_path / "one.png"), "--prompt", "w1", *options]
    with Pipeline.from_bundle(reduced_bundle) as pipeline:
        (expected,) = pipeline.decide(PICTURE, question)
    drawing = tmp_path / "kept.png"
    assert cli_run.main([*arguments, "--json", "--show-kept", str(drawing)]) == 0
    with Image.open(drawing) as image:  # a panel for each stage
        assert image.width > 2 * 100
    printed = json.loads(capsys.readouterr().out)
    assert printed["probabilities"] == pytest.approx(expected.by_name(), rel=1e-4)
    assert printed["kept_tokens"] == [len(kept) for kept in expected.kept]
    assert cli_run.main(arguments) == 0
    table = capsys.readouterr().out
    for name, share in expected.by_name().items():
        assert any(name in line and f"{100 * share:.1f} %" in line for line in table.splitlines())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--json"], "expected one of --yes-no, --choices and --levels, got none or several"),
        (["--both-orders"], "expected one of --yes-no, --choices and --levels, got none or several"),
        (
            ["--yes-no", "--choices", "w1,w2"],
            "expected one of --yes-no, --choices and --levels, got none or several",
        ),
        (["--choices", "w1"], "expected 2..255 options, got 1"),
        (["--choices", ""], "expected 2..255 options, got 1"),
        (["--choices", "w1,,w2"], "expected a name for each of its options"),
        (["--choices", "w1,zebra"], "label 'zebra': expected one that the model's tokenizer can write"),
        (["--choices", "w1,w2 </s>"], "expected plain text, got the special token '</s>'"),
        (["--choices", "w1,w2", "--seed", "3"], "--seed: expected none with --yes-no"),
        (["--choices", "w1,w2", "--max-new-tokens", "3"], "--max-new-tokens: expected none with --yes-no"),
        (
            ["--choices", "w1,w2", "--show-kept", "kept.gif"],
            "--show-kept: expected a .png, .jpg or .webp file",
        ),
        (["--choices", "w1,w2", "--compare-full", "full"], "full: "),
    ],
)
def test_trio_run_refuses_in_one_line(
    options: list[str], message: str, reduced_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    PICTURE.save(tmp_path / "one.png")
    arguments = [str(reduced_bundle), "--image", str(tmp_path / "one.png"), "--prompt", "w1", *options]
    assert cli_run.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert (len(captured.err.strip().splitlines()), captured.out) == (1, "")
