"""Engines of the shared reduced bundle, built once in a test run by the real command."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from tests.shared_folder import made_once
from trio_edge.runtime.cli_build import main
from trio_edge.runtime.engine_host import Gpu, Host

if TYPE_CHECKING:
    from pathlib import Path

GPU = Gpu(name="a GPU", compute_capability=86, memory_bytes=8 << 30, driver="560.35 (CUDA 12.6)")
HOST = Host(machine="x86_64", system="Linux", gpu=GPU)
"""A machine that the engines run on, if it has the TensorRT that built them."""


def copy_bundle(source: Path, target: Path) -> Path:
    """Return ``target``, a copy of the bundle; hard links would do, but onnx refuses files that have several."""
    return shutil.copytree(source, target)


def bundle_with_engines(reduced_bundle: Path) -> Path:
    """Return a copy of ``reduced_bundle`` with all engines for compute capability 8.6. Nobody may change it."""

    def make(folder: Path) -> None:
        shutil.copytree(reduced_bundle, folder)
        assert main([str(folder), "--backend", "tensorrt-rtx", "--compute-capability", "86", "--quiet"]) == 0

    return made_once("bundle-with-engines", make)


def engine_folder(bundle: Path) -> Path:
    """Return the only folder of engines in ``bundle``."""
    (folder,) = (bundle / "engines").iterdir()
    return folder


def replace_bytes(file: Path, content: bytes) -> None:
    """Give ``file`` other content without touching what it is a hard link of."""
    file.unlink()
    file.write_bytes(content)
