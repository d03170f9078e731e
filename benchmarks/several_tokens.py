"""Decode steps of several rows: what they cost, and the steps that certain tokens and prompt lookup save, by kind of answer.

    python benchmarks/several_tokens.py --real out/real            # a released language model answers, by kind and --lookup
    python benchmarks/several_tokens.py --rows BUNDLE … --threads 1
    python benchmarks/several_tokens.py --together BUNDLE … --threads 1    # exported with --batch
    python benchmarks/several_tokens.py --predict orin-nx-16,jetson-agx-orin-64
    python benchmarks/several_tokens.py --peers out/real --install /tmp/environments --new-tokens 48 --rounds 3

``--real`` exports SmolLM2-135M-Instruct (``make real`` gets it) in float32, all tokens kept, and asks it to repeat a text, to fill
a JSON schema, and for prose, greedily. Ways alternate; times are medians over the rounds, and the first round warms up.

``--rows`` times decode steps of 1, 2, 4 and 8 rows after an empty prompt, in turn. ``--together`` reads one, two, … answers about
a picture in turn, as a server does, and gives the tokens a second of all of them after their first ones. ``--predict`` counts
the work of steps, extra FLOPs included, and times it as ``trio-profile --predict`` does; also of a step of several answers.

``--peers`` asks the same model for texts, in float32 or ``--int4``, here and in OpenVINO GenAI and onnxruntime-genai, without and
with their prompt lookup. Each way and round is its own process, which first warms up; ways alternate. Times are by the wall clock.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, Any
from unittest import mock

import msgspec
import peers
from jinja2 import Template
from parts.arguments import errors_in_one_line, parser_for, positive
from parts.tables import markdown
from real_weights.checkpoints import checkpoint
from tokenizers import Tokenizer

from trio_edge.export.bundle import export_bundle
from trio_edge.export.options import ExportOptions
from trio_edge.profiling.predict.answer import PRECISIONS
from trio_edge.profiling.predict.plan import plan_for
from trio_edge.profiling.predict.speed import fitted_for, graph_time, rates_of
from trio_edge.runtime.bundle.graph_io import STEP_ROWS
from trio_edge.runtime.bundle.schedule import Schedule
from trio_edge.runtime.model.answers.sampling import TokenChooser
from trio_edge.runtime.pipeline import Pipeline
from trio_edge.serving.answers.structured import Constraints
from trio_edge.serving.requests.protocol import ChatRequest
from trio_edge.trio.cost.devices import find_device
from trio_edge.trio.cost.work import head_work, range_work

if TYPE_CHECKING:
    import argparse
    from contextlib import AbstractContextManager

    from trio_edge.profiling.predict.answer import Precision
    from trio_edge.runtime.answer import Generation
    from trio_edge.runtime.model.answers.drafts import LookupTokens

LOOKUPS: tuple[LookupTokens, ...] = (0, 3, 7, "auto")
WORDS = 60
NEW_TOKENS = 96
PICTURE = Path(__file__).parents[1] / "examples" / "pictures" / "shapes-96x96.png"
GATE = {
    "person": {"type": "boolean"},
    "gate": {"enum": ["open", "closed", "unclear"]},
    "vehicles": {"type": "integer", "minimum": 0, "maximum": 9},
    "color_of_the_largest": {"enum": ["red", "green", "blue", "white", "black"]},
}
TEXTS = [" ".join(topics[name].split()[:WORDS]) for name in ("booleans", "exceptions", "slicings")]
KINDS: dict[str, list[str]] = {
    "repeats a text": [f"Repeat this text word for word:\n{text}" for text in TEXTS],
    "fills a schema": [f"Describe {what} as JSON." for what in ("a busy street", "a quiet farm", "a port")],
    "prose": [
        f"Write a short story about {what}." for what in ("a lighthouse", "two foxes", "the first snow")
    ],
}


def main() -> None:
    """Print one table."""
    parser = parser_for(__doc__)
    parser.add_argument("bundles", nargs="*", type=Path)
    parser.add_argument("--real", type=Path, metavar="FOLDER")
    parser.add_argument("--rows", action="store_true")
    parser.add_argument("--together", action="store_true")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--predict", metavar="DEVICE,…")
    parser.add_argument("--model", default="qwen3-vl-4b")
    parser.add_argument("--quantize", choices=PRECISIONS, default="int4")
    parser.add_argument("--peers", type=Path, metavar="FOLDER")
    parser.add_argument("--install", type=Path, help="folder of virtual environments, as of peers.py")
    parser.add_argument("--int4", action="store_true")
    parser.add_argument("--new-tokens", type=positive, default=NEW_TOKENS)
    parser.add_argument("--others", type=float, metavar="SHARE", help="as of peers.py")
    parser.add_argument("--json", type=Path, help="write all measurements of --peers to this file")
    options = parser.parse_args()
    with errors_in_one_line(parser):
        if options.real is not None:
            print(by_kind(options.real, threads=options.threads, rounds=options.rounds))
        elif options.peers is not None:
            print(by_runtime(options))
        elif options.predict is not None:
            print(
                predicted(
                    options.predict.split(","), model=options.model, precision=PRECISIONS[options.quantize]
                )
            )
        elif options.together:
            sizes = {"threads": options.threads, "rounds": options.rounds, "new_tokens": options.new_tokens}
            print(by_answers(options.bundles, **sizes))
        else:
            print(by_rows(options.bundles, threads=options.threads, rounds=options.rounds))


def by_kind(folder: Path, *, threads: int, rounds: int) -> str:
    """Return a table: a line for each kind of answer and way."""
    bundle = folder / "bundles" / "several-tokens"
    if not bundle.exists():
        export_bundle(
            ExportOptions(
                model=str(checkpoint("llava", folder)),
                out=bundle,
                schedule=Schedule(),
                dtype="float32",
                max_text=256,
                max_new_tokens=NEW_TOKENS,
            )
        )
    lines = []
    with Pipeline.from_bundle(bundle, threads=threads) as pipeline:
        constraints = Constraints(pipeline)
        for kind, prompts in KINDS.items():
            ways: dict[str, LookupTokens] = {"one token a step": 0}
            ways |= {f"lookup {lookup}": lookup for lookup in LOOKUPS if lookup or kind == "fills a schema"}
            times: dict[str, list[float]] = defaultdict(list)
            for turn in range(rounds + 1):
                answers = {}
                for way, lookup in ways.items():
                    start = time.process_time()
                    with one_token_a_step() if way == "one token a step" else nullcontext():
                        answers[way] = [
                            asked(pipeline, constraints, prompt, kind, lookup) for prompt in prompts
                        ]
                    decode_s = sum(answer.statistics.decode_ms for answer in answers[way]) / 1e3
                    if turn:
                        times[way].append(decode_s)
                        times[f"processor {way}"].append(time.process_time() - start)
            (plain, *_) = answers.values()
            slowest = statistics.median(times["one token a step"])
            for way, found in answers.items():
                of = [answer.statistics for answer in found]
                same = sum(one.token_ids == other.token_ids for one, other in zip(plain, found))
                drafted, taken = sum(one.draft_tokens for one in of), statistics.median(times[way])
                lines.append(
                    (
                        kind,
                        way,
                        str(sum(one.new_tokens for one in of)),
                        str(sum(one.steps for one in of)),
                        f"{100 * sum(one.accepted_tokens for one in of) / drafted:.0f}" if drafted else "",
                        f"{sum(one.new_tokens - 1 for one in of) / taken:.1f}",
                        f"{slowest / taken:.2f}×",
                        f"{statistics.median(times[f'processor {way}']):.2f}",
                        f"{same} of {len(found)}",
                    )
                )
    heads = ("answer", "way", "tokens", "steps", "right drafts %", "tokens/s", "speed", "processor s", "same")
    return markdown(heads, lines)


def one_token_a_step() -> AbstractContextManager[Any]:
    """Let tokens that must come be decoded, too."""
    return mock.patch.object(TokenChooser, "certain", lambda _chooser: None)


def asked(
    pipeline: Pipeline, constraints: Constraints, prompt: str, kind: str, lookup: LookupTokens
) -> Generation:
    """Return the whole answer."""
    form = {"type": "object", "properties": GATE, "required": [*GATE], "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "gate", "strict": True, "schema": form}}
    chat = {"model": "", "messages": [{"role": "user", "content": prompt}], "response_format": wanted}
    constraint = constraints.make(msgspec.convert(chat, ChatRequest)) if kind == "fills a schema" else None
    answer = pipeline.generate(None, prompt, constraint=constraint, temperature=0.0, lookup=lookup)
    assert answer.text
    return answer


def by_runtime(options: argparse.Namespace) -> str:
    """Return a table: a line for each kind of text, runtime and way."""
    folder, rows = options.peers.absolute(), runtimes(options)
    tokenizer = Tokenizer.from_file(str(checkpoint("llama", folder) / "tokenizer.json"))
    template = Template((folder / "llama" / "chat_template.jinja").read_text())
    prompts = []
    for text in (prompt for texts in KINDS.values() for prompt in texts):
        messages = [{"role": "user", "content": [{"type": "text", "text": text}]}]
        prompt = template.render(messages=messages, add_generation_prompt=True)
        prompts.append((text, tokenizer.encode(prompt, add_special_tokens=False).ids))
    request = {"threads": options.threads, "new_tokens": options.new_tokens, "ngram": 3}
    request |= {"prompts": prompts, "end": tokenizer.token_to_id("<|im_end|>")}
    found: dict[str, list[list[dict[str, Any]]]] = {row.name: [] for row in rows}
    for row in rows:
        peers.make_model(row)
    for _ in range(options.rounds):
        for row in rows:
            once = partial(answers_of, row, request)
            found[row.name].append(peers.undisturbed(once, others=options.others))
            print(f"{row.name}: measured", file=sys.stderr, flush=True)
    if options.json:
        options.json.write_text(json.dumps(found))
    return runtime_table(rows, found, new_tokens=options.new_tokens)


def answers_of(row: peers.Row, request: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the answers to all prompts, from a new process."""
    argument = json.dumps(request | row.request | {"model": str(row.model)})
    command = [str(row.python), str(peers.RUNS / row.script), argument]
    done = subprocess.run(command, env=peers.environment(row), capture_output=True, text=True, check=False)
    if done.returncode:
        raise peers.MissingError(f"{row.name}: {peers.last_line(done.stderr)}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def runtimes(options: argparse.Namespace) -> list[peers.Row]:
    """Return a row for each runtime and way."""
    folder, form = options.peers.absolute(), "int4" if options.int4 else "float32"
    here, text = Path(sys.executable), str(folder / "llama")
    environments = {name: peers.install(options.install, name) for name in ("openvino", "genai")}
    export = [
        str(here), "-c", peers.EXPORT, str(checkpoint("llava", folder)), "--dtype", "float32", "--keep", "all",
        *(("--quantize", "int4,head=int8") if options.int4 else ()), "--max-text", "256", "--quiet", "--out",
    ]  # fmt: skip
    convert = [
        str(environments["openvino"] and environments["openvino"].with_name("optimum-cli")), "export", "openvino",
        "--model", text, "--weight-format", "int4" if options.int4 else "fp32", "--task", "text-generation-with-past",
    ]  # fmt: skip
    build = [
        str(environments["genai"]), "-m", "onnxruntime_genai.models.builder", "-m", text, "-e", "cpu",
        "-p", "int4" if options.int4 else "fp32", "-c", str(folder / "cache"),
        *(("--extra_options", "accuracy_level=4") if options.int4 else ()), "-o",
    ]  # fmt: skip
    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    makes: dict[str, tuple[str, Path | None, list[str], tuple[LookupTokens, ...]]] = {
        "ours": ("ours", here, export, LOOKUPS),
        "OpenVINO GenAI": ("openvino", environments["openvino"], convert, LOOKUPS[:-1]),
        "onnxruntime-genai": ("genai", environments["genai"], build, LOOKUPS),
    }
    return [
        peers.Row(
            f"{name}, lookup {lookup}", "lookup.py", python, folder / "bundles" / f"lookup-{key}-{form}", make,
            {"runtime": key, "lookup": lookup, "settings": {} if options.int4 else exact},
        )
        for name, (key, python, make, lookups) in makes.items()
        for lookup in lookups
    ]  # fmt: skip


def runtime_table(
    rows: list[peers.Row], found: dict[str, list[list[dict[str, Any]]]], *, new_tokens: int
) -> str:
    """Return the table of ``found``, which holds each round's answers by the row's name."""
    lines = []
    for start, kind in zip(range(0, sum(map(len, KINDS.values())), 3), KINDS):
        for row in rows:
            rounds = [answers[start : start + 3] for answers in found[row.name]]
            plain = f"{row.name.rpartition(' ')[0]} 0"
            texts, first, ours = (
                [one["tokens"] for one in found[name][0][start : start + 3]]
                for name in (row.name, plain, rows[0].name)
            )
            # An answer below the limit has an end token.
            decoded = sum(min(len(text) + 1, new_tokens) - 1 for text in texts)
            speeds = [decoded / sum(one["seconds"] for one in answers) for answers in rounds]
            own = [sum(one["seconds"] for one in answers[start : start + 3]) for answers in found[plain]]
            own_speed = sum(min(len(text) + 1, new_tokens) - 1 for text in first) / statistics.median(own)
            tried, right = (sum(one[name] or 0 for one in rounds[0]) for name in ("tried", "right"))
            lines.append(
                (
                    kind,
                    row.name,
                    str(sum(map(len, texts))),
                    f"{100 * right / tried:.0f}" if tried else "",
                    peers.spread(speeds, 1),
                    f"{statistics.median(speeds) / own_speed:.2f}×",
                    f"{sum(a == b for a, b in zip(texts, first))} of {len(texts)}",
                    f"{sum(a == b for a, b in zip(texts, ours))} of {len(texts)}",
                )
            )
    heads = ("answer", "way", "tokens", "right drafts %", "tokens/s", "speed", "same", "as ours")
    return markdown(heads, lines)


def by_rows(bundles: list[Path], *, threads: int, rounds: int) -> str:
    """Return a table: the time of a step by its rows."""
    lines = []
    for bundle in bundles:
        with Pipeline.from_bundle(bundle, threads=threads) as pipeline:
            assert pipeline.generate(None, "a", max_new_tokens=1).text is not None
            decoder, times = pipeline.level_named().decoder, defaultdict(list)
            for turn in range(rounds + 2):
                for rows in (rows for rows in STEP_ROWS if rows <= decoder.max_rows):
                    embeds = pipeline._embedding[[5 + row for row in range(rows)]]
                    start, spent = time.perf_counter(), time.process_time()
                    decoder.decode(embeds)
                    taken = time.perf_counter() - start, time.process_time() - spent
                    decoder.skip(-rows)
                    if turn > 1:  # the first two warm up and are captured
                        times[rows].append([1e3 * one for one in taken])
        for clock, name in enumerate(("wall clock", "processor")):
            medians = {rows: statistics.median(one[clock] for one in found) for rows, found in times.items()}
            cells = (f"{taken:.1f} ({taken / medians[1]:.2f}×)" for taken in medians.values())
            lines.append((bundle.name, name, *cells))
    return markdown(("bundle", "clock", *(f"{rows} rows, ms" for rows in STEP_ROWS)), lines)


def by_answers(bundles: list[Path], *, threads: int, rounds: int, new_tokens: int) -> str:
    """Return a table: tokens a second of all answers under way, by their number."""
    lines = []
    for bundle in bundles:
        with Pipeline.from_bundle(bundle, threads=threads) as pipeline:
            counts, speeds = range(1, pipeline.manifest.batch + 1), defaultdict(list)
            for turn in range(rounds + 1):
                for count in counts:
                    answers = [
                        pipeline.generate(
                            PICTURE, "a", max_new_tokens=new_tokens, min_new_tokens=new_tokens, temperature=0
                        )
                        for _ in range(count)
                    ]
                    speed = tokens_a_second(answers)
                    if turn:
                        speeds[count].append(speed)
        for clock, name in enumerate(("wall clock", "processor")):
            medians = {
                count: statistics.median(one[clock] for one in found) for count, found in speeds.items()
            }
            cells = (f"{speed:.1f} ({speed / medians[1]:.2f}×)" for speed in medians.values())
            lines.append((bundle.name, name, *cells))
    return markdown(("bundle", "clock", *(f"{count} together, tokens/s" for count in counts)), lines)


def tokens_a_second(answers: list[Generation]) -> tuple[float, float]:
    """Read the answers in turn; return their tokens a second after the first ones, by the wall clock and the processor."""
    readers = [iter(answer) for answer in answers]
    for reader in readers:
        next(reader)
    before = sum(len(answer.token_ids) for answer in answers)
    start, spent = time.perf_counter(), time.process_time()
    while readers:
        readers = [reader for reader in readers if next(reader, None) is not None]
    count = sum(len(answer.token_ids) for answer in answers) - before
    return count / (time.perf_counter() - start), count / (time.process_time() - spent)


def predicted(devices: list[str], *, model: str, precision: Precision) -> str:
    """Return a table: predicted times of a step by its rows, and by the answers that run side by side."""
    lines = []
    for name in devices:
        device = find_device(name)
        for keep in ("11.1%", None):
            plan = plan_for(model=model, keep=keep, precision=precision, num_text=40)
            decoder = plan.model.decoder
            how = {
                "formats": plan.formats,
                "rates": rates_of(device),
                "efficiency": fitted_for(device).efficiency,
            }

            def seconds(
                rows: int, answers: int, plan: Any = plan, decoder: Any = decoder, how: Any = how
            ) -> float:
                total = graph_time(head_work(decoder, rows=rows * answers), **how).seconds
                for layers, visual in plan.ranges:
                    past = visual + plan.room
                    work = range_work(decoder, layers=layers, rows=rows * answers)
                    own = range_work(decoder, layers=layers, rows=rows, past=past).attention
                    each = tuple(dataclasses.replace(one, count=one.count * answers) for one in own)
                    total += graph_time(dataclasses.replace(work, attention=each), **how).seconds
                return total

            one = seconds(1, 1)
            by_row = (f"{seconds(rows, 1) / one:.3f}" for rows in STEP_ROWS[1:])
            by_answer = (f"{seconds(1, answers) / one:.3f}" for answers in (2, 4))
            lines.append((name, keep or "all", f"{1e3 * one:.1f}", *by_row, *by_answer))
    heads = (
        "device",
        "keep",
        "one row, ms",
        *(f"{rows} rows" for rows in STEP_ROWS[1:]),
        "2 answers",
        "4 answers",
    )
    return markdown(heads, lines)


if __name__ == "__main__":
    main()
