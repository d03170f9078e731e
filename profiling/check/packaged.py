"""The packaged model as a bundle, put together without torch.

The package holds the bundle's graphs and manifest next to this file. Its weights are the packaged checkpoint's file, byte
for byte, which the package holds once.
"""

from __future__ import annotations

import shutil
from importlib.resources import files
from pathlib import Path

import msgspec

from trio_edge.profiling.check.answers import AnswerRecord
from trio_edge.runtime.bundle.errors import BundleError
from trio_edge.runtime.bundle.manifest import MANIFEST_NAME

GRAPHS = Path(__file__).parent / "bundle"
EXPECTED = Path(__file__).parent / "expected.json"
_WEIGHTS = "model.safetensors"


def put_together(target: Path, *, graphs: Path | None = None) -> Path:
    """Write the packaged bundle to ``target``, a new folder, and return it.

    A copy, as engines are built into it and the package's folder may belong to the administrator.

    Args:
        target: The folder to be.
        graphs: Where graphs and manifest lie. [default: in the package]

    Raises:
        BundleError: If the package was made without it.
    """
    source = GRAPHS if graphs is None else graphs
    if not (source / MANIFEST_NAME).is_file():
        raise BundleError(
            f"{source}: expected the packaged bundle, which releases hold, got none; run make check in a clone, or"
            " trio-export tiny --out tiny on a machine with torch and trio-check --bundle tiny"
        )
    shutil.copytree(source, target)
    weights = files("trio_edge.export").joinpath("tiny", _WEIGHTS)
    (target / "weights").mkdir(exist_ok=True)
    (target / "weights" / _WEIGHTS).write_bytes(weights.read_bytes())
    return target


def stored_answers() -> list[AnswerRecord]:
    """Return the results that ``benchmarks/record_check.py`` stored."""
    return msgspec.json.decode(EXPECTED.read_bytes(), type=list[AnswerRecord])
