"""Accuracy, FLOPs and first-token times of a bundle's levels, and the counted work of released models at levels.

    python benchmarks/levels.py bundle questions.jsonl --held-out 50%     # a bundle exported with --level
    python benchmarks/levels.py bundle questions.jsonl --decide           # probabilities of a fixed set of answers
    python benchmarks/levels.py --counted                                 # LLaVA-NeXT-7B, Qwen3-VL-4B, SmolVLM2-256M

Margins are found on one part of the questions, everything else is measured on the other. "random" goes up as often as "auto",
but anywhere; "oracle" knows which answers are wrong and goes up only where that helps.
"""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from parts.arguments import errors_in_one_line, parser_for, positive
from parts.tables import head, row

from trio_edge.calibration.evaluate.decisions import question_of, right_option, with_options
from trio_edge.calibration.levels import (
    WANTED_ACCURACY,
    Answered,
    Chain,
    add_flops,
    answered,
    best_chain,
    judged_on,
)
from trio_edge.calibration.metrics import metric_for
from trio_edge.calibration.progress import SILENT
from trio_edge.calibration.questions import read_questions
from trio_edge.calibration.search.samples import split_samples
from trio_edge.profiling.predict.answer import predict
from trio_edge.profiling.predict.plan import plan_for
from trio_edge.runtime.images.reading import open_image
from trio_edge.runtime.pipeline import Pipeline
from trio_edge.trio.cost.devices import find_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio_edge.calibration.levels import JudgedChain
    from trio_edge.calibration.questions import Sample

SHARE_UP = 0.2
DEVICE = "jetson-orin-nx-16"
SIZE = (1024, 1024)
USUAL = "11.1%"
MODELS = {
    "llava-next-7b": ("base", ("11.1%", "33.3%", "100%")),
    "qwen3-vl-4b": ("512x512", ("11.1%", "33.3%", "100%")),
    "smolvlm2-256m": ("base", ("33.3%", "100%")),
}
HEADERS = ("level", "accuracy", "against the highest, points", "mean FLOPs", "went up")


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument("questions", type=Path, nargs="?")
    parser.add_argument("--held-out", type=float, default=0.5)
    parser.add_argument("--accuracy", type=float, default=WANTED_ACCURACY)
    parser.add_argument(
        "--mean-flops", type=float, help="also the most accurate at this share of the highest level's"
    )
    parser.add_argument("--timed", type=positive, default=100, help="questions whose first token is timed")
    parser.add_argument("--decide", action="store_true")
    parser.add_argument("--counted", action="store_true")
    options = parser.parse_args()
    with errors_in_one_line(parser):
        if options.counted:
            print_counted()
            return
        if options.questions is None:
            parser.error("expected a bundle and questions, or --counted; give them")
        questions = read_questions(options.questions)
        if options.decide:
            questions = with_options(questions)
        split = split_samples(questions, held_out=options.held_out, seed=0)
        ask = decided if options.decide else partial(answered, metric=metric_for(questions), progress=SILENT)
        with Pipeline.from_bundle(options.bundle, threads=1) as pipeline:
            names = pipeline.manifest.level_names
            searched, held = ([ask(pipeline, sample) for sample in part] for part in split)
            for mean_flops in dict.fromkeys((options.mean_flops, None)):
                chain = best_chain(searched, names, accuracy=options.accuracy, mean_flops=mean_flops)
                print(f"{len(held)} held-out questions, margins found on {len(searched)}: {chain.margins}\n")
                print_accuracies(chain, held, names)
                print_sure_and_wrong(chain, held, split.held_out)
            if not options.decide:
                print_times(pipeline, chain, split.held_out[: int(options.timed)], names)


def decided(pipeline: Pipeline, sample: Sample) -> Answered:
    """Decide a sample at every level; the margin is that of its options' probabilities."""
    found = Answered(sample.image_id, {}, {}, {})
    images, question = [open_image(path) for path in sample.images], question_of(sample)
    for name in pipeline.manifest.level_names:
        (decision,) = pipeline.decide(images, question, level=name)
        found.score[name] = float(decision.choice == sample.options[right_option(sample)])
        found.margin[name] = decision.margin
        add_flops(found, pipeline, name, images, num_text=decision.statistics.text_tokens)
    return found


def print_accuracies(chain: Chain, held: Sequence[Answered], names: Sequence[str]) -> None:
    top = Chain({names[-1]: 0.0})
    print(*head(HEADERS), sep="\n")
    for one in (*(Chain({name: 0.0}) for name in names), chain):
        print(_judged_row(judged_on(one, held, top=top)))
    low, *others = chain.margins
    if not others:
        return
    high = others[-1]
    up = np.array([len(chain.stops(sample)) > 1 for sample in held])
    lows, highs = (np.array([sample.score[level] for sample in held]) for level in (low, high))
    whole = top.flops_of(held)
    cost = np.mean([sample.flops[None, low] for sample in held]) / whole
    more = np.mean([sample.flops[low, high] for sample in held]) / whole
    helped = highs > lows
    print(
        row(
            (
                "random, as often",
                f"{100 * (lows.mean() * (1 - up.mean()) + highs.mean() * up.mean()):.1f} %",
                "",
                f"{100 * (cost + up.mean() * more):.1f} %",
                f"{100 * up.mean():.1f} %",
            )
        )
    )
    print(
        row(
            (
                "oracle",
                f"{100 * np.maximum(lows, highs).mean():.1f} %",
                "",
                f"{100 * (cost + helped.mean() * more):.1f} %",
                f"{100 * helped.mean():.1f} %",
            )
        )
    )


def _judged_row(one: JudgedChain) -> str:
    return row(
        (
            one.label,
            f"{100 * one.accuracy:.1f} % ({100 * one.interval[0]:.1f} to {100 * one.interval[1]:.1f})",
            f"{100 * one.difference[0]:+.1f} to {100 * one.difference[1]:+.1f}",
            f"{100 * one.flops:.1f} %",
            f"{100 * one.up:.1f} %",
        )
    )


def print_sure_and_wrong(chain: Chain, held: Sequence[Answered], samples: Sequence[Sample]) -> None:
    """Print the questions that the lowest level of "auto" gets wrong while it is sure, and a higher one right."""
    low = next(iter(chain.margins))
    missed = [
        (sample.margin[low], question.prompt)
        for sample, question in zip(held, samples)
        if chain.stops(sample) == [low] and sample.score[low] < max(sample.score.values())
    ]
    print(f"\nwrong at {low} while sure, and right at a higher level: {len(missed)}")
    for margin, text in sorted(missed, reverse=True)[:10]:
        print(f"- {text} (margin {margin:.2f})")


def print_times(pipeline: Pipeline, chain: Chain, samples: Sequence[Sample], names: Sequence[str]) -> None:
    """Print the mean and the median first token of each level, which take turns at every question."""
    pipeline._margins = dict(chain.margins)
    times: dict[str, list[float]] = {name: [] for name in (*names, "auto")}
    for sample in samples:
        for name, found in times.items():
            answer = pipeline.generate(list(sample.images), sample.question, level=name, max_new_tokens=1)
            _ = answer.text
            found.append(answer.statistics.ttft_ms)
    print(f"\nfirst token of {len(samples)} questions, levels in turns\n")
    print(*head(("level", "mean ms", "median ms")), sep="\n")
    for name, found in times.items():
        print(row((name, f"{statistics.fmean(found):.1f}", f"{statistics.median(found):.1f}")))


def print_counted() -> None:
    """Print the prefill's work of a low level with a share sent up, against ``USUAL`` alone."""
    headers = (
        "model",
        "low level",
        "visual tokens",
        "GFLOP",
        "mean with 20 % up",
        "mean first token, Orin NX",
    )
    print(*head(headers), sep="\n")
    for model, (form, keeps) in MODELS.items():
        usual = _work(model, USUAL, None)
        print(
            row(
                (
                    model,
                    f"none: {USUAL} of all",
                    str(usual[2]),
                    f"{usual[0]:.0f}",
                    "100 %",
                    f"{usual[1]:.0f} ms",
                )
            )
        )
        for keep in keeps:
            flops, seconds, tokens = _work(model, keep, form)
            shares = [
                (low + SHARE_UP * high) / high for low, high in ((flops, usual[0]), (seconds, usual[1]))
            ]
            mean = seconds + SHARE_UP * usual[1]
            cells = (f"{keep} of {form}", str(tokens), f"{flops:.0f}", f"{100 * shares[0]:.0f} %")
            print(row((model, *cells, f"{mean:.0f} ms ({100 * shares[1]:.0f} %)")))


def _work(model: str, keep: str, form: str | None) -> tuple[float, float, int]:
    """Return GFLOPs and predicted milliseconds of a prefill, and the image's visual tokens."""
    setting = plan_for(model=model, keep=keep, image_size=SIZE, image_form=form, num_new=32)
    found = predict(setting, find_device(DEVICE))
    flops = sum(timed.run.work.flops for timed in found.runs if timed.run.phase == "prefill")
    return flops / 1e9, 1e3 * found.seconds("prefill"), setting.visual_rows[0]


if __name__ == "__main__":
    main()
