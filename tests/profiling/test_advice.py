"""A profile's advice: a line for each large share of the time, and none for a small one."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tests.profiling.test_page import bundle_profile, graph
from trio_edge.profiling.report.profile import BundleProfile, GraphProfile
from trio_edge.profiling.report.summary import advise
from trio_edge.profiling.statistics import distribution


def one(role: str, milliseconds: float, *, phase: str = "prefill", **more: Any) -> GraphProfile:
    """A graph that runs once."""
    made = graph(role, phase, milliseconds, 1)
    return msgspec.structs.replace(
        made, role=role, calls_per_answer=1.0, call_ms=distribution([milliseconds]), **more
    )


def balanced(**changes: Any) -> BundleProfile:
    """A reduced INT4 bundle with a first token of 100 ms, of which no part stands out, and full KV buffers."""
    made = bundle_profile("bundle", 1.0)
    fields: dict[str, Any] = {
        "graphs": (
            one("vision", 30.0),
            one("prefix", 45.0),
            one("select", 10.0),
            one("prefix", 9.0, phase="decode"),
        ),
        "ttft_ms": distribution([100.0]),
        "host_first_ms": distribution([15.0]),
        "visual_tokens": 2880,
        "processed_tokens": 320.0,
        "memory": msgspec.structs.replace(made.memory, kv_used=300, kv_allocated=400),
    }
    return msgspec.structs.replace(made, **{**fields, **changes})


def with_graph(graph: GraphProfile) -> dict[str, Any]:
    others = [known for known in balanced().graphs if (known.role, known.phase) != (graph.role, graph.phase)]
    return {"graphs": (*others, graph)}


def test_nothing_is_advised_where_nothing_stands_out() -> None:
    assert advise(balanced()) == ()


def test_a_bundle_without_tokens_behind_the_first_has_no_advice_on_them() -> None:
    assert advise(balanced(graphs=(one("vision", 30.0),), formats={})) == ()


FULL_STEP = one("prefix", 9.0, phase="decode", moved_bytes=1e9)
MEMORY = bundle_profile("bundle", 1.0).memory


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            with_graph(one("vision", 62.0)),
            "vision takes 62% of the first token: export a smaller --image-size",
        ),
        (
            with_graph(one("select", 15.0)),
            "selections take 15% of the first token: export fewer stages (--schedule)",
        ),
        (
            {**with_graph(one("prefix", 70.0)), "processed_tokens": 2880.0},
            "the decoder takes 70% of the first token, with all 2880 visual tokens in every layer: export with",
        ),
        ({"host_first_ms": distribution([30.0])}, "30% of the first token is outside of graphs"),
        (
            {
                **with_graph(FULL_STEP),
                "memory": msgspec.structs.replace(MEMORY, kv_used=50_000_000, kv_allocated=300_000_000),
            },
            "a token reads all 300.0 MB of KV buffers, and an answer fills 50.0 MB",
        ),
        (
            {"formats": {}},
            "tokens wait for memory (prefix: memory-bound, 72 % of bandwidth): export with --quantize int4",
        ),
    ],
    ids=["vision", "selections", "decoder", "outside", "room", "weights"],
)
def test_what_takes_much_is_named_with_its_share_and_an_option(
    changes: dict[str, Any], expected: str
) -> None:
    (line,) = advise(balanced(**changes))
    assert line.startswith(expected)


@pytest.mark.parametrize(
    "changes",
    [
        with_graph(one("prefix", 70.0)),
        {
            **with_graph(FULL_STEP),
            "memory": msgspec.structs.replace(MEMORY, kv_used=200_000_000, kv_allocated=300_000_000),
        },
        {**with_graph(one("prefix", 9.0, phase="decode", of_ceiling=2.0)), "formats": {}},
        {**with_graph(one("prefix", 9.0, phase="decode", bound="compute")), "formats": {}},
    ],
    ids=["a decoder that is reduced", "buffers in use", "weights in caches", "tokens bound by arithmetic"],
)
def test_what_no_option_helps_is_not_named(changes: dict[str, Any]) -> None:
    assert advise(balanced(**changes)) == ()
