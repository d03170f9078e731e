"""Shared fixtures: one random small checkpoint and its bundles, exported once per session."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no test asks the Hub

if TYPE_CHECKING:
    from pathlib import Path

# The same examples on every run and every machine; HYPOTHESIS_PROFILE=default looks for new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

REDUCED_STAGES = ((1, 14), (2, 6))


@pytest.fixture(autouse=True, scope="session")
def _few_threads() -> None:
    import torch

    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA-NeXT with 3 decoder layers and grouped-query attention."""
    from tests.checkpoints import save_checkpoint

    return save_checkpoint(
        tmp_path_factory.mktemp("shared") / "checkpoint", num_layers=3, num_kv_heads=2, seed=5
    )


@pytest.fixture(scope="session")
def keep_all_bundle(checkpoint: Path) -> Path:
    """The checkpoint without reduction."""
    from tests.bundles import export

    return export(checkpoint, checkpoint.parent / "keep_all")


@pytest.fixture(scope="session")
def reduced_bundle(checkpoint: Path) -> Path:
    """The checkpoint with two stages."""
    from tests.bundles import export
    from trio_edge.runtime.schedule import Schedule, Stage

    schedule = Schedule(stages=tuple(Stage(layer=layer, keep=keep) for layer, keep in REDUCED_STAGES))
    return export(checkpoint, checkpoint.parent / "reduced", schedule=schedule)
