"""Asks a server many questions from many clients, compares the answers with the pipeline's, and prints times and memory.

python benchmarks/serve_load.py BUNDLE --requests 1000 --clients 16
"""

from __future__ import annotations

import argparse
import base64
import http.client
import itertools
import json
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
from parts.arguments import errors_in_one_line, parser_for, positive
from parts.watched_command import memory_of

from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
PICTURES = sorted((ROOT / "examples" / "pictures").glob("*.png"))
QUESTIONS = (
    "where is the diamond ?",
    "what color is the circle ?",
    "how many squares are there ?",
    "is there a star ?",
    "what shape is in the north ?",
)


class Case(NamedTuple):
    """A question about an image, with its own seed."""

    picture: Path
    question: str
    seed: int


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--requests", type=positive, default=1000)
    parser.add_argument("--clients", type=positive, default=16)
    parser.add_argument("--threads", type=positive, default=1, help="threads of the backend")
    options = parser.parse_args()
    with errors_in_one_line(parser):
        run(options)


def run(options: argparse.Namespace) -> None:
    pairs = itertools.cycle(itertools.product(PICTURES, QUESTIONS))
    cases = [Case(*pair, seed) for seed, pair in zip(range(options.requests), pairs)]
    with Pipeline.from_bundle(options.bundle, threads=options.threads) as pipeline:
        start = time.perf_counter()
        own = [
            pipeline.generate(case.picture, case.question, temperature=1.0, seed=case.seed).text
            for case in cases
        ]
        alone_s = time.perf_counter() - start
    memory: list[int] = []
    with server(options) as (process, port):
        clients = [http.client.HTTPConnection("127.0.0.1", port) for _ in range(options.clients)]

        def ask_all(client: int) -> list[tuple[int, str, float]]:
            done = []
            for index in range(client, len(cases), options.clients):
                done.append((index, *ask(clients[client], cases[index])))
                memory.append(resident(process.pid))
            return done

        start = time.perf_counter()
        with ThreadPoolExecutor(options.clients) as threads:
            answers = [answer for done in threads.map(ask_all, range(options.clients)) for answer in done]
        report(options, own, answers, memory, seconds=time.perf_counter() - start, alone_s=alone_s)
        for connection in clients:
            connection.close()


def report(
    options: argparse.Namespace,
    own: list[str],
    answers: list[tuple[int, str, float]],
    memory: list[int],
    *,
    seconds: float,
    alone_s: float,
) -> None:
    equal = sum(text == own[index] for index, text, _ in answers)
    waits = np.array([ms for _, _, ms in answers])
    fifths = [memory[len(memory) * part // 5 - 1] / 1e6 for part in range(1, 6)]
    print(f"{len(answers)} answers to {options.requests} requests, {equal} equal to the pipeline's own")
    print(f"{len(set(own))} different answers")
    print(f"{len(answers) / seconds:.1f} requests/s; the pipeline alone {len(own) / alone_s:.1f}")
    print(
        f"latency ms: median {np.median(waits):.0f}, 95 % {np.quantile(waits, 0.95):.0f}, most {waits.max():.0f}"
    )
    print(f"server's memory MB after each fifth: {', '.join(f'{size:.1f}' for size in fifths)}")
    if len(answers) != options.requests or equal != options.requests:
        sys.exit(1)


def ask(connection: http.client.HTTPConnection, case: Case) -> tuple[str, float]:
    """Return the answer and its milliseconds."""
    url = f"data:image/png;base64,{base64.b64encode(case.picture.read_bytes()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": case.question}]
    messages = [{"role": "user", "content": content}]
    body = {"model": "model", "messages": messages, "temperature": 1.0, "seed": case.seed}
    start = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    answer: Any = json.loads(response.read())
    if response.status != 200:
        raise RuntimeError(answer)
    return answer["choices"][0]["message"]["content"], 1e3 * (time.perf_counter() - start)


@contextmanager
def server(options: argparse.Namespace) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Run ``trio-serve`` and yield its process and port."""
    command = [sys.executable, "-m", "trio_edge.serving.cli", f"model={options.bundle}", "--port", "0"]
    command += ["--threads", str(options.threads), "--max-queue", str(options.clients)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        address = re.search(r"http://\S+", line)
        if address is None:
            raise RuntimeError(line)
        try:
            yield process, urlsplit(address[0]).port or 0
        finally:
            process.terminate()


def resident(pid: int) -> int:
    """Return the resident memory of a process, in bytes."""
    found = memory_of(pid)
    return sum(found[1:]) if found else 0


if __name__ == "__main__":
    main()
