"""``trio-check``: checks whether this machine runs bundles correctly, backend by backend."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec
from rich.console import Console

from trio_edge.profiling.check.answers import QUESTIONS, put_together, stored_answers
from trio_edge.profiling.check.checks import CheckResult, check_backends
from trio_edge.profiling.measure.machine_info import find_machine, find_power_mode, find_versions
from trio_edge.runtime.bundle.errors import BackendError, install_command
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.cli.console import run
from trio_edge.runtime.cli.interruption import interruptible
from trio_edge.runtime.devices.machine import available_memory_bytes, l4t_release

if TYPE_CHECKING:
    from collections.abc import Sequence


SCHEMA_VERSION = 1


@click.command("trio-check", context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    help="Bundle to check, by comparing its backends with each other. [default: the packaged model]",
)
@click.option(
    "--hours",
    type=click.FloatRange(0, 8760, min_open=True),
    help="Answer again and again for this time with each backend: no answer may change, and memory may not grow.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def command(bundle: Path | None, hours: float | None, as_json: bool) -> int:
    """Check that every installed backend gives the right answers on this machine.

    The exit code is 0 if no check failed, 1 if one failed, and 2 if nothing could be checked.
    """
    facts, results = machine_facts(), []
    console = Console(stderr=True)
    with (
        interruptible(),
        tempfile.TemporaryDirectory(prefix="trio-check-") as folder,
        console.status("making the packaged model's graphs") as status,
    ):
        place, settings = Path(folder), dict[str, Any](questions=(), stored=())
        if bundle is None:
            bundle = put_together(place / "bundle")
            settings = {"questions": QUESTIONS, "stored": stored_answers()}
        open_bundle(bundle)  # refused before anything is printed
        if not as_json:
            for name, text in facts_in_words(facts).items():
                print(f"{name:14}{text}")
        settings["seconds"] = 3600 * (hours or 0.0)

        def starting(backend: str) -> None:
            status.update(f"{backend}: building, answering, reloading")

        for result in check_backends(bundle, place, starting=starting, **settings):
            results.append(result)
            if not as_json:
                check = f"{result.backend}, {result.check}"
                print(f"{result.status:10}{check:34}{' '.join(result.text.split())}", flush=True)
    if as_json:
        print(json.dumps(as_dict(facts, results), indent=1))
    if all(result.status == "not here" for result in results):
        raise BackendError(
            f"backend: expected one that runs here, got none; for the CPU, run {install_command('ort')}"
        )
    return int(any(result.status == "fail" for result in results))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(command, argv)


def machine_facts() -> dict[str, Any]:
    """Return the facts about this machine for a report, as JSON types."""
    return {
        "versions": find_versions(),
        "machine": msgspec.to_builtins(find_machine()),
        "l4t": l4t_release(),
        "power_mode": find_power_mode(),
        "available_bytes": available_memory_bytes(),
    }


def facts_in_words(facts: dict[str, Any]) -> dict[str, str]:
    """Return the facts as one text for each name."""
    machine, available, gpu = facts["machine"], facts["available_bytes"], "none"
    free = "" if available is None else f", {available / 1e9:.1f} GB free"
    release = "" if facts["l4t"] is None else f", Jetson Linux {facts['l4t']}"
    memory = "unknown" if machine["memory_bytes"] is None else f"{machine['memory_bytes'] / 1e9:.1f} GB"
    if machine["gpu"] is not None:
        capability = machine["gpu_compute_capability"] / 10
        gpu = f"{machine['gpu']}, compute capability {capability:.1f}, driver {machine['gpu_driver']}"
    return {
        "versions": ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        "machine": f"{machine['name']}, {machine['machine']}, {machine['system']}{release}, {machine['cores']} cores",
        "GPU": gpu,
        "power mode": facts["power_mode"] or "unknown: no nvpmodel here",
        "memory": f"{memory}{free}",
    }


def as_dict(facts: dict[str, Any], results: Sequence[CheckResult]) -> dict[str, Any]:
    """Return the content of ``--json``."""
    return {
        "schema_version": SCHEMA_VERSION,
        "passed": not any(result.status == "fail" for result in results),
        **facts,
        "checks": msgspec.to_builtins([msgspec.structs.replace(result, answers=[]) for result in results]),
    }
