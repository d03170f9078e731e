"""Names of checkpoints: aliases, local folders and Hub ids, with only what is needed downloaded and read."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.hub_server import COMMIT, HubServer, serve
from tests.preloaded import preloaded
from trio_edge.export.checkpoints.checkpoint import ALIASES, canonical_name, locate, read_checkpoint
from trio_edge.export.checkpoints.weights import read_safetensors_header
from trio_edge.runtime.bundle.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Run = Callable[..., subprocess.CompletedProcess[str]]

REPOSITORY = "someone/sharded-llava"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
TRIO_EXPORT = Path(sys.executable).parent / "trio-export"
READ = """
import json, sys
assert "huggingface_hub" not in sys.modules
from trio_edge.export.checkpoints.checkpoint import read_checkpoint
from trio_edge.runtime.bundle.errors import CheckpointError
try:
    checkpoint = read_checkpoint(sys.argv[1], revision=sys.argv[2] or None)
except CheckpointError as error:
    sys.exit(f"refused: {error}")
print(json.dumps([str(checkpoint.folder), checkpoint.revision, sorted(checkpoint.tensors)]))
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository as they are on the Hub: two shards with an index, pickles next to them, another format, code."""
    folder = tmp_path_factory.mktemp("repository")
    (folder / "config.json").write_text('{"model_type": "llava"}')
    (folder / "tokenizer.model").write_bytes(b"sentencepiece")
    for index, shard in enumerate(SHARDS):
        save_file({f"model.language_model.layers.{index}.x": np.ones(64, np.float32)}, folder / shard)
    weight_map = {f"model.language_model.layers.{index}.x": shard for index, shard in enumerate(SHARDS)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    save_file({"x": np.ones(4, np.float32)}, folder / "consolidated.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "modeling_custom.py").write_text("raise SystemExit('ran')")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    return folder


@pytest.fixture
def hub(repository: Path) -> Iterator[HubServer]:
    with serve(repository, repository=REPOSITORY) as server:
        yield server


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Runs Python code; huggingface_hub, which reads its environment once, is not imported yet."""
    with preloaded("trio_edge.export.checkpoints.checkpoint") as run:
        yield run


@pytest.fixture
def read(run: Run) -> Run:
    """Reads a checkpoint in a process of its own."""

    def read(
        hub: HubServer, cache: Path, *, revision: str = "", model: str = REPOSITORY, **more: str
    ) -> subprocess.CompletedProcess[str]:
        return run(READ, model, revision, env=hub.environment(cache, **more))

    return read


def refusal(result: subprocess.CompletedProcess[str]) -> str:
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("refused: ")]
    assert result.returncode == 1
    return line


def hub_cache(cache: Path, repository: Path, *, without: tuple[str, ...] = ()) -> Path:
    """Lay ``repository`` out as huggingface_hub does, by hand, and return the snapshot."""
    root = cache / "hub" / ("models--" + REPOSITORY.replace("/", "--"))
    snapshot = root / "snapshots" / COMMIT
    for folder in (root / "blobs", root / "refs", snapshot):
        folder.mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    for number, file in enumerate(sorted(repository.glob("*.*"))):
        if file.name not in without and file.suffix in (".json", ".safetensors"):
            shutil.copy(file, root / "blobs" / f"{number:040x}")
            (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    return snapshot


def test_aliases_name_the_published_checkpoints() -> None:
    repositories = {name: alias.repository for name, alias in ALIASES.items()}
    assert (
        repositories.items()
        >= {
            "tiny": None,
            "llava-1.5-7b": "llava-hf/llava-1.5-7b-hf",
            "llava-1.5-13b": "llava-hf/llava-1.5-13b-hf",
            "llava-next-7b": "llava-hf/llava-v1.6-vicuna-7b-hf",
            "llava-next-mistral-7b": "llava-hf/llava-v1.6-mistral-7b-hf",
            "llava-next-13b": "llava-hf/llava-v1.6-vicuna-13b-hf",
            "qwen2.5-vl-3b": "Qwen/Qwen2.5-VL-3B-Instruct",
            "qwen2.5-vl-7b": "Qwen/Qwen2.5-VL-7B-Instruct",
        }.items()
    )


def test_list_is_an_aligned_table_of_aliases(capsys: pytest.CaptureFixture[str]) -> None:
    from trio_edge.export.cli import main

    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    columns = [[match.start() for match in re.finditer(r"\S+(?: \S+)*", line)] for line in lines]
    assert [line.split()[0] for line in lines] == ["MODEL", *ALIASES]
    assert len(columns[0]) == 3
    assert all(starts == columns[0] for starts in columns)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("llava-next-mistal-7b", "did you mean llava-next-mistral-7b"),
        ("Qwen3-VL", "did you mean qwen3-vl-2b or qwen3-vl-4b or qwen3-vl-8b"),
        ("Qwen2.5-VL-7B", "did you mean qwen2.5-vl-7b"),
        ("something else", "check the spelling"),
        ("./checkpoints", "check the path"),
        ("/no/such/folder", "check the path"),
        (__file__, "got a file"),
    ],
)
def test_unknown_name_says_what_was_expected(model: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(message)):
        locate(model)


def test_hub_repository_is_read_without_its_pickles_code_and_other_formats(
    read: Run, hub: HubServer, tmp_path: Path
) -> None:
    result = read(hub, tmp_path)
    assert result.returncode == 0, result.stderr
    folder, revision, tensors = json.loads(result.stdout)
    assert folder.endswith(f"models--someone--sharded-llava/snapshots/{COMMIT}")
    assert revision == COMMIT
    assert tensors == ["language_model.layers.0.x", "language_model.layers.1.x"]
    assert sorted(hub.fetched) == sorted(
        ["config.json", "model.safetensors.index.json", "tokenizer.model", *SHARDS]
    )


def test_second_read_of_a_hub_repository_downloads_nothing(read: Run, hub: HubServer, tmp_path: Path) -> None:
    assert read(hub, tmp_path).returncode == 0
    hub.fetched.clear()
    offline = read(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert hub.fetched == []


def test_interrupted_download_is_completed_or_named_when_offline(
    read: Run, hub: HubServer, tmp_path: Path
) -> None:
    assert read(hub, tmp_path).returncode == 0
    (shard,) = tmp_path.glob(f"hub/*/snapshots/*/{SHARDS[1]}")
    shard.resolve().unlink()
    shard.unlink()
    assert f"expected {SHARDS[1]} in the cache" in refusal(read(hub, tmp_path, HF_HUB_OFFLINE="1"))
    assert read(hub, tmp_path).returncode == 0


@pytest.mark.parametrize("revision", ["", "main", COMMIT], ids=["default", "branch", "commit"])
def test_cached_revision_is_read_offline(
    revision: str, read: Run, hub: HubServer, repository: Path, tmp_path: Path
) -> None:
    snapshot = hub_cache(tmp_path, repository)
    result = read(hub, tmp_path, revision=revision, HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)[:2] == [str(snapshot), COMMIT]


def test_cache_without_a_shard_or_the_revision_gives_one_line_offline(
    read: Run, hub: HubServer, repository: Path, tmp_path: Path
) -> None:
    hub_cache(tmp_path, repository, without=SHARDS[:1])
    missing = refusal(read(hub, tmp_path, HF_HUB_OFFLINE="1"))
    assert f"expected {SHARDS[0]} in the cache" in missing
    assert "run again with a connection" in missing
    other = refusal(read(hub, tmp_path, revision="v2", HF_HUB_OFFLINE="1"))
    assert "complete cached copy at revision 'v2', got no connection" in other


def test_hub_repository_of_pickles_is_refused_with_a_way_out(read: Run, tmp_path: Path) -> None:
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "config.json").write_text('{"model_type": "llava"}')
    (tmp_path / "repository" / "pytorch_model.bin").write_bytes(b"pickle")
    with serve(tmp_path / "repository", repository=REPOSITORY) as hub:
        line = refusal(read(hub, tmp_path / "cache"))
    assert "only safetensors are read, never pickles" in line
    assert "save_pretrained" in line
    assert hub.fetched == ["config.json"]


def test_token_opens_a_private_repository(read: Run, hub: HubServer, tmp_path: Path) -> None:
    hub.required_token = "hf_secret"
    assert "set HF_TOKEN" in refusal(read(hub, tmp_path))
    assert read(hub, tmp_path, HF_TOKEN="hf_secret").returncode == 0


def test_gated_repository_and_unknown_revision_say_what_to_do(
    read: Run, hub: HubServer, tmp_path: Path
) -> None:
    assert "expected a branch, tag or commit for --revision, got 'v9'" in refusal(
        read(hub, tmp_path, revision="v9")
    )
    assert "check the spelling" in refusal(read(hub, tmp_path, model="someone/else"))
    hub.gated = True
    assert "accept its terms" in refusal(read(hub, tmp_path))


def test_ctrl_c_in_a_download_gives_one_line_at_once(hub: HubServer, tmp_path: Path) -> None:
    hub.stalls_at = SHARDS[0]
    process = subprocess.Popen(
        [TRIO_EXPORT, REPOSITORY, "--out", tmp_path / "bundle"],
        env=hub.environment(tmp_path / "cache"),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert hub.stalled.wait(60)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=20)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130
    assert "trio-export: interrupted" in error.splitlines()
    assert "Traceback" not in error
    assert not (tmp_path / "bundle").exists()


def test_refused_configuration_downloads_no_weights(run: Run, hub: HubServer, tmp_path: Path) -> None:
    refuse = f"""
from trio_edge.export.checkpoints.checkpoint import read_checkpoint
read_checkpoint({REPOSITORY!r}, check_config=lambda folder, config: exit(config["model_type"]))
"""
    result = run(refuse, env=hub.environment(tmp_path / "cache"))
    assert result.stderr.splitlines()[-1] == "llava"
    assert "config.json" in hub.fetched
    assert not set(hub.fetched) & set(SHARDS)


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "a/../../x.safetensors",
        "/etc/x.safetensors",
        "..",
        "a\\b.safetensors",
        "pytorch_model-1.bin",
    ],
)
def test_index_that_names_anything_but_a_safetensors_file_of_the_checkpoint_is_refused(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(CheckpointError, match="expected safetensors files inside the checkpoint"):
        read_checkpoint(str(tmp_path))


def test_local_pickles_are_refused_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"pickled weights, which are never read; .*save_pretrained"):
        read_checkpoint(str(tmp_path))


def test_offsets_outside_the_data_are_refused(tmp_path: Path) -> None:
    header = b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[-8,0]}}'
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match=r"complete safetensors file.*-8"):
        read_safetensors_header(tmp_path / "x.safetensors")


def test_weights_that_are_links_into_a_cache_are_copied_as_files(repository: Path, tmp_path: Path) -> None:
    from trio_edge.export.checkpoints.weights import store_weights

    checkpoint = read_checkpoint(str(hub_cache(tmp_path, repository)))
    (tmp_path / "bundle").mkdir()
    store_weights(
        checkpoint.tensors,
        tmp_path / "bundle",
        dtype="float32",
        on_bytes=lambda _count: None,
    )
    stored = list((tmp_path / "bundle").rglob("*.safetensors"))
    assert sorted(path.name for path in stored) == sorted(SHARDS)
    assert not any(path.is_symlink() for path in stored)


@pytest.mark.parametrize(
    "name",
    [
        "language_model.model.layers.0.mlp.up_proj.weight",
        "model.language_model.layers.0.mlp.up_proj.weight",
        "language_model.layers.0.mlp.up_proj.weight",
    ],
)
def test_names_of_old_and_new_releases_are_one(name: str) -> None:
    assert canonical_name(name) == "language_model.layers.0.mlp.up_proj.weight"
