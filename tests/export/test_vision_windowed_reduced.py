"""Encoder reduction of Qwen2.5-VL: the reference's shared and global selection with merging, step by step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import eager_attention_forward

from tests.pictures import random_picture
from tests.windowed_vision import (
    ALL_BLOCKS,
    FEW_BLOCKS,
    OUT,
    PROCESSING,
    build_in_tensorrt,
    export_vision,
    hugging_face_tokens,
    in_order,
    inv_freq_of,
    random_vision_encoder,
)
from trio_edge.export.check.tensorrt import require_supported
from trio_edge.export.graphs.vision import windowed
from trio_edge.export.graphs.vision.windowed import WindowedVision, check_windowed_keep, select_tokens
from trio_edge.runtime.bundle.errors import ScheduleError
from trio_edge.runtime.bundle.manifest import TensorSpec

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

KEEP = 11
LARGEST = PROCESSING.any_image_sizes()[-1]
SIZES = {
    "square": (196, 196),
    "wide": (350, 130),
    "one_row": (600, 24),
    "one_column": (30, 700),
    "exactly_what_is_kept": (28 * 11, 28),
    "fewer_than_kept": (60, 90),
}
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
"""Float32 against float64 after the encoder; the encoder itself differs in the order of sums."""


def plain_selection(
    local: NDArray[np.float64], overall: NDArray[np.float64], *, rows: int, columns: int, keep: int
) -> list[int]:
    """The specification, token by token, in raster order."""
    windows = max(1, rows // 4), max(1, columns // 4)
    share = math.ceil((keep // 2) / (windows[0] * windows[1]))
    taken: dict[tuple[int, int], int] = {}
    chosen: list[int] = []
    for token in np.argsort(-local):
        row, column = divmod(int(token), columns)
        window = min(row // 4, windows[0] - 1), min(column // 4, windows[1] - 1)
        if len(chosen) < keep // 2 and taken.get(window, 0) < share:
            taken[window] = taken.get(window, 0) + 1
            chosen.append(int(token))
    others = [int(token) for token in np.argsort(-overall) if token not in chosen]
    return sorted([*chosen, *others[: keep - keep // 2]])


def plain_merge(tokens: NDArray[np.float64], kept: list[int]) -> NDArray[np.float64]:
    """Every dropped token joins the most similar kept one."""
    unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    sums, counts = tokens[kept].copy(), np.zeros(len(kept))
    for token in range(len(tokens)):
        if token not in kept:
            nearest = int(np.argmax(unit[kept] @ unit[token]))
            sums[nearest] += tokens[token]
            counts[nearest] += 1
    return sums / (1 + counts[:, None])


class Recorder:
    """Attention of Hugging Face that keeps the float64 attention which each patch receives, by attention module."""

    def __init__(self) -> None:
        self.received: dict[int, NDArray[np.float64]] = {}

    def __call__(
        self, module: Any, *states: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        output, weights = eager_attention_forward(module, *states, **options)
        self.received[id(module)] = weights[0].double().sum(dim=0).mean(dim=0).numpy()
        return output, weights


def expected(
    visual: Any, inputs: dict[str, NDArray[Any]], size: tuple[int, int], *, keep: int
) -> tuple[NDArray[np.float64], list[int]]:
    """Tokens and kept indices by the specification, from Hugging Face's own forward pass."""
    recorder = Recorder()
    ALL_ATTENTION_FUNCTIONS.register("recorder", recorder)
    visual.config._attn_implementation = "recorder"
    tokens = hugging_face_tokens(visual, inputs, size).astype(np.float64)
    blocks = visual.blocks
    order = inputs["token_index"][: len(tokens)]
    local, overall = (
        recorder.received[id(block.attn)].reshape(-1, 4).mean(axis=1)[order]
        for block in (blocks[visual.fullatt_block_indexes[0]], blocks[-1])
    )
    rows, columns = PROCESSING.token_grid(*size)
    kept = plain_selection(local, overall, rows=rows, columns=columns, keep=keep)
    return plain_merge(tokens, kept), kept


def reduced_inputs(size: tuple[int, int], *, padded: bool = False) -> dict[str, NDArray[Any]]:
    """Room for K tokens; token_index picks the rows that a picture has."""
    own = PROCESSING.sizes(*size)
    sizes = LARGEST if padded else {**own, "P": max(own["P"], 4 * KEEP)}
    inputs = PROCESSING.prepare(random_picture(*size), {**sizes, "N": own["N"]})
    return {**inputs, "token_index": np.arange(min(KEEP, own["N"]), dtype=np.int32)}


@pytest.mark.parametrize("blocks", [1, 2], ids=["all_heads", "in_blocks"])
@pytest.mark.parametrize("padded", [False, True], ids=["exact", "padded"])
@pytest.mark.parametrize("name", SIZES)
def test_reduced_tokens_equal_the_specification(
    name: str, padded: bool, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windowed, "num_head_blocks", lambda _num_heads, _num_patches: blocks)
    size, visual = SIZES[name], random_vision_encoder(**ALL_BLOCKS)
    module = WindowedVision(visual, inv_freq=inv_freq_of(visual), max_patches=LARGEST["P"], num_keep=KEEP)
    tokens, kept = module(*in_order(reduced_inputs(size, padded=padded)))
    expected_tokens, expected_kept = expected(
        visual, PROCESSING.prepare(random_picture(*size)), size, keep=KEEP
    )
    assert kept[: len(expected_kept)].tolist() == expected_kept
    np.testing.assert_allclose(tokens, expected_tokens, **CLOSE)


@pytest.mark.parametrize(
    ("rows", "columns", "keep"),
    [
        (8, 8, 30),
        (9, 7, 20),
        (7, 7, 48),
        (11, 11, 120),
        (3, 3, 5),
        (1, 11, 10),
        (2, 40, 13),
        (30, 41, 400),
        (6, 5, 2),
    ],
)
def test_selection_equals_the_specification_in_any_order_of_tokens(
    rows: int, columns: int, keep: int
) -> None:
    generator = np.random.default_rng(rows * columns + keep)
    num_tokens, num_padding = rows * columns, 5
    local, overall = generator.random((2, num_tokens)).astype(np.float32)
    order = generator.permutation(num_tokens)
    padding = np.zeros(num_padding, np.float32)
    shuffled = [
        torch.from_numpy(np.concatenate([values[order], padding]).astype(np.float32))
        for values in (local + 0, overall, np.arange(num_tokens) // columns, np.arange(num_tokens) % columns)
    ]
    is_real = torch.arange(num_tokens + num_padding) < num_tokens
    kept = select_tokens(*shuffled, is_real, num_keep=keep).numpy()
    assert order[kept].tolist() == plain_selection(local, overall, rows=rows, columns=columns, keep=keep)


def test_no_window_gives_more_than_its_share_of_the_first_half() -> None:
    rows = columns = 16  # 16 windows, a share of 1
    row, column = (values.ravel() for values in np.indices((rows, columns)).astype(np.float32))
    local = 100.0 - row - column
    overall = np.full(rows * columns, 0.5, np.float32) - row * 0.01 - column * 0.0001
    is_real = torch.ones(rows * columns, dtype=torch.bool)
    kept = select_tokens(*map(torch.from_numpy, (local, overall, row, column)), is_real, num_keep=32).numpy()
    corners = {
        4 * window_row * columns + 4 * window_column for window_row in range(4) for window_column in range(4)
    }
    assert corners <= set(kept.tolist())


@pytest.mark.parametrize(
    ("keep", "reason"), [(1, "expected 2 to 59"), (60, "expected 2 to 59"), (4000, "expected 2 to 3839")]
)
def test_impossible_budgets_are_refused(keep: int, reason: str) -> None:
    config = random_vision_encoder(**FEW_BLOCKS).config
    with pytest.raises(ScheduleError, match=reason):
        check_windowed_keep(keep, max_visual=9000 if keep == 4000 else 60, vision_config=config)


def test_an_encoder_whose_last_block_sees_windows_only_is_refused() -> None:
    config = random_vision_encoder(depth=3, fullatt_block_indexes=[1]).config
    with pytest.raises(ScheduleError, match="last block sees the whole image"):
        check_windowed_keep(10, max_visual=60, vision_config=config)


@pytest.fixture(scope="module", params=[LARGEST["P"], 10_000], ids=["all_heads", "in_blocks"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_vision(
        lambda visual, inv_freq: WindowedVision(
            visual, inv_freq=inv_freq, max_patches=request.param, num_keep=KEEP
        ),
        random_vision_encoder(**FEW_BLOCKS),
        tmp_path_factory.mktemp("reduced"),
        outputs=(
            TensorSpec(name="visual_tokens", dtype="float32", shape=("N", OUT)),
            TensorSpec(name="kept_tokens", dtype="int32", shape=(KEEP,)),
        ),
        dtype="float32",
    )


@pytest.mark.parametrize("padded", [False, True], ids=["exact", "padded"])
@pytest.mark.parametrize("name", SIZES)
def test_exported_graph_equals_the_specification(name: str, padded: bool, exported: Path) -> None:
    session = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    tokens, kept = session.run(None, reduced_inputs(SIZES[name], padded=padded))
    inputs = PROCESSING.prepare(random_picture(*SIZES[name]))
    visual = random_vision_encoder(**FEW_BLOCKS)
    expected_tokens, expected_kept = expected(visual, inputs, SIZES[name], keep=KEEP)
    assert kept[: len(expected_kept)].tolist() == expected_kept
    np.testing.assert_allclose(tokens, expected_tokens, **CLOSE)


def test_exported_graph_is_supported_by_the_tensorrt_of_both_jetpacks(exported: Path) -> None:
    onnx.checker.check_model(exported)
    model = ir.from_proto(onnx.load(exported, load_external_data=False))
    require_supported(model, name="vision", symbols={"P", "W", "N"})


def test_exported_graph_builds_in_tensorrt(exported: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="has wheels for x86-64 Linux only; runs in CI")
    assert build_in_tensorrt(trt, exported, ({**LARGEST, "N": KEEP},)) is not None
