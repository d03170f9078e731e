"""Cost of profiling: answers with and without it in turns, and the hooks alone around launches that do nothing.

    python benchmarks/profile_overhead.py out/tiny --threads 1 --answers 600

With profiling, every launch and every token is timed and all sensors are read five times a second, as in ``trio-profile``. Without
it, the same graphs are loaded once more. Both kinds of answers alternate, and so does the first of each pair. The median over
pairs is printed, because other programs disturb both answers of a pair alike.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from parts.arguments import parser_for

from trio_edge.profiling.measure.answers import LoadedBundle, RunQuestion, without_stop_tokens
from trio_edge.profiling.measure.measuring import PROMPT, measured_sizes, random_image
from trio_edge.profiling.measure.recording import Recording
from trio_edge.profiling.measure.sensors.sampling_thread import INTERVAL_SECONDS, SamplingThread, open_sensors
from trio_edge.profiling.report.table import with_interval
from trio_edge.profiling.statistics import distribution, in_brackets
from trio_edge.runtime.backends.registry import make_backend
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.devices.host import HostDevice
from trio_edge.runtime.devices.interface import LoadedGraphs
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from trio_edge.profiling.measure.sensors.sampling_thread import Sensor
    from trio_edge.runtime.devices.interface import PreparedLaunch

WARM_UP, REPEATS = 5, 20
BEYOND_CACHES = 4 << 20
"""Numbers of 8 bytes."""


class Cost(NamedTuple):
    wall_ms: float
    cpu_ms: float
    """Processor time of all threads."""


class _Gated:
    """A sensor that is read only while it is open."""

    def __init__(self, sensor: Sensor) -> None:
        self.open = False
        self.name = sensor.name
        self._sensor = sensor

    def read(self) -> dict[str, float]:
        return self._sensor.read() if self.open else {}

    def close(self) -> None:
        self._sensor.close()


class _Nothing:
    capturable = False

    def enqueue(self) -> None:
        pass


def cost_of(run: Callable[[], object]) -> Cost:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return Cost(1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu))


def plain(pipeline: Pipeline, question: RunQuestion) -> Cost:
    def run() -> None:
        for _ in pipeline.generate(question.image, question.prompt, max_new_tokens=question.new_tokens):
            pass

    return cost_of(run)


def hooks_ms(num_launches: int) -> float:
    """Return the time to record that many launches and read their times, with caches as cold as between graphs."""
    much = np.ones(BEYOND_CACHES)
    recording = Recording(LoadedGraphs(device=HostDevice(), engines={}, memory={}))
    nothing = _Nothing()
    recorded = recording.timed(nothing, ("graph", "decode"), capture=False)

    def run(launch: PreparedLaunch) -> float:
        times = []
        for _ in range(num_launches):
            much.sum()
            times.append(cost_of(launch.enqueue).wall_ms)
        return statistics.median(times) * num_launches

    found = []
    for _ in range(REPEATS):
        more = run(recorded) - run(nothing)
        found.append(more + cost_of(recording.take).wall_ms)
    return statistics.median(found)


def sensors_ms() -> float:
    """Return the least time of reading all sensors once."""
    sensors, _ = open_sensors()
    found = min(cost_of(lambda: [sensor.read() for sensor in sensors]).wall_ms for _ in range(REPEATS))
    for sensor in sensors:
        sensor.close()
    return found


def print_cost(name: str, without: Sequence[float], with_it: Sequence[float]) -> None:
    more = distribution([100 * (after / before - 1) for before, after in zip(without, with_it)])
    texts = [with_interval(distribution(values)) for values in (without, with_it)]
    print(
        f"{name}: {texts[0]} ms without, {texts[1]} ms with: {more.p50:+.2f} %{in_brackets(more.interval_95, '+.2f')}"
    )


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--answers", type=int, default=600, help="answers of each kind")
    parser.add_argument("--new-tokens", type=int, default=16)
    options = parser.parse_args()
    bundle = open_bundle(options.bundle)
    backend = make_backend(options.backend, bundle=bundle, threads=options.threads)
    loaded = LoadedBundle(options.bundle, backend)
    unwatched = Pipeline(without_stop_tokens(bundle), backend)
    question = RunQuestion(
        image=random_image(measured_sizes(loaded.pipeline)[0]),
        prompt=PROMPT,
        new_tokens=min(options.new_tokens, bundle.manifest.max_new_tokens),
    )
    num_launches = len(loaded.answer(question).calls)
    sensors = [_Gated(sensor) for sensor in open_sensors()[0]]

    def profiled() -> Cost:
        for sensor in sensors:
            sensor.open = True
        cost = cost_of(lambda: loaded.answer(question))
        for sensor in sensors:
            sensor.open = False
        return cost

    without: list[Cost] = []
    with_it: list[Cost] = []
    kinds = [(lambda: plain(unwatched, question), without), (profiled, with_it)]
    with SamplingThread(sensors):
        for number in range(options.answers + WARM_UP):
            for kind, costs in kinds if number % 2 else reversed(kinds):
                costs.append(kind())
    loaded.close()
    unwatched.close()
    without, with_it = without[WARM_UP:], with_it[WARM_UP:]
    print_cost("wall time", [one.wall_ms for one in without], [one.wall_ms for one in with_it])
    print_cost("CPU time", [one.cpu_ms for one in without], [one.cpu_ms for one in with_it])
    least = min(one.cpu_ms for one in without)
    hooks, sensors = hooks_ms(num_launches), sensors_ms()
    share = 100 * (hooks / least + sensors / (1e3 * INTERVAL_SECONDS))
    print(
        f"hooks alone: {num_launches} launches {1e3 * hooks:.0f} us, sensors {1e3 * sensors:.0f} us: {share:.2f} % of the"
        f" fastest answer ({least:.1f} ms; median {statistics.median(one.cpu_ms for one in without):.1f} ms of CPU time)"
    )


if __name__ == "__main__":
    main()
