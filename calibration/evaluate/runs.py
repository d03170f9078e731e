"""Runs several bundles over the same questions and keeps the outcomes in a work folder, so that a run can be continued.

The reference goes first, because the others compare their first token with its. The folder has one file per run, with a
``RunKey`` as its header and one outcome per line.
"""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import msgspec

from trio_edge.calibration.evaluate.answering import OWN_SELECTION, Outcome, answer
from trio_edge.calibration.json_lines import SUFFIX, opened_results, read_header, work_folder
from trio_edge.calibration.progress import SILENT
from trio_edge.runtime.backends.registry import make_backend, with_accuracy
from trio_edge.runtime.bundle.errors import DataError, ImageError, ShapeError, printable
from trio_edge.runtime.bundle.manifest import AUTO, MANIFEST_NAME
from trio_edge.runtime.bundle.reader import Bundle, open_bundle, sha256_of
from trio_edge.runtime.decisions.wording import read_temperatures
from trio_edge.runtime.model.levels import chain_of, read_margins
from trio_edge.runtime.pipeline import Pipeline
from trio_edge.trio.methods import stage_method

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from trio_edge.calibration.evaluate.answering import AnswerSettings
    from trio_edge.calibration.progress import StepProgress
    from trio_edge.calibration.questions import Sample
    from trio_edge.runtime.backends.interface import Backend
    from trio_edge.runtime.bundle.manifest import Manifest
    from trio_edge.runtime.model.first_token import FirstToken

SCHEMA_VERSION = 2
_Opened: TypeAlias = "tuple[Bundle, str | None]"
"""A bundle, and the level that answers; None is the default."""


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
    level: str | None = None


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
    temperatures: dict[str, float] | None = None
    """The temperatures of the bundle's decisions; None for generated answers."""
    level: str | None = None
    system: str = ""
    margins: dict[str, float] | None = None
    """Margins of the level "auto"."""

    @property
    def file_name(self) -> str:
        """Name of the run's file."""
        digest = hashlib.sha256(msgspec.json.encode(self)).hexdigest()
        return f"{self.bundle_sha256[:12]}-{self.selection}-{digest[:12]}{SUFFIX}"


class Answers(NamedTuple):
    """Outcomes of all runs, and the questions that could not be asked."""

    runs: list[tuple[RunInfo, dict[int, Outcome]]]
    failures: list[dict[str, str]]


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
    names = labels or _names(bundles)
    named = [(_opened(folder), name) for folder, name in zip(bundles, names, strict=True)]
    runs = []
    if reference is not None:
        full = _opened(reference)
        _check_reference(full, [bundle for (bundle, _), _ in named])
        own = full[0].folder.resolve(), full[1]
        same = [name for (one, level), name in named if (one.folder.resolve(), level) == own]
        runs.append(_run(full, (same or _names([reference]))[0], OWN_SELECTION, is_reference=True))
        named = [(one, name) for one, name in named if (one[0].folder.resolve(), one[1]) != own]
    for opened, name in named:
        for selection in selections:
            _check_selection(opened, selection)
            label = name if selection == OWN_SELECTION else f"{name} ({selection})"
            runs.append(_run(opened, label, selection))
    keys = [(run.info.bundle_sha256, run.level, run.info.selection) for run in runs]
    for index, run in enumerate(runs):
        if keys[index] in keys[:index]:
            raise DataError(f"{run.bundle.folder}: expected each bundle once, got it twice; leave one out")
    return runs


def answer_runs(
    runs: Sequence[Run],
    questions: Sequence[Sample],
    settings: AnswerSettings,
    *,
    data_sha256: str,
    folder: Path | None,
    progress: StepProgress = SILENT,
) -> Answers:
    """Answer all questions that have no outcome in the work ``folder`` yet, run by run; None is an empty folder.

    ``data_sha256`` is the digest of questions and metric.

    Raises:
        DataError: If the folder is of other data or bundles, or cannot be written.
    """
    answers, keys = Answers([], []), [_key_of(run, runs[0], settings, data_sha256) for run in runs]
    image_ids = {question.index: question.image_id for question in questions}
    with work_folder(folder) as folder:
        _check_folder(folder, keys)
        firsts: dict[int, FirstToken | None] = {}  # filled by the reference, which is the first run
        for run, key in zip(runs, keys):
            progress.step(run.info.label, len(questions))
            with ExitStack() as stack:
                file, known = stack.enter_context(
                    opened_results(folder / key.file_name, key, Outcome, what="an outcome")
                )
                # a question whose image has changed is asked again
                done = {one.index: one for one in known if image_ids.get(one.index) == one.image_id}
                missing = [question for question in questions if question.index not in done]
                for _ in done:
                    progress.sample()
                if missing:
                    pipeline = stack.enter_context(Pipeline(run.bundle, _backend(run, settings)))
                for question in missing:
                    try:
                        outcome = answer(
                            pipeline,
                            question,
                            settings,
                            selection=run.info.selection,
                            reference=firsts.get(question.index),
                            is_reference=run.info.is_reference,
                            level=run.level,
                            other=_other(question, questions),
                        )
                    except (ImageError, ShapeError) as error:
                        failure = {"run": run.info.label, "where": question.where, "reason": str(error)}
                        answers.failures.append(failure)
                    else:
                        file.append(outcome)
                        done[outcome.index] = outcome
                    progress.sample()
            if run.info.is_reference:
                firsts = {index: outcome.first_token for index, outcome in done.items()}
            answers.runs.append((run.info, done))
    return answers


def _other(question: Sample, questions: Sequence[Sample]) -> Sample | None:
    """Return the next question about another image, for the selection "wrong-image"; None if there is none."""
    later = sorted(questions, key=lambda one: one.index <= question.index)
    return next((one for one in later if one.image_id != question.image_id), None)


def backend_of(run: Run, settings: AnswerSettings) -> str:
    """Return the name of the backend that a run uses, with its accuracy."""
    return with_accuracy(_backend(run, settings).name, settings.cpu_accuracy)


def _backend(run: Run, settings: AnswerSettings) -> Backend:
    threads, accuracy = settings.threads, settings.cpu_accuracy
    return make_backend(settings.backend, bundle=run.bundle, threads=threads, cpu_accuracy=accuracy)


def _key_of(run: Run, first: Run, settings: AnswerSettings, data_sha256: str) -> RunKey:
    return RunKey(
        schema_version=SCHEMA_VERSION,
        data_sha256=data_sha256,
        bundle_sha256=run.info.bundle_sha256,
        selection=run.info.selection,
        reference_sha256=first.info.bundle_sha256 if first.info.is_reference else None,
        answer_tokens=settings.answer_tokens,
        backend=backend_of(run, settings),
        temperatures=dict(read_temperatures(run.bundle.folder).items()) if settings.decide else None,
        level=run.level,
        system=settings.system,
        margins=read_margins(run.bundle.folder, run.bundle.manifest) if run.level == AUTO else None,
    )


def _opened(place: Path) -> _Opened:
    """Return the bundle and the level of ``BUNDLE`` or ``BUNDLE@LEVEL``."""
    name, mark, level = place.name.rpartition("@")
    if not mark or place.exists():
        return open_bundle(place), None
    bundle = open_bundle(place.with_name(name))
    chain_of(bundle.manifest, level, {})  # refuses an unknown one
    return bundle, level


def _manifest_of(opened: _Opened) -> Manifest:
    bundle, level = opened
    names = bundle.manifest.level_names
    return bundle.manifest.at_level(level if level in names else bundle.manifest.level)


def _run(opened: _Opened, label: str, selection: str, *, is_reference: bool = False) -> Run:
    bundle, level = opened
    method = AUTO if level == AUTO else method_of(_manifest_of(opened), selection)
    info = RunInfo(
        label=label,
        method=method,
        bundle=printable(str(bundle.folder)),
        bundle_sha256=sha256_of(bundle.folder / MANIFEST_NAME),
        selection=selection,
        dtype=bundle.manifest.dtype,
        is_reference=is_reference,
    )
    return Run(info, bundle, level)


def method_of(manifest: Manifest, selection: str) -> str:
    """Return the name of a run's selection, without its budget."""
    schedule = manifest.schedule
    if selection != OWN_SELECTION:
        return selection if schedule.positions == "compact" else f"{selection}, {schedule.positions}"
    parts = [] if manifest.encoder_keep is None else ["encoder"]
    parts += [] if manifest.token_method is None else [manifest.token_method]
    if schedule.stages:
        words = [schedule.method]
        if stage_method(schedule.method).has_probe and schedule.probe_rows == "answer":
            words.append("answer rows")
        if schedule.positions == "preserved" and manifest.position_axes == 1:
            words.append("preserved")
        parts.append(", ".join(words))
    return " + ".join(parts) or "keep-all"


def _names(bundles: Sequence[Path]) -> list[str]:
    short = [folder.resolve().name for folder in bundles]
    names = (name if short.count(name) == 1 else str(folder) for name, folder in zip(short, bundles))
    return [printable(name) for name in names]


def _check_reference(opened: _Opened, bundles: Sequence[Bundle]) -> None:
    reference, manifest = opened[0], _manifest_of(opened)
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


def _check_selection(opened: _Opened, selection: str) -> None:
    bundle, level = opened
    if selection != OWN_SELECTION and level == AUTO:
        raise DataError(f"--selection {selection}: expected one level, got {AUTO}; name a level")
    if selection != OWN_SELECTION and not _manifest_of(opened).schedule.stages:
        raise DataError(
            f"--selection {selection}: expected a bundle with stages, got {bundle.folder} without any;"
            " leave it out, or give it as --reference"
        )
    if selection == "base-tile-first" and bundle.manifest.token_keep is not None:
        raise DataError(
            f"--selection {selection}: expected a bundle that selects no tokens before the decoder, got {bundle.folder};"
            " leave it out"
        )


def _check_folder(folder: Path, keys: Collection[RunKey]) -> None:
    """Raise DataError unless the folder is empty, or has outcomes of these questions and of at least one of these bundles."""
    found = [key for key in map(_header_of, sorted(folder.iterdir())) if key is not None]
    if not {key.data_sha256 for key in found} <= {own.data_sha256 for own in keys}:
        raise DataError(
            f"{folder}: expected outcomes of these questions, got others"
            " (data, metric, --count, --split or --suffix differ); choose another folder"
        )
    if found and not {key.bundle_sha256 for key in found} & {own.bundle_sha256 for own in keys}:
        raise DataError(f"{folder}: expected outcomes of these bundles, got others; choose another folder")


def _header_of(path: Path) -> RunKey | None:
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
