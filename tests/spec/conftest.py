"""One small bundle of every family, keep-all and reduced, next to Hugging Face's model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import torch

from tests.bundles import export
from tests.hugging_face import merges_smolvlm
from tests.several_images import FAMILIES, MAX_IMAGES, Family, stages_of
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.torchvision_reference import TorchvisionReference


KEEPS = 30, 11
STAGES = tuple(Stage(layer=layer, keep=keep) for layer, keep in enumerate(KEEPS, 1))


@dataclass(frozen=True)
class Subject:
    family: Family
    folder: Path
    model: Any
    keep_all: Pipeline
    reduced: Pipeline
    reference: TorchvisionReference
    name: str

    def inputs(self, conversation: str) -> dict[str, torch.Tensor]:
        """Return what Hugging Face's processor gives for a conversation."""
        arrays = self.reference.several(self.name, conversation)
        return {key: torch.from_numpy(value) for key, value in arrays.items() if key != "attention_mask"}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=merges_smolvlm) if name == "smolvlm" else name for name in FAMILIES],
)
def subject(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    torchvision_reference: TorchvisionReference,
) -> Iterator[Subject]:
    import transformers

    family = FAMILIES[request.param]
    folder = family.save(tmp_path_factory.mktemp(request.param) / "ck")
    model = getattr(transformers, family.model_class).from_pretrained(folder, dtype=torch.float32).eval()
    everything = Schedule(positions=family.positions)
    schedule = msgspec.structs.replace(everything, stages=stages_of(family, *KEEPS))
    options = {"max_images": MAX_IMAGES, **dict(family.options)}
    with (
        Pipeline.from_bundle(export(folder, schedule=everything, **options)) as keep_all,
        Pipeline.from_bundle(export(folder, schedule=schedule, **options)) as reduced,
    ):
        yield Subject(family, folder, model, keep_all, reduced, torchvision_reference, request.param)
