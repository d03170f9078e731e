"""Token reduction on a real language model: rows of a passage are marked as visual, then a question asks for one of its facts.

    python benchmarks/real_reduction.py --split held-out --count 60 --layer 10      # --split tuning chooses settings

In torch, float32, one stage before ``--layer``. The prompt is a chat; a stage sees nothing of the answer, or with ``--asked word``
its beginning, so that the next token is the word, as in questions that want one word. Measured on the answer's rows, which are
given: KL from keep-all, the log probability of the right word, and how often it is the likeliest ("recall").
Intervals are 95 %, paired by prompt. "Fact" is the share of the asked sentence's rows that a stage keeps, "again" the share of kept
rows whose token another kept row has, "stops" that of full stops, "gap" the longest run of removed rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from parts.arguments import parser_for, positive
from parts.tables import markdown
from real_weights.checkpoints import checkpoint
from real_weights.passages import Passage, passages
from real_weights.texts import as_chat, as_sequence

from trio_edge.calibration.model.gradients import agreement, whole_gradients
from trio_edge.calibration.model.sequence import (
    Sequence,
    advanced,
    answer_logits,
    order_of,
    saliency,
    with_kept,
)
from trio_edge.calibration.model.torch_model import TorchModel, load_model
from trio_edge.profiling.statistics import bootstrap_interval, paired_interval
from trio_edge.runtime.bundle.schedule import Schedule

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

SEEDS = {"tuning": 1, "held-out": 2}


class Prompt(NamedTuple):
    """A passage as rows, before layer 0."""

    sequence: Sequence
    ids: list[int]
    fact: set[int]
    """Visual tokens of the sentence with the answer."""
    word: int
    """The right token."""

    @property
    def word_at(self) -> int:
        """The visual token with the right word."""
        rows = self.sequence.visual_rows_N
        return next(one for one in sorted(self.fact) if self.ids[int(rows[one])] == self.word)


class Stage(NamedTuple):
    """The inputs of a selector."""

    model: TorchModel
    layer: int
    entering: Sequence
    prompt: Prompt
    random: torch.Generator

    def scores(self, rows: str = "reference", count: int = 4) -> Tensor:
        schedule = Schedule(probe_rows="answer" if rows == "answer" else "reference", num_probe_rows=count)
        with torch.no_grad():
            return saliency(self.model, self.layer, schedule, self.entering)

    def whole(self, rows: str = "reference", count: int = 4) -> Tensor:
        schedule = Schedule(probe_rows="answer" if rows == "answer" else "reference", num_probe_rows=count)
        return whole_gradients(self.model, self.entering, schedule, self.layer)[0]

    def lengths(self) -> Tensor:
        return self.entering.hidden_SD[self.entering.visual_rows_N].norm(dim=-1)

    def attention(self) -> Tensor:
        """Return the last prompt row's mean attention to each visual token."""
        entering, length = self.entering, self.entering.prompt_length
        probe = self.model.probe(self.layer, Schedule())
        cos, sin = self.model.rotary(entering.positions_AS[:, :length])
        last = torch.tensor([length - 1])
        state = probe.attend(
            entering.hidden_SD[:length], cos[0], sin[0], entering.visual_rows_N, last, torch.tensor([length])
        )
        return state.attention_HRN[:, 0].mean(0)

    def drawn(self) -> Tensor:
        return torch.rand(self.entering.num_visual, generator=self.random)

    def best(self, scores_N: Tensor, num_keep: int, threshold: float | None = None) -> Tensor:
        """Return the best tokens; with a threshold, those that its NMS leaves come first."""
        if threshold is None:
            return scores_N.topk(num_keep).indices.sort().values
        return order_of(self.entering, scores_N, threshold=threshold).kept(num_keep)

    def uniform(self, num_keep: int) -> Tensor:
        return torch.linspace(0, self.entering.num_visual - 1, num_keep).round().to(torch.int64)

    def one_of_each_part(self, scores_N: Tensor, num_keep: int) -> Tensor:
        """Return the best token of each of ``num_keep`` parts of equal length."""
        edges = np.linspace(0, self.entering.num_visual, num_keep + 1).round().astype(int).tolist()
        return torch.tensor([a + int(scores_N[a:b].argmax()) for a, b in zip(edges, edges[1:])])

    def likeness(self) -> dict[str, float]:
        """Return the longest row's length by the median, and the median cosines of two rows and of two full stops."""
        lengths_N, decode = self.lengths(), self.model.tokenizer.decode
        unit_ND = self.entering.hidden_SD[self.entering.visual_rows_N] / lengths_N[:, None]
        tokens = [self.prompt.ids[int(row)] for row in self.prompt.sequence.visual_rows_N]
        stops = [one for one, token in enumerate(tokens) if decode([token]) == "."]
        found = {"longest row by the median": float(lengths_N.max() / lengths_N.median())}
        for name, rows_RD in (("rows", unit_ND), ("full stops", unit_ND[stops])):
            first, second = torch.triu_indices(len(rows_RD), len(rows_RD), 1)
            found[f"cosine of two {name}"] = float((rows_RD[first] * rows_RD[second]).sum(-1).median())
        return found

    def led_by(self, tokens: list[int], scores_N: Tensor) -> Tensor:
        """Return the scores with some tokens as the best."""
        scores_N[tokens] = scores_N.max() * torch.arange(2, 2 + len(tokens))
        return scores_N

    @property
    def longest(self) -> int:
        return int(self.lengths().argmax())

    def without(self, removed: Iterable[int]) -> Tensor:
        """Return all tokens but some."""
        return torch.tensor(sorted(set(range(self.entering.num_visual)) - set(removed)))

    def fact_first(self, num_keep: int) -> Tensor:
        """Return the asked sentence's tokens, and others evenly spread."""
        rank_N = torch.zeros(self.entering.num_visual)
        rank_N[self.uniform(num_keep)] = 1.0
        rank_N[torch.tensor(sorted(self.prompt.fact))] = 2.0
        return self.best(rank_N, num_keep)


Select = Callable[[Stage, int], "Tensor"]
SELECTORS: dict[str, Select] = {
    "the asked fact, then uniform": lambda stage, K: stage.fact_first(K),
    "trio": lambda stage, K: stage.best(stage.scores(), K, 0.8),
    "trio, answer rows": lambda stage, K: stage.best(stage.scores("answer"), K, 0.8),
    "trio, 8 answer rows": lambda stage, K: stage.best(stage.scores("answer", 8), K, 0.8),
    "trio, 16 answer rows": lambda stage, K: stage.best(stage.scores("answer", 16), K, 0.8),
    "trio, τ 0.6": lambda stage, K: stage.best(stage.scores(), K, 0.6),
    "trio, τ 0.7": lambda stage, K: stage.best(stage.scores(), K, 0.7),
    "trio, τ 0.9": lambda stage, K: stage.best(stage.scores(), K, 0.9),
    "trio, no NMS": lambda stage, K: stage.best(stage.scores(), K),
    "trio, 16 answer rows, no NMS": lambda stage, K: stage.best(stage.scores("answer", 16), K),
    "trio, score × row length": lambda stage, K: stage.best(stage.scores() * stage.lengths(), K, 0.8),
    "trio, score × row length, no NMS": lambda stage, K: stage.best(stage.scores() * stage.lengths(), K),
    "whole gradient": lambda stage, K: stage.best(stage.whole(), K, 0.8),
    "whole gradient, no NMS": lambda stage, K: stage.best(stage.whole(), K),
    "whole gradient, 16 answer rows": lambda stage, K: stage.best(stage.whole("answer", 16), K, 0.8),
    "last row's attention": lambda stage, K: stage.best(stage.attention(), K),
    "last row's attention, NMS": lambda stage, K: stage.best(stage.attention(), K, 0.8),
    "random, NMS": lambda stage, K: stage.best(stage.drawn(), K, 0.8),
    "uniform": lambda stage, K: stage.uniform(K),
    "random": lambda stage, K: stage.best(stage.drawn(), K),
    "recency": lambda stage, K: torch.arange(stage.entering.num_visual - K, stage.entering.num_visual),
    "uniform, without the ends": lambda stage, K: stage.uniform(K + 2)[1:-1],
    "random and both ends": lambda stage, K: stage.best(stage.led_by([0, -1], stage.drawn()), K),
    "trio and both ends": lambda stage, K: stage.best(stage.led_by([0, -1], stage.scores()), K, 0.8),
    "trio and the last token": lambda stage, K: stage.best(stage.led_by([-1], stage.scores()), K, 0.8),
    "trio and the longest row": lambda stage, K: stage.best(
        stage.led_by([stage.longest], stage.scores()), K, 0.8
    ),
    "random, one of each part": lambda stage, K: stage.one_of_each_part(stage.drawn(), K),
    "trio, one of each part": lambda stage, K: stage.one_of_each_part(stage.scores(), K),
    "all but the word": lambda stage, _: stage.without([stage.prompt.word_at]),
    "all but the word and 3 more": lambda stage, _: stage.without(
        range(stage.prompt.word_at, stage.prompt.word_at + 4)
    ),
    "all but the asked fact": lambda stage, _: stage.without(stage.prompt.fact),
    "all but the longest row": lambda stage, _: stage.without([stage.longest]),
    "only 2 tokens": lambda stage, _: stage.uniform(2),
}
"""The last five have the same tokens at every budget."""


def prompt_of(model: TorchModel, passage: Passage, *, asked: str = "sentence") -> Prompt:
    """Return a passage's chat with the beginning of its answer, which for a "word" belongs to what a stage sees."""
    plain = [model.tokenizer.plain_ids(text).tolist() for text in (passage.text, passage.beginning)]
    ids = as_chat(model, f"{passage.text}\n{passage.question}", plain[1])
    words = plain[0][:-1]  # the last full stop and the line break may be one token
    first = next(place for place in range(len(ids)) if ids[place : place + len(words)] == words)
    visual = range(first, first + len(words))
    before = len(model.tokenizer.plain_ids(passage.text[: passage.text.index(passage.fact)].rstrip()))
    inside = len(model.tokenizer.plain_ids(passage.fact))
    fact = set(range(before, min(before + inside, len(words))))
    (word,) = model.tokenizer.plain_ids(passage.word).tolist()
    num_answer = 0 if asked == "word" else len(plain[1])
    return Prompt(replace(as_sequence(model, ids, visual), num_answer=num_answer), ids, fact, word)


def measured(
    model: TorchModel,
    prompt: Prompt,
    layer: int,
    keeps: list[float],
    chosen: dict[str, Select],
    positions: str,
    seed: int,
) -> dict[str, dict[str, float]]:
    """Return the figures of keep-all and of each selector at each budget, by "NAME KEEP"."""
    with torch.no_grad():
        entering = advanced(model, prompt.sequence, range(layer))
        exact_TV = torch.log_softmax(
            answer_logits(model, advanced(model, entering, range(layer, model.num_layers))).double(), -1
        )
    last = exact_TV[-1]
    stage = Stage(model, layer, entering, prompt, torch.Generator())
    with torch.no_grad():
        own_N, others = stage.scores(), {"1 / length": 1 / stage.lengths(), "attention": stage.attention()}
    by = {
        f"rank correlation of the saliency with {name}": agreement(own_N, other_N, num_keep=1).spearman
        for name, other_N in others.items()
    }
    by |= stage.likeness()
    found = {"all": {**by, "log p": float(last[prompt.word]), "recall": float(last.argmax() == prompt.word)}}
    for name, select in chosen.items():
        for keep in keeps:
            stage = Stage(model, layer, entering, prompt, torch.Generator().manual_seed(seed))
            kept_K = select(stage, max(round(keep * entering.num_visual), 2))
            with torch.no_grad():
                reduced = with_kept(
                    entering, kept_K, positions="preserved" if positions == "preserved" else "compact"
                )
                logits_TV = answer_logits(model, advanced(model, reduced, range(layer, model.num_layers)))
            log_q_TV = torch.log_softmax(logits_TV.double(), -1)
            tokens = [prompt.ids[int(prompt.sequence.visual_rows_N[one])] for one in kept_K]
            gaps = np.diff([-1, *kept_K.tolist(), entering.num_visual])
            found[f"{name} {keep}"] = {
                "KL": float((exact_TV.exp() * (exact_TV - log_q_TV)).sum(-1).mean()),
                "log p": float(log_q_TV[-1, prompt.word]),
                "recall": float(log_q_TV[-1].argmax() == prompt.word),
                "fact": len(prompt.fact & set(kept_K.tolist())) / len(prompt.fact),
                "again": 1 - len(set(tokens)) / len(tokens),
                "stops": sum(model.tokenizer.decode([token]) == "." for token in tokens) / len(tokens),
                "gap": float(gaps.max() - 1),
            }
    return found


def table(results: list[dict[str, dict[str, float]]], keep: float, names: list[str], *, base: str) -> str:
    """Return the table of one budget, best KL first; differences are from ``base``."""
    images = [str(index) for index in range(len(results))]

    def of(name: str, figure: str) -> list[float]:
        return [one[name][figure] for one in results]

    rows = []
    for name in sorted(names, key=lambda one: np.mean(of(f"{one} {keep}", "KL"))):
        key = f"{name} {keep}"
        low, high = bootstrap_interval(of(key, "KL"), images)
        difference = np.mean(of(key, "KL")) - np.mean(of(f"{base} {keep}", "KL"))
        interval = paired_interval(of(key, "KL"), of(f"{base} {keep}", "KL"), images)
        words_low, words_high = bootstrap_interval(of(key, "log p"), images)
        rows.append(
            (
                f"{name}",
                f"{np.mean(of(key, 'KL')):.2f} ({low:.2f}–{high:.2f})",
                "" if name == base else f"{difference:+.2f} ({interval[0]:+.2f} to {interval[1]:+.2f})",
                f"{np.mean(of(key, 'log p')):.2f} ({words_low:.2f} to {words_high:.2f})",
                f"{100 * np.mean(of(key, 'recall')):.0f}",
                f"{100 * np.mean(of(key, 'fact')):.0f}",
                f"{100 * np.mean(of(key, 'again')):.0f}",
                f"{100 * np.mean(of(key, 'stops')):.0f}",
                f"{np.mean(of(key, 'gap')):.1f}",
            )
        )
    heads = (
        "selector",
        "KL, nats",
        f"minus {base}",
        "log p",
        "recall %",
        "fact %",
        "again %",
        "stops %",
        "gap",
    )
    return markdown(heads, rows)


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--split", choices=list(SEEDS), default="held-out")
    parser.add_argument("--count", type=positive, default=60)
    parser.add_argument("--layer", type=positive, default=10)
    parser.add_argument("--keeps", type=float, nargs="+", default=[1 / 3, 0.15])
    parser.add_argument("--asked", choices=["sentence", "word"], default="sentence")
    parser.add_argument("--positions", choices=["compact", "preserved"], default="compact")
    parser.add_argument("--selectors", nargs="+", choices=list(SELECTORS), default=list(SELECTORS))
    parser.add_argument("--out", type=Path, default=Path("out/real"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(str(checkpoint("llava", options.out)))
    chosen = {name: SELECTORS[name] for name in options.selectors}
    keeps = [round(keep, 3) for keep in options.keeps]
    results, num_visual = [], []
    for number, passage in enumerate(passages(options.count, seed=SEEDS[options.split])):
        prompt = prompt_of(model, passage, asked=options.asked)
        num_visual.append(prompt.sequence.num_visual)
        results.append(measured(model, prompt, options.layer, keeps, chosen, options.positions, number))
    name = (
        f"reduction-{options.split}-{options.asked}-{options.layer}-{options.positions}-{options.count}.json"
    )
    (options.out / name).write_text(json.dumps(results), encoding="utf-8")
    whole = {name: np.mean([one["all"][name] for one in results]) for name in results[0]["all"]}
    setting = (
        f"stage before layer {options.layer}, {options.positions} positions, asked for a {options.asked}"
    )
    print(
        f"{options.split}, {options.count} prompts, {np.mean(num_visual):.0f} visual rows, {setting}; keep-all:"
    )
    print(*(f"{name} {value:.2f}" for name, value in whole.items()), "", sep="\n")
    base = "trio" if "trio" in chosen else options.selectors[0]
    for keep in keeps:
        print(f"{100 * keep:.1f} %\n\n{table(results, keep, options.selectors, base=base)}\n")


if __name__ == "__main__":
    main()
