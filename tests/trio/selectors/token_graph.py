"""Selectors in front of the decoder: inputs to try them on, and the way to a graph of one alone."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tests.shared_folder import kept_between_runs
from tests.trio.module_digest import module_digest
from trio_edge.export.check.tensorrt import RELEASES, check_graph
from trio_edge.export.graphs.assembly.onnx_graph import dynamic_axes, example_input, save, trace_graph
from trio_edge.runtime.bundle.manifest import TensorSpec
from trio_edge.trio.selectors.interface import Selection, TokenInputs

D, F, E, T = 16, 12, 8, 9
NUM_KEEP = 12
Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Inputs in float32; rows from ``num_visual`` and ``num_text`` on are padding."""

    tokens: Array
    num_visual: int
    newline: Array
    features: Array
    keys: Array
    attention: Array
    text: Array
    num_text: int
    previous: Array
    has_previous: int = 1

    @property
    def shown(self) -> list[int]:
        """Indices of the tokens that show a part of the picture."""
        return [i for i in range(self.num_visual) if not self.newline[i]]

    def inputs(self, dtype: torch.dtype) -> TokenInputs:
        def tensor(values: Array) -> Tensor:
            return torch.from_numpy(values).to(dtype)

        return TokenInputs(
            tokens_ND=tensor(self.tokens), num_visual=torch.tensor([self.num_visual], dtype=torch.int32),
            is_newline_N=torch.from_numpy(self.newline), features_NF=tensor(self.features),
            keys_NE=tensor(self.keys), attention_N=tensor(self.attention), text_TD=tensor(self.text),
            num_text=torch.tensor([self.num_text], dtype=torch.int32), previous_ND=tensor(self.previous),
            has_previous=torch.tensor([self.has_previous], dtype=torch.int32),
        )  # fmt: skip

    def feeds(self) -> dict[str, Array]:
        return {
            "tokens": self.tokens, "num_visual": np.array([self.num_visual], np.int32),
            "newline": self.newline.astype(np.int32), "features": self.features, "keys": self.keys,
            "attention": self.attention, "text": self.text, "num_text": np.array([self.num_text], np.int32),
            "previous": self.previous, "has_previous": np.array([self.has_previous], np.int32),
        }  # fmt: skip


def random_case(
    seed: int = 0, *, num_tokens: int = 40, num_visual: int | None = None, newline_every: int = 0
) -> Case:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32)

    newline = np.zeros(num_tokens, dtype=bool)
    if newline_every:
        newline[newline_every - 1 :: newline_every] = True
    seen = (~newline)[:, None].astype(np.float32)
    return Case(
        tokens=normal(num_tokens, D), num_visual=num_tokens if num_visual is None else num_visual,
        newline=newline, features=normal(num_tokens, F) * seen, keys=normal(num_tokens, E) * seen,
        attention=rng.random(num_tokens).astype(np.float32) * seen[:, 0], text=normal(T, D), num_text=6,
        previous=normal(num_tokens, D),
    )  # fmt: skip


def _garbage_in_padding() -> Case:
    case = random_case(1, num_visual=33)
    for name, used in (
        ("tokens", 33),
        ("features", 33),
        ("keys", 33),
        ("attention", 33),
        ("text", 6),
        ("previous", 33),
    ):
        values = getattr(case, name)
        values[used:] = np.nan
        values[used + 1 :: 2] = 3e38
    return case


def _zero_vectors() -> Case:
    case = random_case(2)
    for values in (case.tokens, case.features, case.keys, case.previous[7:]):
        values[5:25] = 0.0
    return case


def _identical() -> Case:
    case = random_case(3)
    for values in (case.tokens, case.features, case.keys, case.previous):
        values[:] = np.eye(1, values.shape[1], 2, dtype=np.float32) * 2
    return case


CASES: dict[str, Case] = {
    "random": random_case(),
    "garbage_in_padding": _garbage_in_padding(),
    "newlines": random_case(4, num_visual=37, newline_every=5),
    "more_newlines_than_picture": replace(random_case(5), newline=np.arange(40) % 8 != 3),
    "identical_tokens": _identical(),
    "equal_attention": replace(random_case(6), attention=np.full(40, 0.25, dtype=np.float32)),
    "no_attention": replace(random_case(6), attention=np.zeros(40, dtype=np.float32)),
    "zero_vectors": _zero_vectors(),
    "no_text": replace(random_case(7), num_text=0),
    "text_fills_its_rows": replace(random_case(7), num_text=T),
    "as_many_as_kept": random_case(8, num_visual=NUM_KEEP),
    "fewer_than_kept": random_case(8, num_visual=5),
    "none": random_case(8, num_visual=0),
    "other_size": random_case(9, num_tokens=23, num_visual=20),
}


class TokenGraph(nn.Module):
    """A selector with flat inputs."""

    def __init__(self, selector: Any) -> None:
        super().__init__()
        self.selector = selector

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        tokens, num_visual, newline, features, keys, attention, text, num_text, previous, has_previous = (
            values
        )
        inputs = TokenInputs(
            tokens, num_visual, newline.to(torch.bool), features, keys, attention, text, num_text,
            previous_ND=previous, has_previous=has_previous,
        )  # fmt: skip
        selection: Selection = self.selector(inputs)
        fields = (selection.kept_K, selection.scores_N, selection.unsettled, selection.weights_KN)
        return tuple(field for field in fields if field is not None)


def input_specs(num_tokens: int | str, num_text: int | str) -> tuple[TensorSpec, ...]:
    axes: dict[str, tuple[str, tuple[int | str, ...]]] = {
        "tokens": ("float32", (num_tokens, D)), "num_visual": ("int32", (1,)),
        "newline": ("int32", (num_tokens,)), "features": ("float32", (num_tokens, F)),
        "keys": ("float32", (num_tokens, E)), "attention": ("float32", (num_tokens,)),
        "text": ("float32", (num_text, D)), "num_text": ("int32", (1,)),
        "previous": ("float32", (num_tokens, D)), "has_previous": ("int32", (1,)),
    }  # fmt: skip
    return tuple(TensorSpec(name=name, dtype=dtype, shape=shape) for name, (dtype, shape) in axes.items())  # type: ignore[arg-type]


def export_selector(selector: Any, path: Path, *, num_tokens: int | str = "N") -> Path:
    """Write ``selector`` as ONNX the way the exporter does; a name as ``num_tokens`` serves several sizes."""
    inputs = input_specs(num_tokens, "T")
    sizes = {"N": selector.num_keep + 17, "T": 7}
    shape = (num_tokens,)
    outputs = [
        TensorSpec(name="kept", dtype="int64", shape=(selector.num_keep,)),
        TensorSpec(name="scores", dtype="float32", shape=shape),
        TensorSpec(name="unsettled", dtype="int32", shape=(1,)),
    ]
    if getattr(selector, "num_contextual", 0):
        outputs.append(TensorSpec(name="weights", dtype="float32", shape=(selector.num_keep, num_tokens)))
    dims = dict.fromkeys(sizes, torch.export.Dim.DYNAMIC)
    model = trace_graph(
        TokenGraph(selector), args=tuple(example_input(spec, trace_sizes=sizes) for spec in inputs),
        dynamic_shapes=(tuple(dynamic_axes(spec, dims=dims) for spec in inputs),), inputs=inputs,
        outputs=outputs, opset=18,
    )  # fmt: skip
    save(model, path)
    return path


def export_once(selector: Any, *, num_tokens: int | str = "N") -> Path:
    """Return the graph of ``selector``, traced by the first of all test runs that asks for it."""
    return kept_between_runs(
        f"tokens-{num_tokens}-{module_digest(selector.eval())}.onnx",
        lambda path: export_selector(selector, path, num_tokens=num_tokens),
    )


@functools.cache
def _session(path: Path) -> Any:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def run_graph(path: Path, case: Case) -> list[Array]:
    session = _session(path)
    feeds = case.feeds()
    used = {value.name for value in session.get_inputs()}
    result: list[Array] = session.run(None, {name: feeds[name] for name in feeds if name in used})
    return result


def assert_chosen(selector: Any, graph: Path, case: Case, expected: list[int]) -> None:
    """Assert what the module keeps in float64 and float32, and its graph on ONNX Runtime."""
    for dtype in (torch.float64, torch.float32):
        selection = selector(case.inputs(dtype))
        assert selection.kept_K.tolist() == expected, dtype
        assert selection.kept_K.dtype == torch.int64
    kept, scores, unsettled, *_ = run_graph(graph, case)
    assert kept.tolist() == expected
    assert scores.dtype == np.float32
    assert np.isfinite(scores[: case.num_visual]).all()
    assert (scores[case.num_visual :] == -1).all()
    np.testing.assert_allclose(scores, selection.scores_N, rtol=1e-4, atol=1e-4)
    assert unsettled.tolist() == [0]


def findings(path: Path) -> list[str]:
    return [
        str(finding)
        for release in RELEASES
        for finding in check_graph(ir.load(path), release=release, symbols={"N", "T"})
    ]


def build_engine(path: Path, *, num_tokens: int = 40) -> int:
    """Build an engine for one size of a graph that serves several; return its bytes."""
    trt = pytest.importorskip("tensorrt_rtx", reason="has wheels for x86-64 Linux only; runs in CI")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(path.read_bytes()), [str(parser.get_error(i)) for i in range(parser.num_errors)]
    profile = builder.create_optimization_profile()
    for spec in input_specs("N", "T"):
        shape = tuple({"N": num_tokens, "T": T}.get(size, size) for size in spec.shape)  # type: ignore[call-overload]
        profile.set_shape(spec.name, shape, shape, shape)
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None
    return int(engine.nbytes)


def filled(chosen: list[int], case: Case, num_keep: int) -> list[int]:
    """Return ``chosen``, then the other real tokens, then padding, ``num_keep`` in all and ascending."""
    others = [i for i in range(len(case.tokens)) if i not in chosen]
    return sorted([*chosen, *others][:num_keep])


def first_best(gains: dict[int, float]) -> int:
    """Return the lowest index whose gain is within 1e-5 of the largest."""
    best = max(gains.values())
    return min(i for i, gain in gains.items() if gain >= best - 1e-5 * abs(best))


def cosine(a: Array, b: Array) -> float:
    """Return the cosine in float64; 0 with a zero vector."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norm = np.sqrt(a @ a) * np.sqrt(b @ b)
    return float(a @ b / norm) if norm > 0 else 0.0
