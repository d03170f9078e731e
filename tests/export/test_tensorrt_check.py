"""The static TensorRT check finds every kind of violation, and none in the graphs that we export."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import msgspec
import onnx
import onnx_ir as ir
import pytest

from tests.checkpoints import save_checkpoint
from trio_edge.export.check import tensorrt as tensorrt_check
from trio_edge.export.check.tensorrt import RELEASES, check_graph, load_rules, require_supported
from trio_edge.export.cli import main
from trio_edge.runtime.bundle.errors import CheckpointError
from trio_edge.runtime.bundle.reader import open_bundle

if TYPE_CHECKING:
    from pathlib import Path

BOTH = RELEASES


def graph(text: str, *, opset: int = 18) -> ir.Model:
    """Return the model whose graph is ``text`` in ONNX's own text form."""
    return ir.from_proto(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}]> g {text}'))


def findings(model: ir.Model, release: str) -> list[str]:
    return [str(finding) for finding in check_graph(model, release=release)]


VIOLATIONS: dict[str, tuple[str, str, int, tuple[str, ...]]] = {
    "data_dependent_shape": (
        "(float[4] x) => (int64[1, n] y) { y = NonZero(x) }",
        "(NonZero): expected another operator", 18, BOTH,
    ),
    "operator_that_no_release_reads": (
        "(float[4] x, bool[4] c) => (float[n] y) { y = Compress(x, c) }",
        "(Compress): expected an operator that the parser reads", 18, BOTH,
    ),
    "control_flow": (
        ("(bool c, float[2] x) => (float[2] y) { y = If (c) <then_branch = a () => (float[2] t) { t = Neg(x) },"
        " else_branch = b () => (float[2] e) { e = Abs(x) }> }"),
        "(If): expected another operator", 18, BOTH,
    ),
    "loop": (
        ("(int64 n, bool c, float[2] x) => (float[2] y) { y = Loop (n, c, x) <body = b (int64 i, bool a, float[2] s)"
         " => (bool a2, float[2] t) { a2 = Identity(a) t = Neg(s) }> }"),
        "(Loop): expected another operator", 18, BOTH,
    ),
    "scan_of_a_dynamic_length": (
        ("(float[2] x, float[u0] k) => (float[2] y) { y = Scan <num_scan_inputs = 1, body = b (float[2] s, float i)"
         " => (float[2] t) { t = Add(s, i) }> (x, k) }"),
        "(Scan): expected a number of steps that follows from shapes", 18, BOTH,
    ),
    "scan_with_an_integer_state": (
        ("(int64[2] x, float[3] k) => (int64[2] y) { y = Scan <num_scan_inputs = 1, body = b (int64[2] s, float i)"
         " => (int64[2] t) { t = Neg(s) }> (x, k) }"),
        "(Scan): expected FLOAT, FLOAT16, BFLOAT16 for 'x'", 18, BOTH,
    ),
    "operator_inside_a_scan": (
        ("(float[2, 2] x, float[3] k) => (float[2, 2] y) { y = Scan <num_scan_inputs = 1, body = b (float[2, 2] s,"
         " float i) => (float[2, 2] t) { d = Det(s) t = Add(s, d) }> (x, k) }"),
        "(Det): expected an operator that the parser reads", 18, BOTH,
    ),
    "operator_inside_a_branch": (
        ("(bool c, float[2] x) => (float[2] y) { y = If (c) <then_branch = a () => (float[2] t) { t = Neg(x) },"
        " else_branch = b () => (float[2] e) { e = Det(x) }> }"),
        "(Det): expected an operator that the parser reads", 18, BOTH,
    ),
    "random_values": (
        "() => (float[2] y) { y = RandomNormal <shape = [2]> () }",
        "(RandomNormal): expected another operator", 18, BOTH,
    ),
    "topk_over_the_limit": (
        "(float[5000] x) => (float[4000] v, int64[4000] i) <int64[1] k = {4000}> { v, i = TopK(x, k) }",
        "(TopK): expected input K <= 3839", 18, BOTH,
    ),
    "topk_unsorted": (
        "(float[9] x) => (float[4] v, int64[4] i) <int64[1] k = {4}> { v, i = TopK <sorted = 0> (x, k) }",
        "(TopK): expected attribute sorted in 1", 18, BOTH,
    ),
    "topk_with_a_computed_k": (
        "(float[9] x, int64[1] k) => (float[n] v, int64[n] i) { v, i = TopK(x, k) }",
        "(TopK): expected a constant as input K", 18, BOTH,
    ),
    "computed_reduction_axes": (
        "(float[3, 4] x, int64[1] a) => (float[n, m] y) { y = ReduceSum(x, a) }",
        "(ReduceSum): expected a constant as input axes", 18, BOTH,
    ),
    "computed_cumsum_axis": (
        "(float[3, 4] x, int64 a) => (float[3, 4] y) { y = CumSum(x, a) }",
        "(CumSum): expected a constant as input axis", 18, BOTH,
    ),
    "computed_unsqueeze_axes": (
        "(float[3] x, int64[1] a) => (float[n, m] y) { y = Unsqueeze(x, a) }",
        "(Unsqueeze): expected a constant as input axes", 18, BOTH,
    ),
    "computed_pad_axes": (
        "(float[3] x, int64[2] p, float v, int64[1] a) => (float[n] y) { y = Pad(x, p, v, a) }",
        "(Pad): expected a constant as input axes", 18, ("10.3",),
    ),
    "integer_matmul": (
        "(int64[2, 3] a, int64[3, 2] b) => (int64[2, 2] y) { y = MatMul(a, b) }",
        "(MatMul): expected FLOAT, FLOAT16, BFLOAT16 for 'a'", 18, BOTH,
    ),
    "integer_cumsum": (
        "(int32[4] x) => (int32[4] y) <int64 a = {0}> { y = CumSum(x, a) }",
        "(CumSum): expected FLOAT, FLOAT16, BFLOAT16 for 'x'", 18, BOTH,
    ),
    "integer_power": (
        "(int64[4] x) => (int64[4] y) { y = Pow(x, x) }",
        "(Pow): expected FLOAT, FLOAT16, BFLOAT16 for 'x'", 18, ("10.3",),
    ),
    "unsigned_arithmetic": (
        "(uint8[4] x) => (uint8[4] y) { y = Add(x, x) }",
        "(Add): expected FLOAT, FLOAT16, BFLOAT16, INT32, INT64 for 'x'", 18, BOTH,
    ),
    "double": (
        "(float[4] x) => (double[4] y) { y = Cast <to = 11> (x) }",
        "(Cast): expected FLOAT, FLOAT16, BFLOAT16, INT32, INT64, UINT8, BOOL for 'y'", 18, BOTH,
    ),
    "input_type": (
        "(uint16[4] x) => (float[4] y) { y = Cast <to = 1> (x) }",
        "input 'x': expected FLOAT, FLOAT16", 18, BOTH,
    ),
    "unnamed_dynamic_axis": (
        "(float[?, 4] x) => (float[n, 4] y) { y = Neg(x) }",
        "input 'x': expected a name as the dynamic axis 0", 18, BOTH,
    ),
    "too_many_axes": (
        "(float[1, 1, 1, 1, 1, 1, 1, 1, 2] x) => (float[1, 1, 1, 1, 1, 1, 1, 1, 2] y) { y = Neg(x) }",
        "(Neg): expected at most 8 axes", 18, BOTH,
    ),
    "cubic_resize": (
        ("(float[1, 1, 4, 4] x) => (float[1, 1, 8, 8] y) <int64[4] s = {1, 1, 8, 8}>"
        ' { y = Resize <mode = "cubic"> (x, , , s) }'),
        "(Resize): expected attribute mode in nearest, linear", 18, BOTH,
    ),
    "antialiased_resize": (
        ("(float[1, 1, 4, 4] x) => (float[1, 1, 2, 2] y) <int64[4] s = {1, 1, 2, 2}>"
        ' { y = Resize <mode = "linear", antialias = 1> (x, , , s) }'),
        "(Resize): expected attribute antialias in 0", 18, BOTH,
    ),
    "scatter_with_reduction": (
        ("(float[4] x, int64[1, 1] i, float[1] u) => (float[4] y)"
        ' { y = ScatterND <reduction = "add"> (x, i, u) }'),
        "(ScatterND): expected", 18, BOTH,
    ),
    "one_dimensional_pooling": (
        "(float[1, 2, 9] x) => (float[1, 2, n] y) { y = AveragePool <kernel_shape = [2]> (x) }",
        "(AveragePool): expected 4, 5 axes of input X", 18, BOTH,
    ),
    "second_output_of_layer_normalization": (
        "(float[2, 4] x, float[4] s) => (float[2, 4] y, float[2, 1] m) { y, m = LayerNormalization(x, s) }",
        "(LayerNormalization): expected at most 1 outputs", 18, BOTH,
    ),
    "asymmetric_int4": (
        ("(float[4, 4] x) => (float[4, 4] y) <int4[4, 4] w = {1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1},"
        " float[1, 4] s = {1,1,1,1}, int4[1, 4] z = {3,0,0,0}>"
        " { d = DequantizeLinear <axis = 0, block_size = 4> (w, s, z) y = MatMul(x, d) }"),
        "(DequantizeLinear): expected input x_zero_point 0", 21, BOTH,
    ),
    "int4_activation": (
        ("(float[4, 4] x) => (float[4, 4] y) <float s = {1}, int4 z = {0}>"
        " { q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }"),
        "(DequantizeLinear): expected a constant INT4 weight", 21, BOTH,
    ),
    "int4_weight_with_three_axes": (
        ("(float[1] x) => (float[1, 2, 2] y) <int4[1, 2, 2] w = {1,1,1,1}, float s = {1}>"
        " { y = DequantizeLinear(w, s) }"),
        "(DequantizeLinear): expected an INT4 weight [rows, an even number of columns]", 21, BOTH,
    ),
    "int4_blocks_along_two_axes": (
        ("(float[4, 4] x) => (float[4, 4] y) <int4[4, 4] w = {1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1},"
        " float[2, 2] s = {1,1,1,1}> { y = DequantizeLinear <axis = 0, block_size = 2> (w, s) }"),
        "(DequantizeLinear): expected scales in whole blocks along one axis of [4, 4]", 21, BOTH,
    ),
    "unsigned_weight": (
        "(float[2] x) => (float[2] y) <uint8[2] w = {1, 2}, float s = {1}> { y = DequantizeLinear(w, s) }",
        "(DequantizeLinear): expected INT8", 18, BOTH,
    ),
    "opset_too_new": (
        "(float[2] x) => (float[2] y) { y = Neg(x) }", "opset: expected 9..20", 24, ("10.3",),
    ),
    "opset_beyond_both": (
        "(float[2] x) => (float[2] y) { y = Neg(x) }", "opset: expected 9..", 25, BOTH,
    ),
    "opset_21_without_int4": (
        "(float[2] x) => (float[2] y) { y = Neg(x) }", "opset: expected 9..20", 21, ("10.3",),
    ),
    "attention_operator": (
        "(float[1, 2, 3, 4] q) => (float[1, 2, 3, 4] y) { y = Attention(q, q, q) }",
        "(Attention): expected an operator that the parser reads", 23, ("10.3",),
    ),
    "attention_with_past": (
        ("(float[1, 2, 3, 4] q, float[1, 2, 5, 4] p)"
        " => (float[1, 2, 3, 4] y, float[1, 2, 8, 4] a, float[1, 2, 8, 4] b)"
        " { y, a, b = Attention(q, q, q, , p, p) }"),
        "(Attention): expected no input past_key", 23, ("10.16",),
    ),
    "root_mean_square_operator": (
        "(float[2, 4] x, float[4] s) => (float[2, 4] y) { y = RMSNormalization(x, s) }",
        "(RMSNormalization): expected an operator that the parser reads", 23, ("10.3",),
    ),
    "tensor_scatter": (
        ("(float[1, 2, 8, 4] c, float[1, 2, 1, 4] u, int64[1] w) => (float[1, 2, 8, 4] y)"
        " { y = TensorScatter(c, u, w) }"),
        "(TensorScatter): expected an operator that the parser reads", 24, ("10.3",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(VIOLATIONS))
def test_violation_is_found_for_the_releases_that_have_it(name: str) -> None:
    text, expected, opset, releases = VIOLATIONS[name]
    for release in RELEASES:
        found = [line for line in findings(graph(text, opset=opset), release) if expected in line]
        assert bool(found) == (release in releases), (release, findings(graph(text, opset=opset), release))
        assert all("\n" not in line and f"(TensorRT {release})" in line for line in found)


@pytest.mark.parametrize("release", RELEASES)
def test_symmetric_int4_weights_in_blocks_pass(release: str) -> None:
    text = (
        "(float[S, 4] x) => (float[S, 2] y) <int4[4, 2] w = {1,1,1,1,1,1,1,1}, float[2, 2] s = {1,1,1,1}>"
        " { d = DequantizeLinear <axis = 0, block_size = 2> (w, s) y = MatMul(x, d) }"
    )
    assert findings(graph(text, opset=21), release) == []


@pytest.mark.parametrize("release", RELEASES)
def test_weights_in_fp8_with_a_scale_for_each_output_and_inputs_in_fp8_pass(release: str) -> None:
    text = (
        "(float[S, 4] x) => (float[S, 2] y) <float8e4m3fn[4, 2] w = {1,1,1,1,1,1,1,1}, float[2] s = {1,1},"
        " float a = {1}, float8e4m3fn z = {0}>"
        " { q = QuantizeLinear(x, a, z) r = DequantizeLinear(q, a, z) d = DequantizeLinear <axis = 1> (w, s)"
        " y = MatMul(r, d) }"
    )
    assert findings(graph(text, opset=19), release) == []


@pytest.mark.parametrize("release", RELEASES)
def test_scan_of_a_fixed_number_of_steps_passes(release: str) -> None:
    text = (
        "(float[N, 2] x, float[3] k) => (float[N, 2] y) { y = Scan <num_scan_inputs = 1,"
        " body = b (float[N, 2] s, float i) => (float[N, 2] t) { t = Add(s, i) }> (x, k) }"
    )
    assert findings(graph(text), release) == []


def test_dynamic_axis_must_be_a_symbol_that_a_profile_gives_a_size() -> None:
    model = graph("(float[S, M] x) => (float[S, M] y) { y = Neg(x) }")
    found = check_graph(model, release="10.3", symbols={"S", "C"})
    assert [finding.got for finding in found] == ["'M'"]
    assert check_graph(model, release="10.3", symbols={"S", "M"}) == []


@pytest.mark.parametrize("location", ["/weights.bin", "../weights.bin", "C:\\weights.bin"])
def test_external_data_outside_the_folder_is_found(location: str) -> None:
    model = graph("(float[2] x) => (float[2] y) <float[2] w = {1, 2}> { y = Add(x, w) }")
    model.graph.initializers["w"].const_value = ir.ExternalTensor(
        location, 0, 8, ir.DataType.FLOAT, shape=ir.Shape((2,)), name="w"
    )
    assert [finding.got for finding in check_graph(model, release="10.3")] == [location]


def test_operator_of_another_domain_is_found() -> None:
    model = graph("(float[2] x) => (float[2] y) { y = Neg(x) }")
    model.graph.node(0).domain = "trt.plugins"
    assert ["default ONNX domain" in line for line in findings(model, "10.16")] == [True]


def test_a_graph_that_breaks_rules_raises_one_line_with_the_graph_and_the_number_of_others() -> None:
    model = graph("(float[4] x) => (int64[1, n] y) { y = NonZero(x) }")
    with pytest.raises(CheckpointError, match=r"^graph 'select_1', node .*NonZero.*10\.3.*\(and 1 more\)$"):
        require_supported(model, name="select_1")


def test_every_rule_names_known_sources_and_operators() -> None:
    rules = load_rules()
    for limit in rules.limits:
        assert set(limit.source) <= set(rules.sources)
        assert set(limit.releases) <= set(RELEASES)
        known = set().union(*(rules.operator_types(release) for release in limit.releases))
        assert set(limit.operators) <= known
    listed = {name for names in rules.typed_inputs.values() for name in names} | set(rules.typed_outputs)
    assert listed <= set(rules.operator_types("10.16"))
    assert all(onnx.defs.has(name) for release in RELEASES for name in rules.operator_types(release))


def test_a_real_parser_reads_every_operator_of_the_newer_release() -> None:
    trt = pytest.importorskip(
        "tensorrt_rtx", reason="needs tensorrt-rtx, which has wheels for x86-64 Linux only"
    )
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    unread = {name for name in load_rules().operator_types("10.16") if not parser.supports_operator(name)}
    assert unread <= {"DeformConv"}  # tensorrt-rtx comes without the plugin that does it


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("bundle_fixture", ["keep_all_bundle", "reduced_bundle"])
def test_exported_graphs_have_no_finding(
    bundle_fixture: str, release: str, request: pytest.FixtureRequest
) -> None:
    bundle = open_bundle(request.getfixturevalue(bundle_fixture))
    for spec in bundle.manifest.graphs:
        symbols = {symbol for profile in spec.profiles for symbol in profile.sizes}
        model = ir.load(bundle.path(spec.file))
        assert check_graph(model, release=release, symbols=symbols) == [], spec.name


def test_export_of_a_graph_that_breaks_a_rule_gives_one_line_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = load_rules()
    older = {name: msgspec.structs.replace(rules.releases[name], max_opset=17) for name in RELEASES}
    old_rules = msgspec.structs.replace(rules, releases=older)
    monkeypatch.setattr(tensorrt_check, "load_rules", lambda: old_rules)
    source = save_checkpoint(tmp_path / "ck", family="llava", num_layers=1)
    code = main(
        [str(source), "--keep", "all", "--max-text", "32", "--quiet", "--out", str(tmp_path / "bundle")]
    )
    lines = capsys.readouterr().err.splitlines()
    assert code == 2
    assert lines[-1].startswith(
        "trio-export: graph 'vision', opset: expected 9..17 (TensorRT 10.3), got 18; "
    )
    assert [path.name for path in tmp_path.iterdir()] == ["ck"]


def test_a_public_checker_finds_nothing_critical_in_the_exported_graphs(
    reduced_bundle: Path, tmp_path: Path
) -> None:
    pytest.importorskip("trtcheck", reason="needs trtcheck, a second opinion on TensorRT 10.3")
    from click.testing import CliRunner
    from trtcheck.cli import main

    for path in sorted(reduced_bundle.glob("*.onnx")):
        report = tmp_path / f"{path.stem}.json"
        arguments = [str(path), "--target-trt", "10.3", "--format", "json", "--output", str(report)]
        CliRunner().invoke(main, arguments, catch_exceptions=False)
        counts = json.loads(report.read_text())
        assert counts["critical_count"] == 0, path.name
        assert counts["verdict"] != "blocked", path.name
