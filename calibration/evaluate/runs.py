"""Runs several bundles over the same questions and keeps the outcomes in a work folder, so that a run can be continued.

The reference goes first, because the others compare their first token with its. The folder has one file per run, with a
``RunKey`` as its header and one outcome per line.
"""

from __future__ import annotations

import hashlib
from contextlib import closing
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from trio_edge.calibration.evaluate.answering import OWN_SELECTION, Asking, Failure, Outcome, Settings
from trio_edge.calibration.evaluate.baselines import SMALLER_IMAGE
from trio_edge.calibration.evaluate.workers import answer_here, answer_in_processes
from trio_edge.calibration.json_lines import (
    LOCK_NAME,
    SUFFIX,
    locked_folder,
    opened_results,
    read_header,
    read_results,
)
from trio_edge.runtime.backends.registry import make_backend, with_accuracy
from trio_edge.runtime.bundle.errors import DataError
from trio_edge.runtime.bundle.manifest import MANIFEST_NAME
from trio_edge.runtime.bundle.reader import Bundle, open_bundle, sha256_of
from trio_edge.trio.methods import stage_method

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Generator, Sequence
    from pathlib import Path

    from trio_edge.calibration.evaluate.workers import Task
    from trio_edge.calibration.questions import Question
    from trio_edge.runtime.bundle.manifest import Manifest


_AN_OUTCOME = "an outcome"


class RunInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Description of one run."""

    label: str
    method: str
    """Name of the selection; runs that differ only in budget share it."""
    bundle: str
    bundle_sha256: str
    selection: str
    dtype: str
    is_reference: bool


class Run(NamedTuple):
    """One bundle with one selection."""

    info: RunInfo
    bundle: Bundle
    keep_all: Bundle | None = None
    """With ``smaller-image``, the bundle that answers, at the budget of ``bundle``."""


class Answers(NamedTuple):
    """Outcomes and failures of all runs."""

    runs: list[tuple[RunInfo, dict[int, Outcome]]]
    failures: list[tuple[str, Failure]]


def plan_runs(
    bundles: Sequence[Path],
    *,
    reference: Path | None = None,
    selections: Sequence[str] = (OWN_SELECTION,),
    labels: Sequence[str] | None = None,
) -> list[Run]:
    """Return every bundle with every selection, the reference first; ``reference`` may be one of ``bundles``.

    Raises:
        BundleError: If a bundle is broken.
        DataError: If the reference reduces tokens or has another model, a run is given twice, or a bundle without stages
            is to run with a baseline.
    """
    opened = [open_bundle(folder) for folder in bundles]
    names = list(labels) if labels is not None else _names(bundles)
    runs, full = [], None
    if reference is not None:
        full = open_bundle(reference)
        _check_reference(full, opened)
        position = next(
            (i for i, folder in enumerate(bundles) if folder.resolve() == reference.resolve()), None
        )
        label = reference.name or str(reference) if position is None else names[position]
        runs.append(_run(full, label, OWN_SELECTION, is_reference=True))
    for bundle, name in zip(opened, names, strict=True):
        if reference is not None and bundle.folder.resolve() == reference.resolve():
            continue
        for selection in selections:
            _check_selection(bundle, selection, has_reference=reference is not None)
            label = name if selection == OWN_SELECTION else f"{name} ({selection})"
            run = _run(bundle, label, selection, is_reference=False)
            runs.append(run._replace(keep_all=full) if selection == SMALLER_IMAGE else run)
    wanted = [(run.info.bundle_sha256, run.info.selection) for run in runs]
    for index, run in enumerate(runs):
        if wanted.index(wanted[index]) != index:
            raise DataError(f"{run.bundle.folder}: expected each bundle once, got it twice; leave one out")
    return runs


def keys_of(runs: Sequence[Run], settings: Settings, *, data_sha256: str) -> list[RunKey]:
    """Return each run's key, under which its outcomes are stored."""
    reference = next((run.info.bundle_sha256 for run in runs if run.info.is_reference), None)
    return [
        RunKey(
            schema_version=SCHEMA_VERSION,
            data_sha256=data_sha256,
            bundle_sha256=run.info.bundle_sha256,
            selection=run.info.selection,
            reference_sha256=reference,
            answer_tokens=settings.answer_tokens,
            backend=with_accuracy(
                make_backend(settings.backend, bundle=run.bundle, threads=settings.threads).name,
                settings.cpu_accuracy,
            ),
        )
        for run in runs
    ]


def answer_runs(
    runs: Sequence[Run],
    keys: Sequence[RunKey],
    questions: Sequence[Question],
    settings: Settings,
    *,
    folder: Path,
    merge: Sequence[Path] = (),
    on_start: Callable[[Run, int], None] = lambda _run, _done: None,
    on_answer: Callable[[], None] = lambda: None,
) -> Answers:
    """Answer all questions that have no outcome in the work folder yet, run by run. Outcomes in ``merge`` are copied first.

    ``on_start`` gets each run and its number of outcomes so far.

    Raises:
        DataError: If a folder is of other data or bundles, or cannot be written.
        BackendError: If a worker dies.
    """
    for other in merge:
        if other.resolve() == folder.resolve():
            raise DataError(
                f"--merge {other}: expected another folder than --work, got the same; leave it out"
            )
        check_folder(other, keys)
    answers = Answers([], [])
    with locked_folder(folder):
        check_folder(folder, keys)
        # filled by the reference, which is the first run
        firsts: dict[int, Outcome] = {}
        for run, key in zip(runs, keys):
            with opened_results(folder / key.file_name, key, Outcome, what=_AN_OUTCOME) as (file, known):
                done = _still_valid(known, questions)
                for other in merge:
                    theirs = read_results(other / key.file_name, Outcome, what=_AN_OUTCOME)
                    for index, outcome in _still_valid(theirs, questions).items():
                        if index not in done:
                            file.append(outcome)
                            done[index] = outcome
                on_start(run, len(done))
                tasks = [
                    (question, firsts[question.index].first_token if question.index in firsts else None)
                    for question in questions
                    if question.index not in done
                ]
                # closing ends the workers if an error or Ctrl-C leaves the loop
                with closing(_answers(run, tasks, settings)) as results:
                    for result in results:
                        if isinstance(result, Outcome):
                            file.append(result)
                            done[result.index] = result
                        else:
                            answers.failures.append((run.info.label, result))
                        on_answer()
            if run.info.is_reference:
                firsts = done
            answers.runs.append((run.info, done))
    return answers


def _still_valid(outcomes: list[Outcome], questions: Sequence[Question]) -> dict[int, Outcome]:
    """Return the outcomes of ``questions`` whose images have not changed, by question."""
    images = {question.index: question.image_id for question in questions}
    return {one.index: one for one in outcomes if images.get(one.index) == one.picture_id}


def _answers(run: Run, tasks: list[Task], settings: Settings) -> Generator[Outcome | Failure, None, None]:
    asking = Asking(
        bundle=(run.keep_all or run.bundle).folder,
        budget_of=None if run.keep_all is None else run.bundle.folder,
        selection=run.info.selection,
        is_reference=run.info.is_reference,
        settings=settings,
    )
    workers = min(settings.workers, len(tasks))
    if not tasks:
        return
    if workers > 1:
        yield from answer_in_processes(asking, tasks, workers=workers)
    else:
        yield from answer_here(asking, tasks)


def _run(bundle: Bundle, label: str, selection: str, *, is_reference: bool) -> Run:
    manifest = bundle.manifest
    info = RunInfo(
        label=label,
        method=method_of(manifest, selection),
        bundle=str(bundle.folder),
        bundle_sha256=sha256_of(bundle.folder / MANIFEST_NAME),
        selection=selection,
        dtype=manifest.dtype,
        is_reference=is_reference,
    )
    return Run(info, bundle)


def method_of(manifest: Manifest, selection: str) -> str:
    """Return the name of a run's selection, without its budget."""
    schedule = manifest.schedule
    if selection == SMALLER_IMAGE:
        return selection
    if selection != OWN_SELECTION:
        return selection if schedule.positions == "compact" else f"{selection}, {schedule.positions}"
    before = [] if manifest.encoder_keep is None else ["encoder"]
    if manifest.token_method is not None:
        before.append(manifest.token_method)
    decoder = []
    if schedule.stages:
        has_probe = stage_method(schedule.method).has_probe
        settings = [
            *(["answer rows"] if has_probe and schedule.probe_rows == "answer" else []),
            *(["preserved"] if schedule.positions == "preserved" and manifest.position_axes == 1 else []),
        ]
        decoder = [", ".join([schedule.method, *settings])]
    return " + ".join([*before, *decoder]) or "keep-all"


def _names(bundles: Sequence[Path]) -> list[str]:
    short = [folder.resolve().name for folder in bundles]
    return [name if short.count(name) == 1 else str(folder) for name, folder in zip(short, bundles)]


def _check_reference(reference: Bundle, bundles: Sequence[Bundle]) -> None:
    manifest = reference.manifest
    if manifest.schedule.stages or manifest.encoder_keep is not None or manifest.token_keep is not None:
        raise DataError(
            f"--reference {reference.folder}: expected a keep-all bundle, got one that keeps"
            f" {100 * manifest.average_keep:.1f} %; export one with --keep 100%"
        )
    for bundle in bundles:
        if (bundle.manifest.model, bundle.manifest.dimensions) != (manifest.model, manifest.dimensions):
            raise DataError(
                f"--reference {reference.folder}: expected the model of {bundle.folder} ({bundle.manifest.model}),"
                f" got {manifest.model}; export both from one model"
            )


def _check_selection(bundle: Bundle, selection: str, *, has_reference: bool) -> None:
    if selection == SMALLER_IMAGE:
        if not has_reference:
            raise DataError(
                f"--selection {selection}: expected --reference, the keep-all bundle that answers, got none; add it"
            )
        return
    if selection != OWN_SELECTION and not bundle.manifest.schedule.stages:
        raise DataError(
            f"--selection {selection}: expected a bundle with stages, got {bundle.folder} without any;"
            " leave it out, or give it as --reference"
        )
    if selection == "base-tile-first" and bundle.manifest.token_keep is not None:
        raise DataError(
            f"--selection {selection}: expected a bundle that selects no tokens before the decoder, got {bundle.folder};"
            " leave it out"
        )


SCHEMA_VERSION = 1


class RunKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that an outcome depends on; outcomes of equal keys are interchangeable."""

    schema_version: int
    data_sha256: str
    bundle_sha256: str
    """Digest of the manifest, which has the digests of all other files."""
    selection: str
    reference_sha256: str | None
    """The bundle that ``first_token_kl`` compares with."""
    answer_tokens: int
    backend: str

    @property
    def file_name(self) -> str:
        """Name of the run's file."""
        digest = hashlib.sha256(msgspec.json.encode(self)).hexdigest()
        return f"{self.bundle_sha256[:12]}-{self.selection}-{digest[:12]}{SUFFIX}"


def check_folder(folder: Path, keys: Collection[RunKey]) -> None:
    """Raise DataError unless the folder is empty, or has outcomes of these questions and of at least one of these bundles."""
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a folder of outcomes, got none; check the name")
    paths = sorted(path for path in folder.iterdir() if path.name != LOCK_NAME)
    found = [key for key in map(_key_of, paths) if key is not None]
    if not found:
        return
    if any(key.data_sha256 not in {own.data_sha256 for own in keys} for key in found):
        raise DataError(
            f"{folder}: expected outcomes of these questions, got others"
            " (data, metric, --count, --seed, --split or --suffix differ); choose another folder"
        )
    if not {key.bundle_sha256 for key in found} & {own.bundle_sha256 for own in keys}:
        raise DataError(f"{folder}: expected outcomes of these bundles, got others; choose another folder")


def _key_of(path: Path) -> RunKey | None:
    """Return the header of a run's file; None if the run was killed while writing it."""
    what = "a file of outcomes"
    if path.suffix != SUFFIX:
        raise DataError(f"{path}: expected {what}, got something else; choose an empty folder")
    key = read_header(path, RunKey, what=what)
    if key is not None and key.schema_version != SCHEMA_VERSION:
        raise DataError(
            f"{path}: outcomes have schema_version {key.schema_version}, this release reads {SCHEMA_VERSION};"
            " choose another folder"
        )
    return key
