"""One server for all tests that change nothing in it: a reduced bundle and its keep-all twin."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest

from tests.serving.server import RunningServer, running
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
def pipeline(reduced_bundle: Path) -> Iterator[Pipeline]:
    """The reduced bundle without a server."""
    with Pipeline.from_bundle(reduced_bundle) as pipeline:
        yield pipeline
