"""benchmarks/fleet_size.py: the formula against known cases of queueing theory, and against its simulation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def _benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))


def test_one_replica_waits_as_pollaczek_and_khinchine_say() -> None:
    from fleet_size import predicted_wait

    for load, spread in ((0.5, 0.0), (0.8, 1.0), (0.9, 0.5)):
        mean, _ = predicted_wait(1, load, spread)
        assert mean == pytest.approx(load / (1 - load) * (1 + spread**2) / 2)


def test_the_share_that_waits_is_erlangs() -> None:
    from fleet_size import erlang_c

    assert erlang_c(1, 0.6) == pytest.approx(0.6)
    assert erlang_c(2, 1.0) == pytest.approx(1 / 3)  # a² / (2 − a) / (1 + a + a² / (2 − a)) with a = 1


@pytest.mark.parametrize(("replicas", "spread"), [(2, 1.0), (4, 0.5)])
def test_the_simulation_agrees(replicas: int, spread: float) -> None:
    from fleet_size import drawn_services, predicted_wait, simulated_waits

    random = np.random.default_rng(1)
    services = drawn_services(spread, None, 100_000, random)
    waits = simulated_waits(replicas, 0.7 * replicas, services, random)
    mean, slow = predicted_wait(replicas, 0.7 * replicas, spread)
    assert waits.mean() == pytest.approx(mean, rel=0.2)
    assert np.percentile(waits, 95) == pytest.approx(slow, rel=0.2)


def test_more_requests_need_more_replicas_and_never_more_load_than_all_can_take() -> None:
    from fleet_size import most_load, replicas_for

    needed = [replicas_for(offered, 0.5, 1.0) for offered in (0.2, 1.0, 3.0, 10.0)]
    assert needed == sorted(needed)
    assert all(count > offered for count, offered in zip(needed, (0.2, 1.0, 3.0, 10.0)))
    assert most_load(8, 0.5, 1.0) > most_load(1, 0.5, 1.0) > 0
