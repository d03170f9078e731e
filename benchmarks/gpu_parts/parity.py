"""Compares every backend that runs here with ONNX Runtime on the CPU, on one small bundle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gpu_parts.bundles_at_runtime import build_for, first_answer
from gpu_parts.graphs_in_torch import GraphsInTorch
from gpu_parts.subjects import subject_of
from numpy.typing import NDArray
from PIL import Image

from trio_edge.export.checkpoints.checkpoint import read_checkpoint
from trio_edge.runtime.backends.registry import BACKENDS
from trio_edge.runtime.bundle.errors import TrioEdgeError
from trio_edge.runtime.bundle.reader import open_bundle

REFERENCE = "onnxruntime"
TOLERANCES = {"float16": 5e-2, "float32": 1e-3}
"""Relative and absolute tolerances of logits, those of tests/tolerances.py."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One backend compared with the reference."""

    way: str
    runs: bool
    reason: str = ""
    """Reason why it does not run."""
    same_kept: bool = False
    largest_difference: float = 0.0
    """Largest difference of a logit."""
    within: bool = False
    """Whether all logits are within the table's tolerance."""


def compare(
    checkpoint: Path, bundle: Path, *, picture: Image.Image, num_text: int, device: torch.device
) -> list[Compared]:
    """Return how each backend and the graphs in torch compare with ONNX Runtime on the CPU.

    Args:
        checkpoint: Weights of the graphs in torch.
        bundle: Exported from it. Engines are built into it if TensorRT finds a GPU.
        picture: RGB.
        num_text: Text tokens.
        device: Device of torch.
    """
    manifest = open_bundle(bundle).manifest
    settings = {"picture": picture, "num_text": num_text}
    reference = first_answer(bundle, REFERENCE, **settings)

    def compared(way: str, logits: NDArray[np.float32], kept: Sequence[NDArray[np.int32]]) -> Compared:
        tolerance = TOLERANCES[manifest.dtype]
        return Compared(
            way=way,
            runs=True,
            same_kept=[sorted(stage) for stage in kept] == [sorted(stage) for stage in reference.kept],
            largest_difference=float(np.abs(logits - reference.logits).max()),
            within=bool(np.allclose(logits, reference.logits, rtol=tolerance, atol=tolerance)),
        )

    found = []
    for backend in BACKENDS:
        if backend == REFERENCE:
            continue
        try:
            build_for(bundle, backend)
            answer = first_answer(bundle, backend, **settings)
            found.append(compared(backend, answer.logits, answer.kept))
        except (TrioEdgeError, RuntimeError) as error:  # not installed, or fails on this GPU
            found.append(Compared(way=backend, runs=False, reason=str(error)))
    subject = subject_of(
        read_checkpoint(str(checkpoint)), picture=picture, num_text=num_text, device=device, dtype=manifest.dtype
    )  # fmt: skip
    way = GraphsInTorch(subject, manifest.schedule, max_new_tokens=1)
    for part in way.parts:
        part.run()
    original, kept = np.arange(subject.sizes.num_visual, dtype=np.int32), []
    for stage in way.buffers.kept:
        original = original[stage.cpu().numpy()]
        kept.append(original)
    return [*found, compared(way.name, way.buffers.logits[0].cpu().numpy(), kept)]
