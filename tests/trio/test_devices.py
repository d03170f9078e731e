"""The table of devices: complete, consistent, sourced, and found by name."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from trio_edge.runtime.bundle.errors import TargetError
from trio_edge.trio.cost.devices import DEVICES, DeviceSpec, find_device

DOCUMENT = Path(__file__).parents[2] / "docs" / "prediction.md"
FIELDS = [field.name for field in dataclasses.fields(DeviceSpec) if field.name not in ("name", "sources")]
ROWS = pytest.mark.parametrize("target", DEVICES.values(), ids=list(DEVICES))


@ROWS
def test_every_value_has_a_source(target: DeviceSpec) -> None:
    assert sorted(target.sources) == sorted(FIELDS)
    assert all(source.text for source in target.sources.values())


@ROWS
def test_numbers_are_positive_and_the_reserve_leaves_most_of_the_memory(target: DeviceSpec) -> None:
    assert 0 < target.reserve_bytes < target.memory_bytes / 2
    assert target.usable_bytes + target.reserve_bytes == target.memory_bytes
    assert target.bandwidth_bytes_per_s > 10e9


@ROWS
def test_integer_rate_is_two_or_four_times_the_float_rate(target: DeviceSpec) -> None:
    ratio = target.int8_ops / target.fp16_flops
    assert ratio == pytest.approx(2.0) or ratio == pytest.approx(4.0, rel=0.02)


@ROWS
def test_fp8_is_twice_as_fast_as_float16_where_the_gpu_has_it(target: DeviceSpec) -> None:
    assert (target.fp8_flops is None) == (target.compute_capability < (8, 9))
    if target.fp8_flops is not None:
        assert target.fp8_flops == pytest.approx(2 * target.fp16_flops, rel=1e-3)


@ROWS
def test_document_has_the_row_and_marks_what_is_not_verified(target: DeviceSpec) -> None:
    row = next(line for line in DOCUMENT.read_text().splitlines() if line.startswith(f"| `{target.name}`"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    values = {
        "memory_bytes": target.memory_bytes / 2**30,
        "reserve_bytes": target.reserve_bytes / 2**30,
        "bandwidth_bytes_per_s": target.bandwidth_bytes_per_s / 1e9,
        "fp16_flops": target.fp16_flops / 1e12,
        "int8_ops": target.int8_ops / 1e12,
        "fp8_flops": None if target.fp8_flops is None else target.fp8_flops / 1e12,
    }
    mark = {"verified": "", "third-party": " ³", "derived": " ᵈ", "unverified": " ?"}
    expected = [
        f"{'none' if value is None else format(value, '.4g')}{mark[target.sources[field].status]}"
        for field, value in values.items()
    ]
    assert cells[1:7] == expected


@pytest.mark.parametrize("name", ["jetson-orin-nano-8", "orin-nano-8"])
def test_jetson_may_be_left_out_of_a_name(name: str) -> None:
    assert find_device(name).name == "jetson-orin-nano-8"


def test_orin_modules_run_both_jetpacks() -> None:
    assert find_device("agx-orin-64").tensorrt == ("10.3", "10.16")


def test_unknown_name_lists_all_and_the_nearest_in_one_line() -> None:
    with pytest.raises(TargetError, match=r"did you mean orin-nano-8\?$") as caught:
        find_device("orin-nano-80")
    assert all(name in str(caught.value) for name in DEVICES)
    assert "\n" not in str(caught.value)


def test_name_that_resembles_none_asks_to_choose() -> None:
    with pytest.raises(TargetError, match=re.escape("got 'x'; choose one of these")):
        find_device("x")
