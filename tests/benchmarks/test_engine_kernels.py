"""Kernels that TensorRT makes of a decoder layer in float16, as docs/runtime.md lists them: they may get fewer."""

from __future__ import annotations

import pytest

from tests.bundles import export
from tests.schedules import schedule_for
from trio_edge.runtime.bundle.reader import open_bundle

pytest.importorskip(
    "tensorrt_rtx", reason="needs tensorrt-rtx, which has wheels for x86-64 Linux only; runs in CI"
)


def test_attention_is_one_kernel_in_prefill_and_in_decode() -> None:
    from engine_kernels import WAITING, kernels_of, summary

    schedule = schedule_for(0.111, num_layers=16, num_visual=192)
    bundle = open_bundle(export("tiny", dtype="float16", schedule=schedule, max_text=64, max_new_tokens=16))
    found = kernels_of(bundle, "prefix", compute_capability=86)
    cells = {profile: summary(kernels) for profile, kernels in found.items()}
    assert cells["prefill_64"]["attention"] == "1 (_gemm_mha_v2)"
    assert cells["decode"]["attention"] == "1 (_gemv_mha_v1)"
    assert cells["prefill_64"]["norms"] == "2 (kgen)"  # the layer has two
    working = {name: [one for one in kernels if one.kind not in WAITING] for name, kernels in found.items()}
    assert len(working["prefill_64"]) <= 10
    assert len(working["decode"]) <= 8
