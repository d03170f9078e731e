"""The installed package: its top-level names, its light runtime, its commands."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

import trio_edge
import trio_edge.runtime
from tests.check_dist import FOLDERS, problems
from tests.documents import DOCUMENTS
from tests.shared_folder import made_once
from trio_edge.runtime.bundle.errors import install_command

ROOT = Path(__file__).parents[1]
BLOCKED = ("torch", "transformers", "onnx", "onnxscript", "onnx_ir", "safetensors", "jaxtyping")


@pytest.fixture(scope="module")
def wheel() -> Path:
    """The wheel, built once with the setuptools that is installed: two builds at a time would share one folder."""
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]

    def make(folder: Path) -> None:
        subprocess.run([*pip, "-w", str(folder), str(ROOT)], check=True, capture_output=True)

    return next(made_once("wheel", make).glob("*.whl"))


def test_the_wheel_has_no_other_top_level_name(wheel: Path) -> None:
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"trio_edge", "optimum"}


def test_the_wheel_adds_one_file_to_optimums_namespace_and_no_package(wheel: Path) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("optimum/")]
    assert names == ["optimum/commands/register/register_trio_edge.py"]


def test_the_wheel_holds_the_packaged_model_below_12_megabytes(wheel: Path) -> None:
    sizes = {entry.filename: entry.file_size for entry in zipfile.ZipFile(wheel).infolist()}
    assert 1_000_000 < sizes["trio_edge/export/tiny/model.safetensors"] < 12_000_000
    assert "trio_edge/export/tiny/tokenizer.json" in sizes


def test_runtime_imports_without_torch_transformers_and_onnx() -> None:
    code = f"""
import sys
for name in {BLOCKED!r}:
    sys.modules[name] = None
import trio_edge.runtime, trio_edge.runtime.cli.run, trio_edge.runtime.cli.inspect
import trio_edge.runtime.images.overlay, trio_edge.runtime.backends.onnxruntime
import trio_edge.runtime.cli.build, trio_edge.profiling.cli, trio_edge.profiling.page.page
import trio_edge.serving.cli, trio_edge.serving.app
import trio_edge.calibration.evaluate.cli, trio_edge.calibration.search.options
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_wheel_has_every_module_of_the_tree(wheel: Path) -> None:
    """A new folder must be listed in pyproject.toml; an editable install works without."""
    packages = ("trio", "export", "runtime", "profiling", "calibration", "serving")
    tree = {f"trio_edge/{path.relative_to(ROOT)}" for top in packages for path in (ROOT / top).rglob("*.py")}
    assert tree - set(zipfile.ZipFile(wheel).namelist()) == set()


@pytest.mark.parametrize(
    ("python", "glibc_minor", "cuda_python"),
    [
        pytest.param("3.10", 35, "cuda-python==12.6.*", id="JetPack 6"),
        pytest.param("3.12", 39, "cuda-python==13.2.*", id="JetPack 7.2"),
    ],
)
def test_a_jetson_installs_everything_from_wheels(
    wheel: Path, tmp_path: Path, python: str, glibc_minor: int, cuda_python: str
) -> None:
    """A Jetson shall need no compiler. pip takes none but the tags that it is given, so all up to the device's are named."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    if subprocess.run([*pip, "index", "versions", "numpy"], capture_output=True, check=False).returncode:
        pytest.skip("needs a package index, which this machine does not reach; runs in CI")
    tags = [f"--platform=manylinux_2_{minor}_aarch64" for minor in range(17, glibc_minor + 1)]
    where = ["--dry-run", "--ignore-installed", "--only-binary=:all:", f"--target={tmp_path}"]
    result = subprocess.run(
        [
            *pip,
            "install",
            *where,
            *tags,
            f"--python-version={python}",
            f"{wheel}[ort,gpu,profile]",
            cuda_python,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found = re.search(r"\bonnxruntime-1\.(\d+)\.", result.stdout)
    assert found is not None
    assert int(found[1]) >= 20  # the extra's bound


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"url": "file:///home/me/my%20clone", "dir_info": {}}, 'pip install ".[ort]" in /home/me/my clone'),
        (
            {"url": "file:///home/me/clone", "dir_info": {"editable": True}},
            'pip install -e ".[ort]" in /home/me/clone',
        ),
        ({"url": "WHEEL", "archive_info": {}}, 'pip install "FOLDER/trio_edge-9.8-py3-none-any.whl[ort]"'),
        (
            {"url": "file:///gone/a.whl", "archive_info": {}},
            'pip install "./trio_edge-9.8-py3-none-any.whl[ort]"',
        ),
        (None, 'pip install "./trio_edge-9.8-py3-none-any.whl[ort]"'),
    ],
    ids=["clone", "editable clone", "wheel", "deleted wheel", "unknown"],
)
def test_the_install_command_names_what_this_copy_was_installed_from(
    source: dict[str, Any] | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the files that pip writes, in the only folder that is searched."""
    wheel = tmp_path / "trio_edge-9.8-py3-none-any.whl"
    wheel.touch()
    info = tmp_path / "trio_edge-9.8.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.4\nName: trio-edge\nVersion: 9.8\n")
    if source is not None:
        text = json.dumps(source).replace("WHEEL", wheel.as_uri())
        (info / "direct_url.json").write_text(text)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert install_command("ort") == expected.replace("FOLDER", str(tmp_path))


def test_no_message_and_no_page_installs_trio_edge_from_an_index() -> None:
    """It is on none; another project could take the name."""
    folders = ("trio", "export", "runtime", "profiling", "calibration", "serving", "trio_edge", "examples")
    code = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    pages = [*DOCUMENTS, *(ROOT / "examples").rglob("*.md")]
    wrong = re.compile(r"pip install (?:-\S+ )*[\"']?trio-edge")
    found = [str(path.relative_to(ROOT)) for path in (*code, *pages) if wrong.search(path.read_text())]
    assert found == []


def test_the_version_is_that_of_the_installed_package() -> None:
    assert trio_edge.__version__ == importlib.metadata.version("trio-edge")


def test_public_names_are_exactly_those_declared() -> None:
    declared = set(trio_edge.runtime.__all__)
    assert declared == {name for name in declared if hasattr(trio_edge.runtime, name)}
    assert list(trio_edge.runtime.__all__) == sorted(trio_edge.runtime.__all__)


def test_the_repositorys_trio_folder_does_not_shadow_pypis_package() -> None:
    assert not (ROOT / "trio" / "__init__.py").exists()


@pytest.mark.parametrize(
    "command",
    [
        "trio-export",
        "trio-inspect",
        "trio-build",
        "trio-run",
        "trio-watch",
        "trio-profile",
        "trio-check",
        "trio-eval",
        "trio-serve",
    ],
)
def test_every_command_prints_help(command: str) -> None:
    path = Path(sys.executable).parent / command
    result = subprocess.run([path, "--help"], capture_output=True, text=True, check=False)
    assert result.returncode == 0
    assert result.stdout.startswith("Usage: " + command)


def test_shape_annotations_are_checked_in_tests() -> None:
    import torch

    from trio_edge.trio.nms import FeatureNms

    nms = FeatureNms(num_keep=2, threshold=0.8, rounds=2)
    with pytest.raises(Exception, match=r"Type-check error"):
        nms(torch.zeros(4, 3), torch.zeros(5), torch.tensor([4]))


def test_the_citation_has_the_packages_version() -> None:
    assert f"\nversion: {trio_edge.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_a_wheel_or_sdist_with_a_missing_or_a_foreign_file_is_found(tmp_path: Path, wheel: Path) -> None:
    shutil.copy(wheel, tmp_path)
    with tarfile.open(tmp_path / "trio_edge-0.tar.gz", "w") as sdist:
        for top in FOLDERS:
            if (ROOT / top).exists():
                sdist.add(ROOT / top, f"trio_edge-0/{top}", filter=_without_pipeline)
    with zipfile.ZipFile(tmp_path / wheel.name, "a") as archive:
        archive.writestr("trio_edge/secret.txt", "")
    assert problems(tmp_path) == [
        f"{wheel.name}: expected no trio_edge/secret.txt, got it",
        "trio_edge-0.tar.gz: expected runtime/pipeline.py, got none",
    ]


def _without_pipeline(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if member.name.endswith("runtime/pipeline.py") else member
