"""What profiling costs: answers of one bundle with and without hooks and sensors, in turns, and the ratio of their medians.

    python benchmarks/profile_overhead.py out/tiny --answers 300

Without: the pipeline as ``trio-run`` uses it. With: events around every launch of every graph, a moment for every token, and
all sensors of the machine read five times a second, as in ``trio-profile``.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from trio_edge.runtime.backend import make_backend
from trio_edge.runtime.bundle import open_bundle
from trio_edge.runtime.pipeline import Pipeline
from trio_edge.runtime.profiling.answers import Question, Subject, endless
from trio_edge.runtime.profiling.distribution import distribution, median_ratio
from trio_edge.runtime.profiling.pictures import PROMPT, picture_sizes, random_picture
from trio_edge.runtime.profiling.report_table import with_interval
from trio_edge.runtime.profiling.sampling_thread import SamplingThread
from trio_edge.runtime.profiling.sensor import open_sensors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

WARM_UP = 5


class Cost(NamedTuple):
    wall_ms: float
    cpu_ms: float
    """Of all threads; other programs on the machine do not count."""


def cost_of(run: Callable[[], object]) -> Cost:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return Cost(1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu))


def plain(pipeline: Pipeline, question: Question) -> Cost:
    def run() -> None:
        answer = pipeline.generate(question.picture, question.prompt, max_new_tokens=question.new_tokens)
        for _ in answer:
            pass

    return cost_of(run)


def hooked(subject: Subject, question: Question) -> Cost:
    sensors, _ = open_sensors()
    with SamplingThread(sensors):
        return cost_of(lambda: subject.answer(question))


def print_cost(name: str, without: Sequence[float], with_hooks: Sequence[float]) -> None:
    ratio = median_ratio(with_hooks, without)
    low, high = (100 * (end - 1) for end in ratio.interval_95)
    texts = [with_interval(distribution(values)) for values in (without, with_hooks)]
    print(f"{name}: {texts[0]} ms without, {texts[1]} ms with")
    print(f"{name}: profiling adds {100 * (ratio.value - 1):+.2f} % ({low:+.2f} – {high:+.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--answers", type=int, default=200, help="of each kind")
    parser.add_argument("--new-tokens", type=int, default=16)
    options = parser.parse_args()
    bundle = open_bundle(options.bundle)
    backend = make_backend(options.backend, bundle=bundle, threads=options.threads)
    subject = Subject(options.bundle, backend)
    with Pipeline(endless(bundle), backend) as pipeline:
        question = Question(
            picture=random_picture(picture_sizes(pipeline)[0]),
            prompt=PROMPT,
            new_tokens=min(options.new_tokens, bundle.manifest.max_new_tokens),
        )
        pairs = [
            (plain(pipeline, question), hooked(subject, question)) for _ in range(options.answers + WARM_UP)
        ][WARM_UP:]
    subject.close()
    print_cost("wall time", [one.wall_ms for one, _ in pairs], [two.wall_ms for _, two in pairs])
    print_cost("CPU time", [one.cpu_ms for one, _ in pairs], [two.cpu_ms for _, two in pairs])


if __name__ == "__main__":
    main()
