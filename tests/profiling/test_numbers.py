"""Percentiles, intervals, ratios, the roofline's verdicts, the product that ceilings are measured with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from tests.engine_bundles import HOST
from trio_edge.profiling.measure import ceilings
from trio_edge.profiling.measure.ceilings import measure_ceilings
from trio_edge.profiling.measure.distribution import distribution, line_fit, median_interval, median_ratio
from trio_edge.profiling.measure.layers.interface import LayerCall, layer_times, slowest_layers
from trio_edge.profiling.measure.matmul_graph import matmul_model, random_matrix
from trio_edge.profiling.measure.product_bundle import write_product_bundle
from trio_edge.profiling.report.profile import Ceilings
from trio_edge.profiling.report.roofline import judge
from trio_edge.runtime.backends.registry import make_backend
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.engines.build import BuildOptions, build_engines, plan_build


def test_a_distribution_has_the_percentiles_of_its_values() -> None:
    found = distribution(list(range(101)))
    assert (found.p50, found.p95, found.p99, found.least, found.most) == (50, 95, 99, 0, 100)
    assert (found.mean, found.spread, found.count) == (50, 50, 101)


def test_the_medians_interval_holds_the_true_median_in_95_of_100_samples() -> None:
    generator = np.random.default_rng(0)
    for size in (10, 40):
        held = 0
        for _ in range(1000):
            low, high = median_interval(list(generator.exponential(size=size)))
            held += low <= np.log(2) <= high
        assert 0.93 <= held / 1000 <= 0.995


def test_tokens_of_one_answer_that_are_disturbed_together_make_nothing_more_certain() -> None:
    generator, held = np.random.default_rng(0), 0
    for _ in range(300):
        answers = generator.exponential(size=(30, 1)) + 0.01 * generator.exponential(size=(30, 15))
        low, high = median_interval(list(answers.ravel()), per_run=15) or (0.0, 0.0)
        held += low <= np.log(2) <= high
    assert held / 300 >= 0.9
    alone = median_interval(list(range(100)))
    assert alone == (40, 60)
    assert median_interval(list(range(100)), per_run=1) == alone


def test_fewer_than_six_runs_have_no_interval() -> None:
    values = [3.0, 1.0, 2.0, 5.0, 4.0]
    assert median_interval(values) is None
    assert median_interval([*values, 6.0]) == (1.0, 6.0)
    assert median_interval(values * 6, per_run=6) is None
    assert distribution([7.0]).range == (7.0, 7.0)
    assert median_ratio(values, values).interval_95 is None
    fit = line_fit([0, 1000], [values, [value + 1 for value in values]])
    assert fit is not None
    assert (fit.interval_95, fit.words) == (None, "3.00 ms +1 ms per 1000 rows")


def test_what_disturbs_both_bundles_leaves_their_ratio_certain() -> None:
    disturbance = np.random.default_rng(1).uniform(1, 10, 30)
    paired = median_ratio(list(2 * disturbance), list(disturbance))
    assert paired.value == pytest.approx(2)
    assert paired.interval_95 == pytest.approx((2, 2))
    shuffled = median_ratio(list(2 * disturbance[::-1]), list(disturbance))
    assert shuffled.interval_95[1] - shuffled.interval_95[0] > 0.1


def test_a_ratio_needs_pairs() -> None:
    with pytest.raises(ValueError, match="expected as many values as in the reference, got 2 and 1"):
        median_ratio([1.0, 2.0], [1.0])


def test_a_line_is_found_behind_a_drift_that_all_points_share() -> None:
    rows, drift = [0, 500, 1000, 2000], np.array([0.0, 5.0, 0.1, -0.1, 0.2, 0.1])
    fit = line_fit(rows, [2.0 + 0.25 * count / 1000 + drift for count in rows])
    assert (fit.base_ms, fit.ms_per_1000_rows) == (pytest.approx(2.1), pytest.approx(0.25))
    assert fit.interval_95 == pytest.approx((0.25, 0.25))
    assert fit.words == "2.10 ms +0.25 ms per 1000 rows (0.25 – 0.25)"


def test_a_slope_that_rounds_disagree_on_has_a_wide_interval() -> None:
    low, high = line_fit([0, 1000], [[1.0] * 6, [1.0, 2.0, 0.0] * 2]).interval_95
    assert low < -0.9
    assert high > 0.9


def test_one_point_is_no_line() -> None:
    assert line_fit([7], [[1.0, 2.0]]) is None


CEILINGS = Ceilings(flops_per_s=1e12, matmul="", bytes_per_s=1e11, copy="")  # ridge at 10 FLOPs a byte


@pytest.mark.parametrize(
    ("flops", "moved", "milliseconds", "bound", "text"),
    [
        pytest.param(1e6, 7.1e6, 0.1, "memory", "memory-bound, 71 % of bandwidth", id="memory"),
        pytest.param(5e9, 1e7, 10, "compute", "compute-bound, 50 % of the matmul rate", id="compute"),
        pytest.param(
            1.2e10,
            1e7,
            10,
            "compute",
            "compute-bound, 120 % of the matmul rate: that was disturbed",
            id="busy",
        ),
        pytest.param(1e6, 1e6, 1, "neither", "bound by neither: 1 % of bandwidth", id="neither"),
        pytest.param(
            1e6, 2e7, 0.1, "memory", "memory-bound, 200 % of bandwidth: its data stays in caches", id="caches"
        ),
    ],
)
def test_the_verdict_is_by_the_nearer_ceiling(
    flops: float, moved: float, milliseconds: float, bound: str, text: str
) -> None:
    verdict = judge(flops=flops, moved_bytes=moved, milliseconds=milliseconds, ceilings=CEILINGS)
    assert (verdict.bound, verdict.text) == (bound, text)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_written_model_is_valid_and_multiplies(dtype: str) -> None:
    content = matmul_model(rows=3, size=200, dtype=dtype, opset=18)
    onnx.checker.check_model(onnx.load_from_string(content), full_check=True)
    session = ort.InferenceSession(content, providers=["CPUExecutionProvider"])
    rows = random_matrix(rows=3, columns=200, dtype=dtype)
    (product,) = session.run(None, {"rows": rows})
    expected = rows.astype(np.float64) @ random_matrix(rows=200, columns=200, dtype=dtype).astype(np.float64)
    np.testing.assert_allclose(product, expected, rtol=0.02, atol=0.1 if dtype == "float16" else 1e-4)


def test_tensorrt_builds_the_product_for_a_gpu_that_is_not_there(
    reduced_bundle: Path, tmp_path: Path
) -> None:
    bundle = write_product_bundle(tmp_path, open_bundle(reduced_bundle).manifest, size=64)
    options = BuildOptions(backend="tensorrt-rtx", compute_capabilities=(86,), graphs=("head",))
    engines = build_engines(plan_build(bundle, options, host=HOST))
    assert [entry.graph for entry in engines.engines] == ["head"]


def test_ceilings_are_what_a_product_and_a_copy_reach(
    reduced_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ceilings, "_SECONDS", 0.05)
    manifest = open_bundle(reduced_bundle).manifest
    found = measure_ceilings(make_backend("onnxruntime", threads=1), manifest, cores=1)
    assert 1e8 < found.flops_per_s < 1e14
    assert 1e7 < found.bytes_per_s < 1e13
    assert found.matmul == "float32 [1024, 1024] x [1024, 1024] through onnxruntime"


def test_an_interruption_makes_no_layer_one_of_the_slowest() -> None:
    runs = [[LayerCall("slow", "MatMul", 2.0, ""), LayerCall("fast", "Add", 0.5, "")] for _ in range(6)]
    runs[3][1] = LayerCall("fast", "Add", 40.0, "")
    found = layer_times(runs, graph="suffix", profiles=["decode"] * 6, num_answers=2)
    assert [(layer.name, layer.answer_ms) for layer in slowest_layers(found)] == [
        ("slow", 6.0),
        ("fast", 1.5),
    ]
