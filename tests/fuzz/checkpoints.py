"""Small checkpoints of every family with changed settings: an export gets as far as tracing, or ends with one line."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from tests.checkpoints import save_checkpoint
from tests.fuzz.subject import Outcome, Subject, judged
from tests.fuzz.values import hostile, mutated, places
from tests.internvl_checkpoints import save_internvl_checkpoint
from tests.lfm2_checkpoints import save_lfm2_vl_checkpoint
from tests.minicpm_checkpoints import save_minicpm_checkpoint
from tests.mistral3_checkpoints import save_mistral3_checkpoint
from tests.onevision_checkpoints import save_onevision_checkpoint
from tests.qwen_checkpoints import save_qwen3_vl_checkpoint, save_qwen_checkpoint
from tests.smolvlm_checkpoints import save_smolvlm_checkpoint
from trio_edge.export.bundle import export_bundle
from trio_edge.export.options import ExportOptions
from trio_edge.trio.budgets import ScheduleRequest

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

FAMILIES: dict[str, Callable[[Path], object]] = {
    "llava": lambda folder: save_checkpoint(folder, family="llava"),
    "llava_next": save_checkpoint,
    "llava_onevision": save_onevision_checkpoint,
    "qwen2_5_vl": save_qwen_checkpoint,
    "qwen3_vl": save_qwen3_vl_checkpoint,
    "internvl": save_internvl_checkpoint,
    "smolvlm": save_smolvlm_checkpoint,
    "mistral3": save_mistral3_checkpoint,
    "lfm2_vl": save_lfm2_vl_checkpoint,
    "minicpmv4_6": save_minicpm_checkpoint,
}
_FILES = ("config.json",) * 6 + (
    "processor_config.json",
    "preprocessor_config.json",
    "generation_config.json",
    "tokenizer_config.json",
)
_MOST_SECONDS = 20.0
"""Processor time of one input; most inputs take half a second."""


class _Traced(Exception):  # noqa: N818  # no error
    """The export would now trace its graphs."""


def exported(folder: Path) -> str:
    """Export until graphs are traced."""
    options = ExportOptions(
        model=str(folder), out=folder.parent / "out", schedule=ScheduleRequest(average=0.5), max_text=16
    )
    try:
        with mock.patch("trio_edge.export.bundle.trace_graphs", side_effect=_Traced):
            export_bundle(options)
    except _Traced:
        return "ok"
    raise AssertionError("expected an export to trace its graphs")


def checkpoint(rng: random.Random, original: Path, folder: Path) -> tuple[str, Outcome]:
    """Change one file of a copy of ``original``, made in ``folder``, and return the change with its outcome."""
    copy = folder / "ck"
    shutil.copytree(original, copy, copy_function=os.link)
    name = rng.choice([name for name in _FILES if (copy / name).exists()])
    values = json.loads((copy / name).read_bytes())
    changed = _one_setting(rng, values) if rng.random() < 0.6 else mutated(rng, values, places(values))
    (copy / name).unlink()
    (copy / name).write_bytes(json.dumps(changed).encode("utf-8", "surrogatepass"))
    start = time.process_time()
    outcome = judged(lambda: exported(copy))
    if (seconds := time.process_time() - start) > _MOST_SECONDS:
        outcome = Outcome("broken", f"took {seconds:.0f} s: {outcome.text}")
    return f"{name}: {_difference(values, changed)}", outcome


@functools.cache
def _original(family: str) -> Path:
    """Return a checkpoint that this process makes once."""
    folder = Path(tempfile.mkdtemp(prefix="trio-fuzz-checkpoint-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    FAMILIES[family](folder / "ck")
    return folder / "ck"


def changed_checkpoint(rng: random.Random, subject: Subject) -> Outcome:
    """A checkpoint of any family with a changed file, exported as far as tracing."""
    return checkpoint(rng, _original(rng.choice(sorted(FAMILIES))), subject.folder)[1]


def _one_setting(rng: random.Random, values: Any) -> Any:
    """Return the JSON with another value at one place that holds no object."""
    changed = json.loads(json.dumps(values))
    leaves = [path for path in places(changed) if not isinstance(_at(changed, path), dict)]
    *parents, last = rng.choice(leaves)
    _at(changed, tuple(parents))[last] = hostile(rng)
    return changed


def _at(value: Any, path: tuple[str | int, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def _difference(old: Any, new: Any, path: str = "") -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [key for key in {**old, **new} if old.get(key, _difference) != new.get(key, _difference)]
        return "; ".join(_difference(old.get(key), new.get(key), f"{path}.{key}") for key in keys)
    return f"{path}: {old!r:.60} -> {new!r:.60}"
