"""TRIO's saliency against the whole model's gradient, on a real language model and on the packaged one.

    python benchmarks/real_gradient.py --count 8 --questions 150

By layer, without reduction: rank correlation, and overlap of the best ninth. Then, on the packaged model, answers when the whole
gradient chooses in place of the saliency, at the same stages: an upper bound of what a better proxy of the gradient can give. In
torch, float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from parts.arguments import parser_for, positive
from parts.drawn_questions import drawn_questions
from parts.tables import markdown
from real_reduction import SEEDS, prompt_of
from real_weights.checkpoints import checkpoint
from real_weights.passages import passages

from trio_edge.calibration.model.gradients import Agreement, agreements, whole_gradients
from trio_edge.calibration.model.prompts import make_prompt
from trio_edge.calibration.model.sequence import advanced, logits_of, order_of, saliency, with_kept
from trio_edge.calibration.model.torch_model import load_model
from trio_edge.calibration.questions import read_questions
from trio_edge.profiling.statistics import paired_interval, score_interval
from trio_edge.runtime.bundle.schedule import Schedule
from trio_edge.trio.budgets import ScheduleRequest, parse_keep

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from trio_edge.calibration.model.sequence import Sequence
    from trio_edge.calibration.model.torch_model import TorchModel

ROWS = ("reference", "answer")
HEADS = ("layer", "reference rows", "overlap", "answer rows", "overlap")


def with_rows(schedule: Schedule, rows: str) -> Schedule:
    return Schedule(
        stages=schedule.stages,
        probe_rows="answer" if rows == "answer" else "reference",
        nms_rounds=schedule.nms_rounds,
    )


def by_layer(model: TorchModel, prompts: list[Sequence]) -> list[tuple[str, ...]]:
    """Return a row for each layer: mean agreement with both kinds of probe rows."""
    cells: list[list[str]] = [[str(layer)] for layer in range(model.num_layers)]
    for rows in ROWS:
        found: list[list[Agreement]] = [
            agreements(model, prompt, with_rows(Schedule(), rows)) for prompt in prompts
        ]
        for layer, of_layer in enumerate(zip(*found)):
            cells[layer].append(f"{np.mean([one.spearman for one in of_layer]):.2f}")
            cells[layer].append(f"{np.mean([one.overlap for one in of_layer]):.2f}")
    return [tuple(row) for row in cells]


def first_token(
    model: TorchModel, prompt: Sequence, schedule: Schedule, score: Callable[[int, Sequence], Tensor]
) -> Tensor:
    """Return log probabilities [V] of the first token when ``score`` ranks the tokens of each stage, before the NMS."""
    sequence, layer = prompt, 0
    for stage in schedule.stages:
        with torch.no_grad():
            sequence, layer = advanced(model, sequence, range(layer, stage.layer)), stage.layer
        scores_N = score(layer, sequence)
        with torch.no_grad():
            order = order_of(sequence, scores_N, threshold=schedule.nms_threshold)
            sequence = with_kept(sequence, order.kept(stage.keep), positions=schedule.positions)
    with torch.no_grad():
        last = advanced(model, sequence, range(layer, model.num_layers)).hidden_SD[-1:]
        return torch.log_softmax(logits_of(model, last)[0].double(), -1)


def accuracies(model: TorchModel, count: int, keeps: list[str]) -> list[tuple[str, ...]]:
    """Return rows of accuracy by budget, probe rows and what ranks the tokens."""
    questions = read_questions(drawn_questions(count, seed=0))
    with torch.no_grad():
        prompts = [make_prompt(model, question) for question in questions]
    images = [question.image_id for question in questions]

    def right(log_p_V: Tensor, index: int) -> float:
        return float(model.tokenizer.decode([int(log_p_V.argmax())]).strip() in questions[index].answers)

    whole = [
        first_token(model, prompt, Schedule(), lambda _layer, one: one.hidden_SD[:, 0]) for prompt in prompts
    ]
    kept_all = [right(log_p_V, index) for index, log_p_V in enumerate(whole)]
    low, high = score_interval(kept_all, images)
    found = [
        (
            "100%",
            "",
            "all tokens",
            f"{100 * np.mean(kept_all):.1f} ({100 * low:.1f}–{100 * high:.1f})",
            "",
            "",
        )
    ]
    most = max(sizes["N"] for sizes in model.images.any_image_sizes())
    for keep in keeps:
        request = ScheduleRequest(average=parse_keep(keep))
        usual = request.schedule(num_layers=model.num_layers, num_visual=most, positions=model.positions)
        for rows in ROWS:
            schedule = with_rows(usual, rows)
            rankings: dict[str, Callable[[int, Sequence], Tensor]] = {
                "saliency": lambda layer, one, schedule=schedule: _own(model, layer, schedule, one),
                "whole gradient": lambda layer, one, schedule=schedule: whole_gradients(
                    model, one, schedule, layer
                )[0],
                "saliency × row length": lambda layer, one, schedule=schedule: (
                    _own(model, layer, schedule, one) * one.hidden_SD[one.visual_rows_N].norm(dim=-1)
                ),
            }
            own: list[float] = []
            for name, score in rankings.items():
                answers = [first_token(model, prompt, schedule, score) for prompt in prompts]
                scores = [right(log_q_V, index) for index, log_q_V in enumerate(answers)]
                kls = [float((p.exp() * (p - q)).sum()) for p, q in zip(whole, answers)]
                own = own or kls
                low, high = score_interval(scores, images)
                less, more = paired_interval(kls, own, images)
                difference = f"{np.mean(kls) - np.mean(own):+.3f} ({less:+.3f} to {more:+.3f})"
                cell = f"{100 * np.mean(scores):.1f} ({100 * low:.1f}–{100 * high:.1f})"
                found.append(
                    (keep, rows, name, cell, f"{np.mean(kls):.3f}", difference if kls is not own else "")
                )
                print(found[-1], flush=True)
    return found


def _own(model: TorchModel, layer: int, schedule: Schedule, sequence: Sequence) -> Tensor:
    with torch.no_grad():
        return saliency(model, layer, schedule, sequence)


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--count", type=positive, default=8, help="prompts whose layers are compared")
    parser.add_argument("--questions", type=positive, default=150)
    parser.add_argument("--keeps", nargs="+", default=["11.1%", "7.5%"])
    parser.add_argument("--out", type=Path, default=Path("out/real"))
    parser.add_argument(
        "--parts", nargs="+", choices=["tiny", "real", "answers"], default=["tiny", "real", "answers"]
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    tiny = load_model("tiny")
    if "tiny" in options.parts:
        questions = read_questions(drawn_questions(options.questions, seed=0))[: options.count]
        with torch.no_grad():
            prompts = [make_prompt(tiny, question) for question in questions]
        print(
            f"packaged model, {len(prompts)} questions\n\n{markdown(HEADS, by_layer(tiny, prompts))}\n",
            flush=True,
        )
    if "real" in options.parts:
        real = load_model(str(checkpoint("llava", options.out)))
        texts = [prompt_of(real, one).sequence for one in passages(options.count, seed=SEEDS["tuning"])]
        print(f"real model, {len(texts)} passages\n\n{markdown(HEADS, by_layer(real, texts))}\n", flush=True)
    if "answers" in options.parts:
        rows = accuracies(tiny, options.questions, options.keeps)
        heads = ("keep", "probe rows", "ranked by", "right, %", "KL, nats", "minus saliency's")
        print(f"\npackaged model, {options.questions} questions\n\n{markdown(heads, rows)}")


if __name__ == "__main__":
    main()
