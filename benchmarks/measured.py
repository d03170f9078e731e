"""Turns users' reports into the table of docs/reproduce.md, and refuses what cannot be true.

A report is one file with what ``trio-check --json``, ``trio-profile --json`` and ``trio-reproduce --json`` have written, one after
the other (``cat check.json profile.json > report.json``).

    python benchmarks/measured.py report.json ...                                        # prints the rows
    python benchmarks/measured.py report.json ... --page docs/reproduce.md        # and writes them into the page

Without a file for ``--page`` nothing is written. The exit code is 2 if a report is implausible; each reason is one line.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

START, END = "<!-- rows -->\n", "<!-- end of rows -->\n"
HEAD = "| machine | trio-edge, backend | what | result | report |\n| --- | --- | --- | --- | --- |\n"
ABOVE_CEILING = 1.2  # clocks vary between measuring the ceilings and the graphs
MOST_FLOPS = 2.5e15  # dense half precision; no GPU that runs one bundle does more
FEW_ANSWERS = 100
MOST_SCORE = {"MME": 2800.0}


def documents(text: str) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects in a file, one after the other."""
    decoder, place = json.JSONDecoder(), 0
    while place < len(text.rstrip()):
        found, place = decoder.raw_decode(text, place)
        if not isinstance(found, dict):
            raise TypeError(f"expected JSON objects, got a {type(found).__name__}")
        yield found
        place += len(text[place:]) - len(text[place:].lstrip())


def machine_of(found: dict[str, Any]) -> str:
    machine = found.get("machine") or found["device"]
    return f"{machine['gpu'] or machine['name']}, {machine['system']}"


def check_rows(found: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield backend, what and result of a ``trio-check``."""
    for one in found["checks"]:
        if one["status"] != "not here":
            yield one["backend"], f"check: {one['check']}", f"{one['status']}: {one['text']}"


def check_problems(found: dict[str, Any]) -> Iterator[str]:
    run = [one for one in found["checks"] if one["status"] != "not here"]
    if not run:
        yield "expected a backend that ran, got none"
    if found["passed"] == any(one["status"] == "fail" for one in run):
        yield "expected 'passed' to be what the checks say, got the opposite"


def profile_rows(found: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield backend, what and result of a ``trio-profile``."""
    for one in found["bundles"]:
        speed = "" if one["tokens_per_s"] is None else f", {one['tokens_per_s']:.1f} tokens/s"
        tokens = f"{one['processed_tokens']:.1f} of {one['visual_tokens']} visual tokens"
        what = f"profile: {one['model']}, {one['dtype']}, {one['selection']} ({tokens})"
        yield found["conditions"]["backend"], what, f"first token {one['ttft_ms']['p50']:.1f} ms{speed}"


def profile_problems(found: dict[str, Any]) -> Iterator[str]:
    ceilings = found["ceilings"]
    for one in found["bundles"]:
        first, prefill, label = one["ttft_ms"], one["prefill_ms"]["p50"], one["label"]
        if not 0 < prefill <= first["p50"] <= first["most"]:
            yield f"{label}: expected 0 < prefill <= first token, got {prefill} and {first['p50']} ms"
        if one["processed_tokens"] > one["visual_tokens"]:
            yield f"{label}: expected at most {one['visual_tokens']} tokens kept, got {one['processed_tokens']}"
        for graph in one["graphs"]:
            if (graph["of_ceiling"] or 0) > ABOVE_CEILING:
                yield f"{label}, {graph['name']}: expected at most the machine's measured rate, got {graph['of_ceiling']:.2f} times"
        rate = (one["tokens_per_s"] or 0) * decoder_bytes(one)
        if ceilings and rate > ABOVE_CEILING * ceilings["bytes_per_s"]:
            yield f"{label}: expected to read at most {ceilings['bytes_per_s']:.3g} bytes/s for tokens, got {rate:.3g}"


def decoder_bytes(bundle: dict[str, Any]) -> float:
    """Return the least bytes that a token of one row moves, as the report counts them."""
    steps = [graph for graph in bundle["graphs"] if graph["phase"] == "decode"]
    return sum((graph["moved_bytes"] or 0) * min(graph["calls_per_answer"], 1) for graph in steps)


def reproduce_rows(found: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield backend, what and result of a ``trio-reproduce``."""
    for one in found["results"]:
        published = one["published"].get(one["benchmark"], "-")
        few = "" if one["limit"] is None else f" (only {one['answers']} questions)"
        text = f"{one['score']:.1f} (published {published}){few}; first tokens {one['first_tokens_s']:.1f} s,"
        costs = f" all {one['total_s']:.1f} s, {one['flops'] / 1e12:.3g} TFLOPs, {one['kv_bytes'] / 2**20:.4g} MiB KV"
        yield found["backend"], f"{found['table']}: {one['row']}, {one['benchmark']}", text + costs


def reproduce_problems(found: dict[str, Any]) -> Iterator[str]:
    for one in found["results"]:
        where, most = f"{one['row']}, {one['benchmark']}", MOST_SCORE.get(one["benchmark"], 100.0)
        if not 0 <= one["score"] <= most:
            yield f"{where}: expected a score of 0 to {most:g}, got {one['score']}"
        if not 0 < one["first_tokens_s"] <= one["total_s"]:
            yield f"{where}: expected 0 < first tokens <= all, got {one['first_tokens_s']} and {one['total_s']} s"
        if one["processed_tokens"] > one["visual_tokens"]:
            yield f"{where}: expected at most {one['visual_tokens']} tokens kept, got {one['processed_tokens']}"
        rate = one["flops"] * one["answers"] / max(one["first_tokens_s"], 1e-9)
        if rate > MOST_FLOPS:
            yield f"{where}: expected at most {MOST_FLOPS:.3g} FLOP/s, got {rate:.3g}"
        if one["limit"] is None and one["answers"] < FEW_ANSWERS:
            yield f"{where}: expected a whole benchmark, got {one['answers']} answers"


KINDS = {
    "checks": (check_rows, check_problems),
    "bundles": (profile_rows, profile_problems),
    "results": (reproduce_rows, reproduce_problems),
}
"""By a key that only one kind of report has."""


def kind_of(found: dict[str, Any]) -> tuple[Any, Any]:
    """Return the functions for one kind of report."""
    kinds = [functions for key, functions in KINDS.items() if key in found]
    if len(kinds) != 1:
        raise ValueError(
            f"expected a report of trio-check, trio-profile or trio-reproduce, got keys {[*found][:5]}"
        )
    return kinds[0]


def read(file: Path) -> tuple[list[str], list[str]]:
    """Return a report's rows in Markdown, and the reasons why it cannot be true."""
    rows, problems = list[str](), list[str]()
    try:
        for found in documents(file.read_text(encoding="utf-8")):
            rows_of, problems_of = kind_of(found)
            release = found["versions"]["trio-edge"]
            problems += problems_of(found)
            for backend, *cells in rows_of(found):
                parts = (machine_of(found), f"{release}, {backend}", *cells, file.stem)
                rows.append(f"| {' | '.join(' '.join(part.replace('|', '/').split()) for part in parts)} |\n")
    except (OSError, ValueError, KeyError, TypeError) as error:
        problems.append(f"{type(error).__name__}: {error}")
    if not rows and not problems:
        problems.append("expected a report, got an empty file")
    return rows, [f"{file}: {problem}" for problem in problems]


def write_page(page: Path, rows: list[str]) -> None:
    """Replace the rows between the page's marks."""
    before, _, rest = page.read_text(encoding="utf-8").partition(START)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{START}\n{HEAD}{''.join(rows)}\n{END}{after}", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("reports", type=Path, nargs="+")
    parser.add_argument("--page", type=Path)
    options = parser.parse_args(arguments)
    read_all = [read(file) for file in options.reports]
    rows = [row for found, _ in read_all for row in found]
    problems = [problem for _, found in read_all for problem in found]
    print(HEAD + "".join(rows), end="")
    for problem in problems:
        print(f"measured: {problem}", file=sys.stderr)
    if problems:
        return 2
    if options.page is not None:
        write_page(options.page, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
