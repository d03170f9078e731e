"""Weights on their way into a bundle: copied or converted piece by piece, hashed on the way, refused if they do not fit."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from trio_edge.export.checkpoints.checkpoint import Checkpoint
from trio_edge.export.checkpoints.weights import (
    StoredName,
    StoredWeights,
    bytes_to_write,
    read_safetensors_header,
    read_tensor,
    store_weights,
)
from trio_edge.runtime.bundle.errors import CheckpointError
from trio_edge.runtime.bundle.manifest import FloatType

INFINITY, NAN = float("inf"), float("nan")


def checkpoint_of(folder: Path, *shards: dict[str, torch.Tensor]) -> Checkpoint:
    tensors = {}
    folder.mkdir()
    for index, shard in enumerate(shards):
        save_file(shard, folder / f"model-{index}.safetensors")
        tensors |= read_safetensors_header(folder / f"model-{index}.safetensors")
    return Checkpoint(folder=folder, revision=None, config={}, tensors=tensors)


def store(checkpoint: Checkpoint, bundle: Path, *, dtype: FloatType) -> StoredWeights:
    bundle.mkdir()
    written: list[int] = []
    stored = store_weights(checkpoint.tensors, bundle, dtype=dtype, on_bytes=written.append)
    assert sum(written) == bytes_to_write(checkpoint.tensors, dtype=dtype)
    return stored


def stored_values(stored: StoredWeights, name: str, bundle: Path) -> np.ndarray:
    tensor = stored.tensors[StoredName(name)]
    return np.memmap(
        bundle / tensor.file, dtype=tensor.dtype, mode="r", offset=tensor.offset, shape=tensor.shape
    )


def assert_hashes_are_those_of_the_files(stored: StoredWeights, bundle: Path) -> None:
    files = {path.relative_to(bundle).as_posix(): path for path in bundle.rglob("*") if path.is_file()}
    assert stored.sha256 == {
        name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()
    }


def test_files_that_need_no_conversion_are_copied_byte_for_byte(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    large = torch.randn(3 << 20, 3, generator=generator).half()  # more than two pieces
    checkpoint = checkpoint_of(
        tmp_path / "ck", {"a": large}, {"b": large[:5].clone(), "c": torch.ones(()).half()}
    )
    stored = store(checkpoint, tmp_path / "bundle", dtype="float16")
    for file in (tmp_path / "ck").iterdir():
        assert (tmp_path / "bundle" / "weights" / file.name).read_bytes() == file.read_bytes()
    np.testing.assert_array_equal(stored_values(stored, "b", tmp_path / "bundle"), large[:5].numpy())
    assert_hashes_are_those_of_the_files(stored, tmp_path / "bundle")


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_conversion_rounds_every_value_once(source: torch.dtype, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    shards = [
        {
            f"{shard}.{name}": torch.randn(shape, generator=generator).to(source)
            for name, shape in shapes.items()
        }
        for shard, shapes in enumerate(
            ({"odd": (3, 7), "large": (1 << 20, 5)}, {"empty": (0, 4), "one": (1,)})
        )
    ]
    stored = store(checkpoint_of(tmp_path / "ck", *shards), tmp_path / "bundle", dtype="float16")
    for name, tensor in (shards[0] | shards[1]).items():
        values = stored_values(stored, name, tmp_path / "bundle") if tensor.numel() else tensor.half().numpy()
        np.testing.assert_array_equal(values, tensor.half().numpy())
    assert_hashes_are_those_of_the_files(stored, tmp_path / "bundle")


def test_a_converted_file_is_a_safetensors_file(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "ck", {"a": torch.arange(6.0).reshape(2, 3)}, {"b": torch.ones(1)})
    store(checkpoint, tmp_path / "bundle", dtype="float16")
    loaded = load_file(tmp_path / "bundle" / "weights" / "model.safetensors")
    assert {name: values.tolist() for name, values in loaded.items()} == {
        "a": [[0, 1, 2], [3, 4, 5]],
        "b": [1],
    }


REFUSED = {
    "bfloat16_above_float16": (torch.bfloat16, 1e30, r"'bad': expected values that float16 holds \(at most 65504\), got 1.0"),
    "float32_just_above_float16": (torch.float32, 65520.0, r"'bad': expected values that float16 holds .* got 65520"),
    "negative": (torch.float32, -1e6, r"'bad': expected values that float16 holds .* got -1e\+06"),
    "infinite_in_the_source": (torch.bfloat16, INFINITY, "'bad': expected finite weights, got inf; download"),
    "not_a_number_in_the_source": (torch.float32, NAN, "'bad': expected finite weights, got nan; download"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(REFUSED))
def test_a_value_that_float16_cannot_hold_is_refused_with_the_tensors_name(name: str, tmp_path: Path) -> None:
    dtype, value, message = REFUSED[name]
    bad = torch.zeros(300, dtype=dtype)
    bad[-1] = value
    checkpoint = checkpoint_of(tmp_path / "ck", {"good": torch.ones(9, dtype=dtype), "bad": bad})
    with pytest.raises(CheckpointError, match=message):
        store(checkpoint, tmp_path / "bundle", dtype="float16")


def test_the_largest_float16_and_what_rounds_to_it_are_kept(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "ck", {"a": torch.tensor([65504.0, 65519.0, -65519.0])})
    stored = store(checkpoint, tmp_path / "bundle", dtype="float16")
    assert stored_values(stored, "a", tmp_path / "bundle").tolist() == [65504, 65504, -65504]


def test_small_values_become_subnormal_or_zero(tmp_path: Path) -> None:
    step = 2.0**-24  # the smallest subnormal float16
    checkpoint = checkpoint_of(
        tmp_path / "ck", {"a": torch.tensor([3 * step, -step, 0.75 * step, 0.25 * step, 1e-30]).bfloat16()}
    )
    stored = store(checkpoint, tmp_path / "bundle", dtype="float16")
    assert stored_values(stored, "a", tmp_path / "bundle").tolist() == [3 * step, -step, step, 0, 0]


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "ck", {"packed": torch.ones(4, dtype=torch.int8)})
    with pytest.raises(CheckpointError, match="'packed': expected floating point weights, got I8"):
        store(checkpoint, tmp_path / "bundle", dtype="float16")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_file_that_shrinks_while_it_is_read_is_refused(dtype: FloatType, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "ck", {"a": torch.ones(100).half()})
    file = tmp_path / "ck" / "model-0.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    if dtype == "float32":
        with pytest.raises(CheckpointError, match="changed while it was read"):
            store(checkpoint, tmp_path / "bundle", dtype=dtype)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        read_tensor(checkpoint.tensor("a"))


MEASURE = """
import resource, sys
from pathlib import Path
from trio_edge.export.checkpoints.weights import read_safetensors_header, store_weights
source, target = Path(sys.argv[1]), Path(sys.argv[2])
tensors = read_safetensors_header(source)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for dtype in ("float16", "float32"):
    (target / dtype).mkdir()
    store_weights(tensors, target / dtype, dtype=dtype, on_bytes=lambda _count: None)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_grows_neither_with_the_checkpoint_nor_with_its_tensors(tmp_path: Path) -> None:
    shapes = {
        f"layer.{index}": [12 << 20] for index in range(4)
    }  # 48 MB each, zeros that take no room on disk
    entries, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * shape[0]
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    with (tmp_path / "model.safetensors").open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + end)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "model.safetensors"), str(tmp_path)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    converted_kib, copied_kib = (int(line) for line in result.stdout.split())
    assert converted_kib < 40 << 10  # five pieces, and less than one tensor
    assert copied_kib < 40 << 10
