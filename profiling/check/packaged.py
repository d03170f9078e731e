"""The packaged model as a bundle, made without torch.

The package has the bundle's graphs and manifest next to this file. The bundle's weights file equals the packaged checkpoint's,
so the package has it only once.
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

    Engines are built into this copy; the package's own folder may not be writable.

    Args:
        target: The new folder.
        graphs: Folder of graphs and manifest; None for the package's.

    Raises:
        BundleError: If the package has no bundle.
    """
    source = GRAPHS if graphs is None else graphs
    if not (source / MANIFEST_NAME).is_file():
        raise BundleError(
            f"{source}: expected the packaged bundle, which releases have, got none; run make check in a clone, or"
            " trio-export tiny --out tiny on a machine with torch and trio-check --bundle tiny"
        )
    shutil.copytree(source, target)
    weights = files("trio_edge.export").joinpath("tiny", _WEIGHTS)
    (target / "weights").mkdir(exist_ok=True)
    (target / "weights" / _WEIGHTS).write_bytes(weights.read_bytes())
    return target


def stored_answers() -> list[AnswerRecord]:
    """Return the answers that ``benchmarks/record_check.py`` stored."""
    return msgspec.json.decode(EXPECTED.read_bytes(), type=list[AnswerRecord])
