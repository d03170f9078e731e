"""Checkpoints from anybody: settings that make no model, links that lead out, pipes, and weights that are not finite."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from tests.fuzz.checkpoints import FAMILIES, checkpoint, exported
from tests.shared_folder import made_once
from trio_edge.export.checkpoints.checkpoint import read_checkpoint
from trio_edge.export.checkpoints.weights import WEIGHTS_FOLDER, store_weights
from trio_edge.runtime.bundle.errors import CheckpointError

INPUTS = 4
"""Changed settings of each family; ``make fuzz`` and the same seeds run thousands."""


def original(family: str) -> Path:
    return made_once(f"hostile-{family}", lambda folder: FAMILIES[family](folder) and None)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A small LLaVA-NeXT that a test may break."""
    return shutil.copytree(original("llava_next"), tmp_path / "ck")


@pytest.mark.parametrize("seed", range(INPUTS))
@pytest.mark.parametrize("family", FAMILIES)
def test_changed_settings_end_with_an_export_or_one_line(family: str, seed: int, tmp_path: Path) -> None:
    change, outcome = checkpoint(random.Random(f"{family} {seed}"), original(family), tmp_path)
    assert not outcome.is_broken, f"{change}: {outcome.text}"


def change(folder: Path, **settings: Any) -> None:
    """Change settings of config.json; a name with two underscores is one of a part."""
    config = json.loads((folder / "config.json").read_text())
    for name, value in settings.items():
        part, _, inner = name.rpartition("__")
        (config[part] if part else config)[inner] = value
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text_config__num_hidden_layers": 10**9}, r"num_hidden_layers: expected a number in 1\.\.\d+, got 10{9};"),
        ({"text_config__hidden_size": 0}, r"hidden_size: expected a number in 1\.\.\d+, got 0;"),
        ({"text_config__vocab_size": 2**40}, r"vocab_size: expected a number in 1\.\.\d+, got 1099511627776;"),
        ({"text_config__head_dim": "wide"}, r"head_dim: expected a number in 1\.\.\d+, got 'wide';"),
        ({"vision_config__image_size": 10**6}, r"image_size: expected a number in 1\.\.4096, got 1000000;"),
        ({"vision_config__patch_size": True}, r"patch_size: expected a number in 1\.\.512, got True;"),
        ({"text_config__attention_bias": "yes"}, r"Field 'attention_bias' expected bool, got str"),
        ({"text_config__hidden_act": "jump"}, r"hidden_act: expected an activation of transformers, got 'jump';"),
        ({"projector_hidden_act": "jump"}, r"projector_hidden_act: expected an activation of transformers, got 'jump';"),
        ({"image_grid_pinpoints": [[24, 48], True]}, r"expected settings in config\.json that make a model, got 'TypeError"),
        ({"vision_feature_layer": [99]}, r"vision_feature_layer: expected indices of the tower's \d+ hidden states"),
        ({"vision_feature_layer": []}, r"vision_feature_layer: expected indices of the tower's \d+ hidden states"),
        ({"image_token_index": 2**70}, r"expected image_token_index to be the id of a token, got \d+;"),
        ({"image_token_index": -1}, r"expected image_token_index to be the id of a token, got -1;"),
    ],
    ids=lambda value: next(iter(value)).rpartition("__")[2] if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_setting_that_makes_no_model_is_named(copy: Path, settings: dict[str, Any], message: str) -> None:
    change(copy, **settings)
    with pytest.raises(CheckpointError, match=message):
        exported(copy)


def test_a_number_for_a_ratio_that_is_none_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(original("internvl"), tmp_path / "ck")
    change(folder, downsample_ratio=0.0)
    with pytest.raises(CheckpointError, match=r"expected downsample_ratio 1 / n"):
        exported(folder)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"]
)
def test_a_pipe_is_refused_at_once(copy: Path, name: str) -> None:
    (copy / name).unlink()
    os.mkfifo(copy / name)
    with pytest.raises(CheckpointError, match=rf"{name}: expected a file, got a folder, a pipe or a device"):
        read_checkpoint(str(copy))


@pytest.mark.parametrize("name", ["model.safetensors", "chat_template.jinja"])
def test_a_link_out_of_the_checkpoint_is_refused(copy: Path, tmp_path: Path, name: str) -> None:
    shutil.move(copy / name, tmp_path / "elsewhere")
    (copy / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=rf"{name}: expected a file of the checkpoint, got a link to"):
        read_checkpoint(str(copy))


def test_a_link_to_itself_is_refused(copy: Path) -> None:
    (copy / "added.json").symlink_to("added.json")
    with pytest.raises(CheckpointError, match=r"added\.json: expected a file, got"):
        read_checkpoint(str(copy))


def test_links_inside_and_into_the_cache_of_the_hub_are_followed(copy: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "c0ffee", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(copy.iterdir())):
        shutil.move(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (snapshot / "same.json").symlink_to("config.json")
    assert read_checkpoint(str(snapshot)).tensors


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_weights_that_are_not_finite_are_refused_copied_or_converted(
    tmp_path: Path, bad: float, place: str, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trio_edge.export.checkpoints.weights._PIECE_BYTES", 64)  # a tensor spans pieces
    folder = tmp_path / "ck"
    folder.mkdir()
    values = np.linspace(-1, 1, 101, dtype=np.float32)
    others = {name: np.arange(7, dtype=np.float32) for name in ("a", "z")}
    values[{"first": 0, "middle": 50, "last": 100}[place]] = bad
    save_file({**others, "m": values}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    tensors = read_checkpoint(str(folder)).tensors
    with pytest.raises(CheckpointError, match=r"tensor 'm': expected finite weights, got -?(nan|inf);"):
        store_weights(tensors, tmp_path, dtype=dtype, on_bytes=lambda _count: None)


def test_finite_weights_are_copied_whole_whatever_the_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trio_edge.export.checkpoints.weights._PIECE_BYTES", 64)
    folder, written = tmp_path / "ck", []
    folder.mkdir()
    wanted = {name: torch.randn(size).numpy() for name, size in (("a", 1), ("b", 100), ("c", 0), ("d", 33))}
    save_file(wanted, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    tensors = read_checkpoint(str(folder)).tensors
    stored = store_weights(tensors, tmp_path, dtype="float32", on_bytes=written.append)
    copied = tmp_path / WEIGHTS_FOLDER / "model.safetensors"
    assert copied.read_bytes() == (folder / "model.safetensors").read_bytes()
    assert sum(written) == copied.stat().st_size
    assert len(stored.sha256) == 1
    assert load_file(copied).keys() == wanted.keys()
