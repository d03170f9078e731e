"""One server for all tests that change nothing in it: a reduced bundle and its keep-all twin."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest

from tests.bundles import export
from tests.schedules import schedule_for
from tests.serving.server import RunningServer, running
from trio_edge.export.options import LevelRequest
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def server(reduced_bundle: Path, keep_all_bundle: Path) -> Iterator[RunningServer]:
    """Serves the models "reduced" and "full"."""
    bundles = {"reduced": reduced_bundle, "full": keep_all_bundle}
    with running({name: partial(Pipeline.from_bundle, path) for name, path in bundles.items()}) as server:
        yield server


@pytest.fixture(scope="session")
def deciding_bundles() -> dict[str, Path]:
    """The packaged model, which knows the words of the questions, reduced and with all tokens."""
    options = {"dtype": "float32", "follow_ups": True}
    schedule = schedule_for(1 / 9, num_layers=16, num_visual=192)
    return {
        "reduced": export("tiny", schedule=schedule, **options),
        "full": export("tiny", **options),
    }


@pytest.fixture(scope="session")
def decider(deciding_bundles: dict[str, Path]) -> Iterator[RunningServer]:
    """Serves the models "reduced" and "full" of the packaged model."""
    models = {name: partial(Pipeline.from_bundle, path) for name, path in deciding_bundles.items()}
    with running(models) as server:
        yield server


@pytest.fixture(scope="session")
def levelled_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged model with a small image, two reductions, and all tokens; "auto" knows two of these levels."""

    def keeping(*keep: int) -> Schedule:
        return Schedule(stages=tuple(Stage(layer=layer, keep=kept) for layer, kept in zip((1, 5, 8), keep)))

    bundle = export(
        "tiny",
        tmp_path_factory.mktemp("levels") / "tiny",
        levels=(
            LevelRequest("usual", keeping(20, 12, 4)),
            LevelRequest("quick", keeping(6, 2, 1)),
            LevelRequest("base", keeping(20, 12, 4), "base"),
            LevelRequest("full", Schedule()),
        ),
        dtype="float32",
        follow_ups=True,
        max_new_tokens=16,
    )
    (bundle / "levels.json").write_text('{"quick": 0.5, "full": 0.5}')
    return bundle


@pytest.fixture(scope="session")
def levelled(levelled_bundle: Path) -> Iterator[RunningServer]:
    """Serves the model "tiny" with several levels."""
    with running({"tiny": partial(Pipeline.from_bundle, levelled_bundle)}) as server:
        yield server


@pytest.fixture(scope="session")
def tiny(deciding_bundles: dict[str, Path]) -> Iterator[Pipeline]:
    """The reduced packaged model without a server."""
    with Pipeline.from_bundle(deciding_bundles["reduced"]) as pipeline:
        yield pipeline


@pytest.fixture(scope="session")
def pipeline(reduced_bundle: Path) -> Iterator[Pipeline]:
    """The reduced bundle without a server."""
    with Pipeline.from_bundle(reduced_bundle) as pipeline:
        yield pipeline
