"""Waiting time with several replicas: the formula in docs/serving-operation.md, and a simulation that checks it.

    python benchmarks/fleet_size.py --service-ms 400 --spread 0.5
    python benchmarks/fleet_size.py --times times.txt --per-second 6 --wait-ms 500

Requests arrive at random (Poisson) and wait in one queue for the first free replica: M/G/c. The formula is Erlang's C for the
share of requests that wait, with Allen and Cunneen's correction for the spread of the service times, and an exponential wait for
these requests. The simulation draws service times from a gamma distribution, or from measured ones.
"""

from __future__ import annotations

import heapq
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from parts.arguments import errors_in_one_line, parser_for, positive
from parts.tables import markdown

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from numpy.typing import NDArray

REPLICAS = (1, 2, 4, 8)
LOADS = (0.3, 0.5, 0.7, 0.8, 0.9)
WAITS = (0.5, 1.0, 2.0)
MOST_REPLICAS = 1000


def erlang_c(replicas: int, offered: float) -> float:
    """Return the share of requests that wait; ``offered`` is arrivals per service time, below ``replicas``."""
    blocked = 1.0  # Erlang's B, by its recursion over the number of replicas
    for count in range(1, replicas + 1):
        blocked = offered * blocked / (count + offered * blocked)
    return blocked / (1 - offered / replicas * (1 - blocked))


def predicted_wait(replicas: int, offered: float, spread: float) -> tuple[float, float]:
    """Return the mean and the 95th percentile of the wait, in mean service times.

    Args:
        replicas: c.
        offered: Arrivals per mean service time.
        spread: Standard deviation of the service time divided by its mean.
    """
    share = erlang_c(replicas, offered)
    of_those_that_wait = (1 + spread**2) / 2 / (replicas - offered)
    return share * of_those_that_wait, of_those_that_wait * max(0.0, math.log(share / 0.05))


def simulated_waits(
    replicas: int, offered: float, services: NDArray[np.float64], random: np.random.Generator
) -> NDArray[np.float64]:
    """Return the waits, in mean service times, without the first tenth of the requests, which find an empty queue."""
    arrivals = np.cumsum(random.exponential(1 / offered, len(services)))
    free_at, waits = [0.0] * replicas, np.empty(len(services))
    for place, (arrival, service) in enumerate(zip(arrivals.tolist(), services.tolist())):
        start = max(arrival, free_at[0])
        heapq.heapreplace(free_at, start + service)
        waits[place] = start - arrival
    return waits[len(waits) // 10 :]


def drawn_services(
    spread: float, measured: NDArray[np.float64] | None, count: int, random: np.random.Generator
) -> NDArray[np.float64]:
    """Return service times of mean 1."""
    if measured is not None:
        return random.choice(measured / measured.mean(), count)
    return random.gamma(spread**-2, spread**2, count) if spread else np.ones(count)


def replicas_for(per_service: float, spread: float, most_wait: float) -> int:
    """Return the fewest replicas with a 95th percentile of the wait of at most ``most_wait`` service times."""
    for count in range(math.floor(per_service) + 1, MOST_REPLICAS):
        if predicted_wait(count, per_service, spread)[1] <= most_wait:
            return count
    raise SystemExit(f"fleet_size.py: expected fewer than {MOST_REPLICAS} replicas; lower --per-second")


def most_load(replicas: int, spread: float, most_wait: float) -> float:
    """Return the load of a replica at which the 95th percentile of the wait is ``most_wait`` service times."""
    low, high = 0.0, 1.0
    for _ in range(40):
        load = (low + high) / 2
        low, high = (
            (load, high) if predicted_wait(replicas, load * replicas, spread)[1] <= most_wait else (low, load)
        )
    return low


def capacities(spread: float, mean_ms: float) -> str:
    """Return a table of the most requests per second by replicas and wait."""
    heads = [f"wait up to {wait:g} service times" for wait in WAITS]
    rows = []
    for replicas in (*REPLICAS, 16):
        loads = [most_load(replicas, spread, wait) for wait in WAITS]
        told = [f"{1e3 * load * replicas / mean_ms:.2f} ({load:.0%})" for load in loads]
        rows.append((str(replicas), *told))
    return markdown(("replicas", *heads), rows)


def arguments() -> ArgumentParser:
    parser = parser_for(__doc__)
    parser.add_argument(
        "--service-ms", type=float, default=400.0, help="mean time of an answer on a free replica"
    )
    parser.add_argument(
        "--spread", type=float, default=0.5, help="standard deviation of that time / its mean"
    )
    parser.add_argument("--times", type=Path, help="file of measured service times in ms, one per line")
    parser.add_argument("--requests", type=positive, default=200_000, help="requests per simulation")
    parser.add_argument("--per-second", type=float, help="requests per second, to find the replicas for them")
    parser.add_argument(
        "--wait-ms", type=float, default=500.0, help="longest wait of 95 %% of these requests"
    )
    return parser


def main() -> None:
    """Print formula against simulation, and the replicas for a load."""
    parser = arguments()
    options = parser.parse_args()
    with errors_in_one_line(parser):
        measured = None if options.times is None else np.loadtxt(options.times, ndmin=1)
    mean_ms, spread = options.service_ms, options.spread
    if measured is not None:
        mean_ms, spread = float(measured.mean()), float(measured.std() / measured.mean())
    print(f"service time {mean_ms:.0f} ms, spread {spread:.2f}\n")
    random, rows = np.random.default_rng(0), []
    for replicas in REPLICAS:
        for load in LOADS:
            services = drawn_services(spread, measured, options.requests, random)
            waits = simulated_waits(replicas, load * replicas, services, random)
            mean, slow = predicted_wait(replicas, load * replicas, spread)
            found = (waits.mean(), np.percentile(waits, 95))
            told = [f"{mean_ms * value:.0f}" for value in (mean, found[0], slow, found[1])]
            per_second = 1e3 * load * replicas / mean_ms
            rows.append((str(replicas), f"{load:.0%}", f"{per_second:.2f}", *told))
    heads = ("mean wait, ms", "simulated", "95th percentile, ms", "simulated")
    print(markdown(("replicas", "load", "requests/s", *heads), rows))
    print("\nMost requests/s (load of a replica), of which 95 % wait no longer:\n")
    print(capacities(spread, mean_ms))
    if options.per_second is not None:
        needed = replicas_for(options.per_second * mean_ms / 1e3, spread, options.wait_ms / mean_ms)
        print(
            f"\n{options.per_second:g} requests/s with 95 % below {options.wait_ms:g} ms of wait: {needed} replicas"
        )


if __name__ == "__main__":
    main()
