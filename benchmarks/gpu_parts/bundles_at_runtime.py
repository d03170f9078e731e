"""Bundles on the runtime's backends: first answers and times."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_parts.measure import WARM_UPS, Measured
from gpu_parts.prompts import num_before, prompt_ids, prompt_positions
from numpy.typing import NDArray
from PIL import Image

from trio_edge.runtime.backends.registry import make_backend
from trio_edge.runtime.bundle.graph_io import bucket_of
from trio_edge.runtime.bundle.reader import Bundle, open_bundle
from trio_edge.runtime.devices.interface import LoadedGraphs
from trio_edge.runtime.engines.build import BuildOptions, build_engines, plan_build
from trio_edge.runtime.engines.package import ENGINE_BACKENDS
from trio_edge.runtime.images.interface import image_processing
from trio_edge.runtime.model.decoder import Decoder, PrefillResult
from trio_edge.runtime.model.decoder_prompt import DecoderPrompt
from trio_edge.runtime.model.programs import Programs
from trio_edge.runtime.model.vision import Vision
from trio_edge.runtime.prompts.tokenizer import PromptPositions


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    """A bundle's graphs on a device, and a prompt with one image."""

    bundle: Bundle
    graphs: LoadedGraphs
    vision: Vision
    decoder: Decoder
    inputs: dict[str, NDArray[Any]]
    profile: Any
    num_visual: int
    before: NDArray[Any]
    after: NDArray[Any]
    positions: PromptPositions
    bucket: int

    def prefill(self) -> PrefillResult:
        """Run vision and decoder, from arrays on the host to the first token on the host."""
        outputs = self.vision.run_vision(self.inputs, self.profile)
        visual, *planes = (tensor.rows(0, self.num_visual) for tensor in outputs)
        prompt = DecoderPrompt(
            text=np.concatenate([self.before, self.after]),
            visual=visual,
            visual_rows=len(self.before) + np.arange(self.num_visual, dtype=np.int32),
            max_visual=self.profile.sizes["N"],
            text_bucket=self.bucket,
            positions=self.positions,
            planes=planes,
        )
        return self.decoder.prefill(prompt)


def build_for(bundle: Path, backend: str) -> None:
    """Build the bundle's engines for this machine's GPU, if ``backend`` runs engines."""
    if backend in ENGINE_BACKENDS:
        build_engines(plan_build(open_bundle(bundle), BuildOptions(backend=backend, force=True)))


def first_answer(
    bundle: Path, backend: str, *, picture: Image.Image, num_text: int, seed: int = 0
) -> PrefillResult:
    """Return the logits and kept tokens of one prefill."""
    with _loaded(bundle, backend, picture=picture, num_text=num_text, seed=seed) as loaded:
        return loaded.prefill()


def measure_bundle(
    bundle: Path, backend: str, *, picture: Image.Image, num_text: int, repeats: int, num_tokens: int
) -> Measured:
    """Return the times of a bundle on one backend; the TTFT includes the image's copy to the device.

    Args:
        bundle: Folder, with engines if the backend runs engines.
        backend: One of ``trio_edge.runtime.backends.registry.BACKENDS``.
        picture: RGB.
        num_text: Random text tokens of the prompt.
        repeats: Timed prefills.
        num_tokens: Timed decode steps.
    """
    warm_ups = WARM_UPS["cuda" if torch.cuda.is_available() else "cpu"]
    free_before = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None
    with _loaded(bundle, backend, picture=picture, num_text=num_text, seed=0) as loaded:
        device, decoder = loaded.graphs.device, loaded.decoder
        start, end = device.event(), device.event()
        parts: list[dict[str, float]] = []
        ttft, kv_bytes = [], 0
        for index in range(warm_ups + repeats):
            start.record()
            loaded.prefill()
            end.record()
            end.wait()
            kv_bytes = decoder.kv_bytes
            if index >= warm_ups:
                ttft.append(end.milliseconds_since(start))
                parts.append(loaded.vision.graph_ms | decoder.timeline.milliseconds())
        tokens = []
        for index in range(min(warm_ups + num_tokens, decoder.room)):
            start.record()
            decoder.decode(loaded.before[0][:1])
            end.record()
            end.wait()
            if index >= warm_ups:
                tokens.append(end.milliseconds_since(start))
        peak = None
        if free_before is not None:
            peak = free_before - torch.cuda.mem_get_info()[0]
    return Measured(
        way=backend,
        parts_ms={name: statistics.median(run[name] for run in parts) for name in parts[0]},
        ttft_ms=statistics.median(ttft),
        decode_ms=statistics.median(tokens),
        peak_bytes=peak,
        kv_bytes=kv_bytes,
    )


@contextmanager
def _loaded(
    folder: Path, backend: str, *, picture: Image.Image, num_text: int, seed: int
) -> Iterator[_Loaded]:
    bundle = open_bundle(folder)
    manifest = bundle.manifest
    processing = image_processing(manifest.image_processing, encoder_keep=manifest.encoder_keep)
    needed = processing.sizes(*picture.size)
    profile = next(
        entry
        for entry in manifest.graph("vision").profiles
        if all(entry.sizes[name] >= size for name, size in needed.items())
    )
    bucket = bucket_of(num_text, manifest.text_buckets)
    ids = prompt_ids(manifest.token_embedding.shape[0], num_text=num_text, seed=seed)
    rows, split = bundle.map_tensor(manifest.token_embedding)[ids], num_before(num_text)
    positions = prompt_positions(
        processing,
        picture,
        mrope=manifest.position_axes > 1,
        num_text=num_text,
        num_rows=profile.sizes["N"] + bucket,
    )
    graphs = make_backend(backend, bundle=bundle).load(bundle)
    try:
        programs = Programs(manifest, graphs)
        yield _Loaded(
            bundle=bundle,
            graphs=graphs,
            vision=Vision(programs, images=processing),
            decoder=Decoder(programs),
            inputs=processing.prepare(picture, profile.sizes),
            profile=profile,
            num_visual=needed["N"],
            before=rows[:split],
            after=rows[split:],
            positions=positions,
            bucket=bucket,
        )
    finally:
        graphs.close()
