"""TRIO's saliency against the whole model's gradient: by layer, and in answers.

    python benchmarks/real_gradient.py --models tiny out/small-vlm --parts layers --count 60
    python benchmarks/real_gradient.py --models passages --parts layers --count 60      # SmolLM2-135M-Instruct, make real

By layer, without reduction: rank correlation, and overlap of the best ninth. ``answers`` lets the whole gradient choose in place
of the saliency at the same stages: an upper bound of what a better proxy of the gradient can give. Divergence is over keep-all's
answer, at most ``--answer-tokens`` tokens. Models are "tiny" (questions of examples/tiny_model), "passages" (no image), or the
folder of the small VLM (questions of examples/small_vlm). In torch, float32; intervals are 95 %, by bootstrap over images.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np
import torch
from parts.arguments import parser_for, positive
from parts.drawn_questions import drawn_questions
from parts.tables import markdown
from real_reduction import SEEDS, prompt_of
from real_weights.checkpoints import checkpoint
from real_weights.passages import passages

from trio_edge.calibration.model.gradients import agreements, whole_gradient
from trio_edge.calibration.model.greedy import divergence, greedy_answer, keep_all
from trio_edge.calibration.model.prompts import make_prompt
from trio_edge.calibration.model.sequence import saliency
from trio_edge.calibration.model.torch_model import load_model
from trio_edge.calibration.questions import read_questions
from trio_edge.profiling.statistics import bootstrap_interval, paired_interval, score_interval
from trio_edge.runtime.bundle.schedule import Schedule
from trio_edge.trio.budgets import ScheduleRequest, parse_keep

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio_edge.calibration.model.sequence import Sequence as Rows
    from trio_edge.calibration.model.torch_model import TorchModel

ROWS = ("reference", "answer")


class Asked(NamedTuple):
    """A prompt, its image and its right answers."""

    prompt: Rows
    image: str
    answers: tuple[str, ...] = ()


def asked_of(name: str, options: Any) -> tuple[TorchModel, list[Asked]]:
    """Return a model and what it is asked."""
    if name == "passages":
        model = load_model(str(checkpoint("llava", options.out)))
        texts = passages(options.count, seed=SEEDS["tuning"])
        return model, [Asked(prompt_of(model, one).sequence, str(i)) for i, one in enumerate(texts)]
    model = load_model(name)
    file = drawn_questions(options.count, seed=0) if name == "tiny" else options.sentences
    questions = read_questions(file, count=options.count)
    with torch.no_grad():
        return model, [Asked(make_prompt(model, one), one.image_id, one.answers) for one in questions]


def mean_of(values: Sequence[float], images: Sequence[str], places: str = ".2f") -> str:
    low, high = bootstrap_interval(values, images)
    return f"{np.mean(values):{places}} ({low:{places}} to {high:{places}})"


def by_layer(model: TorchModel, every: list[Asked]) -> str:
    """Return the agreement of each layer with both kinds of probe rows."""
    images = [one.image for one in every]
    cells: list[list[str]] = [[str(layer)] for layer in range(model.num_layers)]
    for rows in ROWS:
        found = [agreements(model, one.prompt, Schedule(probe_rows=rows)) for one in every]
        for layer, of_layer in enumerate(zip(*found)):
            cells[layer] += [
                mean_of([one.spearman for one in of_layer], images),
                mean_of([one.overlap for one in of_layer], images),
            ]
    return markdown(
        ("layer", "reference rows", "overlap", "answer rows", "overlap"), [tuple(c) for c in cells]
    )


RANKINGS = {"saliency": saliency, "whole gradient": whole_gradient}


def answers(model: TorchModel, every: list[Asked], keeps: list[str], num_tokens: int) -> str:
    """Return accuracy and divergence by budget, probe rows and what ranks the tokens."""
    images = [one.image for one in every]
    most = max(sizes["N"] for sizes in model.images.any_image_sizes())

    def right(tokens: list[int], one: Asked) -> float:
        ids = [token for token in tokens if token not in model.text.stop_token_ids]
        return float(model.tokenizer.decode(ids).strip().lower() in {text.lower() for text in one.answers})

    def per_cent(scores: list[float]) -> str:
        low, high = score_interval(scores, images)
        return f"{100 * np.mean(scores):.1f} ({100 * low:.1f}–{100 * high:.1f})"

    with torch.no_grad():
        wholes = [keep_all(model, one.prompt, num_tokens=num_tokens) for one in every]
    kept_all = [right(answer.tokens, one) for answer, one in zip(wholes, every)]
    found = [("100%", "", "all tokens", per_cent(kept_all), "", "")]
    for keep in keeps:
        request = ScheduleRequest(average=parse_keep(keep))
        usual = request.schedule(num_layers=model.num_layers, num_visual=most, positions=model.positions)
        for rows in ROWS:
            schedule = msgspec.structs.replace(usual, probe_rows=rows)
            kls_of: dict[str, list[float]] = {}
            for name, score in RANKINGS.items():
                scores, kls = [], []
                for one, answer, was_right in zip(every, wholes, kept_all):
                    with torch.no_grad():
                        given = greedy_answer(
                            model,
                            one.prompt,
                            schedule,
                            max_tokens=len(answer.tokens),
                            given=answer.tokens,
                            score=score,
                        )
                        measured = divergence(answer.log_probs_TV, answer.tokens, given.logits_TV, rounds=0)
                        kls.append(measured.kl)
                        if measured.agrees:
                            scores.append(was_right)
                            continue
                        free = greedy_answer(model, one.prompt, schedule, max_tokens=num_tokens, score=score)
                        scores.append(right(free.tokens, one))
                kls_of[name] = kls
                less, more = paired_interval(kls, kls_of["saliency"], images)
                change = f"{np.mean(kls) - np.mean(kls_of['saliency']):+.3f} ({less:+.3f} to {more:+.3f})"
                found.append(
                    (
                        keep,
                        rows,
                        name,
                        per_cent(scores),
                        f"{np.mean(kls):.3f}",
                        change if name != "saliency" else "",
                    )
                )
                print(found[-1], flush=True)
    return markdown(("keep", "probe rows", "ranked by", "right, %", "KL, nats", "minus saliency's"), found)


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--models", nargs="+", default=["tiny", "out/small-vlm", "passages"], metavar="MODEL")
    parser.add_argument("--parts", nargs="+", choices=["layers", "answers"], default=["layers"])
    parser.add_argument("--count", type=positive, default=60, help="prompts of each model")
    parser.add_argument("--keeps", nargs="+", default=["11.1%", "7.5%"])
    parser.add_argument("--answer-tokens", type=positive, default=24)
    parser.add_argument("--sentences", type=Path, default=Path("out/sentences/questions.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("out/real"), help="folder of the model of passages")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.models:
        model, every = asked_of(name, options)
        if "layers" in options.parts:
            print(f"\n{name}, {len(every)} prompts\n\n{by_layer(model, every)}\n", flush=True)
        if "answers" in options.parts:
            table = answers(model, every, options.keeps, options.answer_tokens)
            print(f"\n{name}, {len(every)} prompts\n\n{table}\n", flush=True)


if __name__ == "__main__":
    main()
