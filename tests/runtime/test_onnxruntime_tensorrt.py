"""ONNX Runtime's TensorRT provider gets one profile with the range of all shapes: it runs no other (microsoft/onnxruntime#31624).

No GPU runs these tests. A pretended provider refuses what the real one refuses and computes on the CPU; tensorrt-rtx's builder
says whether TensorRT takes the ranges.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
import pytest

from tests.cuda_on_host import CudaOnHost
from tests.engine_bundles import copy_bundle
from tests.pictures import random_picture
from trio_edge.runtime.backends import onnxruntime as module
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from pathlib import Path

CPU_SESSION = ort.InferenceSession


def shapes_of(options: dict[str, str], bound: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a bound by input; the provider takes only one for each."""
    text = options[f"trt_profile_{bound}_shapes"]
    pairs = [part.rsplit(":", 1) for part in text.split(",") if part]
    found = {name: tuple(map(int, sizes.split("x"))) for name, sizes in pairs}
    assert len(found) == len(pairs), "several profiles, of which the provider runs the first"
    return found


class PretendedSession:
    """A session of the TensorRT provider: it refuses shapes outside of its one profile."""

    def __init__(self, file: Any, options: Any, *, providers: list[Any], **more: Any) -> None:
        (_, self._options), *_ = providers
        self._session = CPU_SESSION(file, options, providers=["CPUExecutionProvider"], **more)
        self.get_inputs, self.get_outputs = self._session.get_inputs, self._session.get_outputs
        low, high = (shapes_of(self._options, bound) for bound in ("min", "max"))
        self.range = {name: (low[name], high[name]) for name in low}

    def get_providers(self) -> list[str]:
        return ["TensorrtExecutionProvider"]

    def io_binding(self) -> PretendedBinding:
        return PretendedBinding(self._session.io_binding(), self.range)

    def run_with_iobinding(self, binding: PretendedBinding, _options: Any) -> None:
        CUDA.enqueue(lambda: self._session.run_with_iobinding(binding.inner))


class PretendedBinding:
    """A binding of addresses on the pretended GPU, which are host addresses."""

    def __init__(self, inner: Any, ranges: dict[str, Any]) -> None:
        self.inner, self._ranges = inner, ranges

    def bind_input(self, name: str, _device: str, _number: int, dtype: Any, shape: Any, address: int) -> None:
        if name in self._ranges:
            low, high = self._ranges[name]
            assert all(a <= b <= c for a, b, c in zip(low, shape, high)), f"{name} {shape}: {low} to {high}"
        self.inner.bind_input(name, "cpu", 0, dtype, shape, address)

    def bind_output(
        self, name: str, _device: str, _number: int, dtype: Any, shape: Any, address: int
    ) -> None:
        self.inner.bind_output(name, "cpu", 0, dtype, shape, address)


CUDA = CudaOnHost()


def test_the_pretended_provider_answers_as_the_cpu_does(
    reduced_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = copy_bundle(reduced_bundle, tmp_path / "bundle")  # the cache of engines is written into it
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["TensorrtExecutionProvider"])
    monkeypatch.setattr(module, "load_cuda", lambda: CUDA)
    found = []
    for backend in ("onnxruntime", "onnxruntime-tensorrt"):
        if backend == "onnxruntime-tensorrt":
            monkeypatch.setattr(ort, "InferenceSession", PretendedSession)
        else:
            monkeypatch.setattr(module, "has_provider", lambda _name: True)
        with Pipeline.from_bundle(bundle, backend=backend, cpu_accuracy="float32") as pipeline:
            for prompt in ("w1 w2 w3", " ".join(["w7"] * 40)):
                generation = pipeline.generate(random_picture(60, 40), prompt, max_new_tokens=4)
                found.append((generation.text, [kept.tolist() for kept in generation.kept]))
    assert found[:2] == found[2:]


def test_tensorrt_builds_every_graph_for_its_range(reduced_bundle: Path, tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="has wheels for x86-64 Linux only; runs in CI")
    bundle = open_bundle(reduced_bundle)
    logger = trt.Logger(trt.Logger.ERROR)
    for spec in (part for graph in bundle.manifest.graphs for part in graph.split()):
        options = module._tensorrt_options(0, tmp_path, spec)
        builder = trt.Builder(logger)
        flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        network = builder.create_network(0 if flag is None else 1 << int(flag))
        parser = trt.OnnxParser(network, logger)
        assert parser.parse_from_file(str(bundle.path(spec.file)))
        config, profile = builder.create_builder_config(), builder.create_optimization_profile()
        low, opt, high = (shapes_of(options, bound) for bound in ("min", "opt", "max"))
        for name in low:
            profile.set_shape(name, low[name], opt[name], high[name])
        config.add_optimization_profile(profile)
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.SM86, 0)
        assert builder.build_serialized_network(network, config) is not None, spec.name


def test_every_profile_lies_in_the_range(reduced_bundle: Path, tmp_path: Path) -> None:
    for spec in (part for graph in open_bundle(reduced_bundle).manifest.graphs for part in graph.split()):
        options = module._tensorrt_options(0, tmp_path, spec)
        low, high = shapes_of(options, "min"), shapes_of(options, "max")
        for tensor in (tensor for tensor in spec.inputs if tensor.name in low):
            shapes = np.array([module.shape_at(tensor.shape, profile) for profile in spec.profiles])
            assert (shapes >= low[tensor.name]).all()
            assert (shapes <= high[tensor.name]).all()
