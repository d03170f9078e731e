"""The example of a selector in a package of its own: installed, exported, costed, inspected, predicted and run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tests.checkpoints import save_checkpoint
from tests.pictures import random_picture

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "selector_package"
RUN = """
import sys
sys.modules.update(dict.fromkeys(["torch", "transformers", "onnx", "norm_selector"]))  # none can be imported
import json
from PIL import Image
from trio_edge.runtime.pipeline import Pipeline
with Pipeline.from_bundle(sys.argv[1], backend="onnxruntime", threads=1) as pipeline:
    answer = pipeline.generate(Image.open(sys.argv[2]), "w1 w2", max_new_tokens=2)
    assert answer.text is not None  # read to its end
    print(json.dumps([stage.tolist() for stage in answer.kept]))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the package is installed into, as pip would do it without network."""
    folder = tmp_path_factory.mktemp("site")
    source = shutil.copytree(EXAMPLE, folder / "source", ignore=shutil.ignore_patterns("__pycache__"))
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def trio(site: Path | None, command: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run one of our commands where the package is installed, or is not."""
    module, function = (
        {"trio-export": "export.cli", "trio-inspect": "runtime.cli.inspect", "trio-profile": "profiling.cli"}[
            command
        ],
        "main",
    )
    code = f"import sys; from trio_edge.{module} import {function}; sys.exit({function}())"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": "" if site is None else str(site), "COLUMNS": "200"},
    )  # fmt: skip


EXPORT = """
import sys
from tests.shared_traces import shared_traces
from trio_edge.export.cli import main
with shared_traces():
    sys.exit(main())
"""
"""The command itself, in which only graphs that a test run has traced already are not traced again."""


@pytest.fixture(scope="module")
def bundle(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    checkpoint = save_checkpoint(folder / "ck", num_layers=3, num_kv_heads=2)
    arguments = f"{checkpoint} --method norm --keep 60% --max-text 32 --max-new-tokens 4 --target orin-nano-8"
    done = subprocess.run(
        [sys.executable, "-c", EXPORT, *arguments.split(), "--out", folder / "bundle"],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(site), "COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "bundle"


def test_the_manifest_has_its_name_rule_and_cost(bundle: Path) -> None:
    manifest = json.loads((bundle / "trio.json").read_text())
    assert (manifest["schedule"]["method"], manifest["schedule"]["positions"]) == ("norm", "preserved")
    assert [stage["layer"] for stage in manifest["schedule"]["stages"]] == [
        1
    ]  # 2 of 3 layers would see too much
    assert manifest["cost"]["reduced_flops"]["select"] == 0


def test_a_runtime_without_torch_and_without_the_package_runs_it(bundle: Path, tmp_path: Path) -> None:
    random_picture(60, 40, seed=1).save(tmp_path / "picture.png")
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(bundle), str(tmp_path / "picture.png")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (kept,) = json.loads(done.stdout)
    assert len(kept) == json.loads((bundle / "trio.json").read_text())["schedule"]["stages"][0]["keep"]
    assert np.all(np.diff(kept) > 0)


def test_it_is_inspected_without_and_predicted_with_the_package(site: Path, bundle: Path) -> None:
    shown = trio(None, "trio-inspect", bundle)
    assert shown.returncode == 0, shown.stderr
    assert " at layer 1 " in shown.stdout
    predicted = trio(site, "trio-profile", bundle, "--predict", "orin-nano-8", "--keep", "70%")
    assert predicted.returncode == 0, predicted.stderr
    missing = trio(None, "trio-profile", bundle, "--predict", "orin-nano-8")
    assert missing.returncode == 2
    assert "expected one of trio, fastv, pyramiddrop, dart, sparsevlm, got 'norm'" in missing.stderr


def test_help_and_list_name_it(site: Path) -> None:
    help_text = " ".join(trio(site, "trio-export", "--help").stdout.split())
    assert "norm: largest hidden states" in help_text
    assert (
        "norm: largest hidden states (selector of the package trio-edge-norm)"
        in trio(site, "trio-export", "--list").stdout
    )
    assert "norm:" not in trio(None, "trio-export", "--help").stdout
