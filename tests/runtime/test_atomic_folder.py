"""The folder next to the target: complete or absent, and what killed writers leave is deleted by the next one."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from trio_edge.runtime.bundle import files as module
from trio_edge.runtime.bundle.errors import CheckpointError
from trio_edge.runtime.bundle.files import atomic_folder, check_place, delete_leftovers
from trio_edge.runtime.bundle.manifest import MANIFEST_NAME

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def leave(folder: Path) -> Path:
    """The leftovers of a killed export."""
    (folder / "weights").mkdir(parents=True)
    (folder / "weights" / "model.safetensors").write_bytes(b"half")
    return folder


def beside(out: Path, **settings: Any) -> AbstractContextManager[Path]:
    defaults = {"num_bytes": 0, "error": CheckpointError, "what": "bundle", "way_out": "choose another --out"}
    return atomic_folder(out, **{**defaults, **settings})


def write_bundle(out: Path, text: str) -> None:
    with beside(out) as folder:
        (folder / MANIFEST_NAME).write_text(text)


def test_the_folder_appears_under_its_name_at_the_end(tmp_path: Path) -> None:
    with beside(tmp_path / "bundle") as folder:
        (folder / MANIFEST_NAME).write_text("new")
        assert not (tmp_path / "bundle").exists()
    assert names(tmp_path) == ["bundle"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_stays_when_the_block_fails(error: type[BaseException], tmp_path: Path) -> None:
    with (
        pytest.raises(error, match="stop"),
        beside(tmp_path / "bundle") as folder,
    ):
        (folder / "file").write_text("half")
        raise error("stop")
    assert names(tmp_path) == []


def test_leftovers_of_the_same_target_are_deleted(tmp_path: Path) -> None:
    leave(tmp_path / ".bundle.partial-a1b2c3d_")
    write_bundle(tmp_path / "bundle", "new")
    assert names(tmp_path) == ["bundle"]


@pytest.mark.parametrize(
    "name", [".other.partial-a1b2c3d_", ".bundle.partial-notes", "bundle.partial-a1b2c3d_", ".bundle-partial"]
)
def test_other_folders_stay(name: str, tmp_path: Path) -> None:
    leave(tmp_path / name)
    delete_leftovers(tmp_path / "bundle")
    assert names(tmp_path) == [name]


def test_a_refusal_before_the_renaming_keeps_the_old_one(tmp_path: Path) -> None:
    def refuse() -> None:
        raise CheckpointError("not this one")

    write_bundle(tmp_path / "bundle", "old")
    with (
        pytest.raises(CheckpointError, match="not this one"),
        beside(tmp_path / "bundle", before_rename=refuse) as folder,
    ):
        (folder / MANIFEST_NAME).write_text("new")
    assert names(tmp_path) == ["bundle"]
    assert (tmp_path / "bundle" / MANIFEST_NAME).read_text() == "old"


def test_a_running_export_keeps_its_folder(tmp_path: Path) -> None:
    with beside(tmp_path / "bundle") as first:
        (first / MANIFEST_NAME).write_text("first")
        write_bundle(tmp_path / "bundle", "second")
        assert (first / MANIFEST_NAME).read_text() == "first"
    assert names(tmp_path) == ["bundle"]
    assert (tmp_path / "bundle" / MANIFEST_NAME).read_text() == "first"


HOLD = """
import sys, time
from pathlib import Path
from trio_edge.runtime.bundle.errors import CheckpointError
from trio_edge.runtime.bundle.files import atomic_folder
with atomic_folder(Path(sys.argv[1]), num_bytes=0, error=CheckpointError, what="bundle", way_out="stop") as folder:
    print(folder, flush=True)
    time.sleep(60)
"""


def test_the_folder_of_another_process_stays_until_it_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "bundle")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        folder = process.stdout.readline().strip()
        delete_leftovers(tmp_path / "bundle")
        assert [str(path) for path in tmp_path.iterdir()] == [folder]
        process.kill()
    delete_leftovers(tmp_path / "bundle")
    assert names(tmp_path) == []


@pytest.mark.parametrize("at_once", [True, False], ids=["exchanged_at_once", "renamed_in_two_steps"])
def test_an_old_bundle_is_replaced_and_nothing_else_stays(
    at_once: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not at_once:  # what happens on systems without renameat2
        monkeypatch.setattr(module, "_exchange", lambda _first, _second: False)
    write_bundle(tmp_path / "bundle", "old")
    write_bundle(tmp_path / "bundle", "new")
    assert names(tmp_path) == ["bundle"]
    assert (tmp_path / "bundle" / MANIFEST_NAME).read_text() == "new"


def test_an_old_bundle_stays_when_the_export_fails(tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle", "old")
    with (
        pytest.raises(KeyboardInterrupt, match="stop"),
        beside(tmp_path / "bundle"),
    ):
        raise KeyboardInterrupt("stop")
    assert names(tmp_path) == ["bundle"]
    assert (tmp_path / "bundle" / MANIFEST_NAME).read_text() == "old"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG], ids=errno.errorcode.get)
def test_a_full_disk_is_one_error_of_ours(number: int, tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match=r"expected room for the whole bundle, got '.*nothing was kept"),
        beside(tmp_path / "bundle") as folder,
    ):
        (folder / "file").write_text("half")
        raise OSError(number, os.strerror(number))
    assert names(tmp_path) == []


def test_a_disk_without_room_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=2_000_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    expected = r"expected 2\.50 GB of free space, got 2\.00 GB; free some space or choose another --out$"
    room = {"num_bytes": 2_500_000_000, "elsewhere": " or choose another --out"}
    with pytest.raises(CheckpointError, match=expected), beside(tmp_path / "bundle", **room):
        raise AssertionError("no folder is made")
    assert names(tmp_path) == []


def test_a_place_is_refused_long_before_anything_is_written(tmp_path: Path) -> None:
    options: Any = {"num_bytes": 1, "error": CheckpointError, "way_out": "choose another --out"}
    check_place(tmp_path / "new" / "bundle", **options)
    (tmp_path / "file").touch()
    with pytest.raises(
        CheckpointError, match=r"expected .*file to be a writable folder.*; choose another --out$"
    ):
        check_place(tmp_path / "file" / "bundle", **options)
    with pytest.raises(
        CheckpointError, match=r"GB of free space, got .*; free some space or choose another --out$"
    ):
        check_place(tmp_path / "bundle", **{**options, "num_bytes": 1 << 60})
    assert names(tmp_path) == ["file"]


def test_another_error_of_the_system_is_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    with (
        pytest.raises(PermissionError, match="not yours"),
        beside(tmp_path / "bundle"),
    ):
        raise PermissionError(errno.EACCES, "not yours")
