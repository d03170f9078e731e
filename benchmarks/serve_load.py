"""Asks a server many questions from many clients, compares the answers with the pipeline's own, and prints a table.

    python benchmarks/serve_load.py BUNDLE --requests 1000 --clients 16
    python benchmarks/serve_load.py BUNDLE --requests 50000 --clients 4 --mixed --video clip.mp4

``--mixed`` is the soak test: images of many sizes, streams, further questions, ``/v1/responses``, videos if the bundle takes
them, clients that go away, and broken requests. The table has a line for each tenth of the requests; its latencies are those
of plain, whole answers.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import io
import itertools
import json
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
from parts.arguments import errors_in_one_line, parser_for, positive
from parts.tables import markdown, row
from parts.watched_command import memory_of
from PIL import Image

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
FURTHER = "is there a circle ?"
SIZES = ((64, 48), (96, 96), (320, 240), (640, 480), (480, 640), (1280, 960))
NUM_CASES = (
    120  # different questions of a soak; each is asked many times and must have the same answer each time
)
KINDS = {
    "whole": 38,
    "streamed": 18,
    "further question": 12,
    "response": 8,
    "video": 6,
    "aborted": 10,
    "refused": 8,
}
"""Requests of each kind among a hundred."""
COLUMNS = (
    "requests",
    "requests/s",
    "p50 ms",
    "p99 ms",
    "memory MB",
    "descriptors",
    "threads",
    "busy",
    "wrong",
)


class Case(NamedTuple):
    """A question about an image or a video, with its own seed."""

    data: bytes
    type: str
    question: str
    seed: int

    @property
    def content(self) -> list[dict[str, Any]]:
        """The parts of a message."""
        kind = f"{self.type.partition('/')[0]}_url"
        url = f"data:{self.type};base64,{base64.b64encode(self.data).decode()}"
        return [{"type": kind, kind: {"url": url}}, {"type": "text", "text": self.question}]

    @property
    def body(self) -> dict[str, Any]:
        """A request for a chat completion."""
        messages = [{"role": "user", "content": self.content}]
        return {"model": "model", "messages": messages, "temperature": 1.0, "seed": self.seed}


class Done(NamedTuple):
    """A request that has ended."""

    kind: str
    milliseconds: float
    state: str
    """"right", "wrong", or "busy" for status 429."""


class Sample(NamedTuple):
    """The server after some requests."""

    requests: int
    resident: int
    descriptors: int
    threads: int


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--requests", type=positive, default=1000)
    parser.add_argument("--clients", type=positive, default=16)
    parser.add_argument("--threads", type=positive, default=1, help="threads of the backend")
    parser.add_argument("--mixed", action="store_true", help="requests of all kinds")
    parser.add_argument("--video", type=Path, help="video that --mixed asks about")
    parser.add_argument("--seed", type=int, default=0, help="of the order of kinds")
    options = parser.parse_args()
    with errors_in_one_line(parser):
        Load(options).run()


class Load:
    """The requests of one run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.cases = mixed_cases() if options.mixed else plain_cases(options.requests)
        self.clip = (
            None if options.video is None else Case(options.video.read_bytes(), "video/mp4", QUESTIONS[0], 1)
        )
        self.kinds = Counter(KINDS if options.mixed else {"whole": 1})
        if self.clip is None:
            del self.kinds["video"]
        self.done: list[Done] = []
        self.samples: list[Sample] = []
        self.problems: list[str] = []
        self.lock = threading.Lock()

    def run(self) -> None:
        """Answer everything alone, then by a server; print the table."""
        options = self.options
        with Pipeline.from_bundle(options.bundle, threads=options.threads) as pipeline:
            start = time.perf_counter()
            self.own = [own_answer(pipeline, case) for case in self.cases]
            alone_s = time.perf_counter() - start
            if options.mixed:
                self.greedy = [own_answer(pipeline, case, temperature=0.0) for case in self.cases]
                turns = ([(case.question, text)] for case, text in zip(self.cases, self.own))
                self.further = [
                    own_answer(pipeline, case._replace(question=FURTHER), history=turn)
                    for case, turn in zip(self.cases, turns)
                ]
            if self.clip is not None:
                self.of_clip = pipeline.generate(None, self.clip.question, video=options.video).text
        rate = len(self.own) / alone_s
        print(
            f"{len(set(self.own))} different answers to {len(self.own)} questions; the pipeline alone: {rate:.1f}/s"
        )
        print(markdown(COLUMNS, []), flush=True)
        with server(options) as (process, port):
            self.pid, self.port = process.pid, port
            self.tenth_began = time.perf_counter()
            numbers = iter(range(options.requests))
            with ThreadPoolExecutor(options.clients) as threads:
                clients = [threads.submit(self.client, numbers) for _ in range(options.clients)]
                for client in clients:
                    client.result()
            self.end()

    def client(self, numbers: Iterator[int]) -> None:
        """Ask until all numbers are taken, on one connection."""
        with contextlib.closing(
            http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        ) as connection:
            while True:
                with self.lock:
                    number = next(numbers, None)
                if number is None:
                    return
                self.ask(connection, number)

    def ask(self, connection: http.client.HTTPConnection, number: int) -> None:
        drawn = random.Random(f"{self.options.seed} {number}")
        (kind,) = drawn.choices([*self.kinds], [*self.kinds.values()])
        place = number % len(self.cases)
        start = time.perf_counter()
        try:
            state = REQUESTS[kind](self, connection, place, drawn)
        except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
            connection.close()
            state = f"{type(error).__name__}: {error}"
        done = Done(
            kind, 1e3 * (time.perf_counter() - start), state if state in ("right", "busy") else "wrong"
        )
        with self.lock:
            self.done.append(done)
            if done.state == "wrong":
                self.problems.append(f"request {number}, {kind}: {state[:300]}")
            if len(self.done) % max(1, self.options.requests // 200) == 0:
                self.samples.append(self.sample())
            if len(self.done) % max(1, self.options.requests // 10) == 0:
                print(row(self.line(len(self.done))), flush=True)

    def sample(self) -> Sample:
        folder = Path(f"/proc/{self.pid}")
        counts = (sum(1 for _ in (folder / name).iterdir()) for name in ("fd", "task"))
        return Sample(len(self.done), resident(self.pid), *counts)

    def line(self, after: int) -> list[str]:
        """Return the table's line for the tenth that ends after so many requests."""
        done = self.done[max(0, after - self.options.requests // 10) : after]
        times = np.array(
            [one.milliseconds for one in done if one.kind == "whole" and one.state == "right"] or [np.nan]
        )
        last = self.sample()
        states = Counter(one.state for one in done)
        now = time.perf_counter()
        rate, self.tenth_began = len(done) / (now - self.tenth_began), now
        return [
            str(after),
            f"{rate:.1f}",
            f"{np.quantile(times, 0.5):.0f}",
            f"{np.quantile(times, 0.99):.0f}",
            f"{last.resident / 1e6:.1f}",
            str(last.descriptors),
            str(last.threads),
            str(states["busy"]),
            str(states["wrong"]),
        ]

    def end(self) -> None:
        """Print the table of tenths, the growth of memory, and what went wrong; exit with 1 if anything did."""
        kinds = Counter(one.kind for one in self.done)
        print("\nrequests of each kind:", ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()))
        late = [sample for sample in self.samples if sample.requests > self.options.requests / 10]
        if len(late) > 2:
            slope = np.polyfit([one.requests for one in late], [one.resident for one in late], 1)[0]
            print(
                f"growth of memory after the first tenth: {slope * 1e3 / 1e3:.2f} kB for each 1000 requests"
            )
        for problem in self.problems[:20]:
            print(problem)
        if self.problems or len(self.done) != self.options.requests:
            sys.exit(1)


# One function for each kind of request. It returns "right", "busy", or what is wrong.


def whole(load: Load, connection: http.client.HTTPConnection, place: int, _drawn: random.Random) -> str:
    status, answer = post(connection, load.cases[place].body)
    return judged(status, answer, load.own[place])


def streamed(load: Load, connection: http.client.HTTPConnection, place: int, _drawn: random.Random) -> str:
    body = {**load.cases[place].body, "stream": True, "stream_options": {"include_usage": True}}
    status, answer = post(connection, body)
    if status != 200:
        return judged(status, answer, "")
    *lines, end = [line.removeprefix("data: ") for line in answer.decode().split("\n\n") if line]
    chunks = [json.loads(line) for line in lines]
    text = "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])
    is_whole = end == "[DONE]" and chunks[-1]["usage"]["total_tokens"] > 0
    return compared(text, load.own[place]) if is_whole else "a stream without its end"


def further_question(
    load: Load, connection: http.client.HTTPConnection, place: int, _drawn: random.Random
) -> str:
    body = load.cases[place].body
    said = {"role": "assistant", "content": load.own[place]}
    body["messages"] += [said, {"role": "user", "content": FURTHER}]
    status, answer = post(connection, body)
    return judged(status, answer, load.further[place])


def response(load: Load, connection: http.client.HTTPConnection, place: int, _drawn: random.Random) -> str:
    image, text = load.cases[place].content
    parts = [
        {"type": "input_image", "image_url": image["image_url"]["url"]},
        {"type": "input_text", "text": text["text"]},
    ]
    body = {"model": "model", "input": [{"role": "user", "content": parts}], "temperature": 0}
    status, answer = post(connection, body, path="/v1/responses")
    if status != 200:
        return judged(status, answer, "")
    return compared(json.loads(answer)["output"][0]["content"][0]["text"], load.greedy[place])


def video(load: Load, connection: http.client.HTTPConnection, _place: int, _drawn: random.Random) -> str:
    assert load.clip is not None
    body = {**load.clip.body, "temperature": None, "seed": None}
    status, answer = post(connection, body)
    return judged(status, answer, load.of_clip)


def aborted(load: Load, _connection: http.client.HTTPConnection, place: int, drawn: random.Random) -> str:
    """Go away within the body, before the answer, or within it."""
    body = json.dumps({**load.cases[place].body, "stream": drawn.random() < 0.5}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", load.port), timeout=60) as client:
        client.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode())
        stage = drawn.randrange(3)
        client.sendall(body if stage else body[: len(body) // 2])
        if stage == 2:
            client.recv(64)
    return "right"


def refused(load: Load, connection: http.client.HTTPConnection, place: int, drawn: random.Random) -> str:
    case = load.cases[place]
    broken = case._replace(data=case.data[: len(case.data) // 2])
    bodies: list[tuple[Any, int]] = [
        ({**case.body, "best": 1}, 400),
        ({**case.body, "n": 99}, 400),
        ({**case.body, "model": "other"}, 404),
        ({**case.body, "tools": [{"type": "function"}]}, 400),
        ({**case.body, "structured_outputs": {"choice": ["x" * 5000]}}, 400),
        ({**case.body, "messages": [{"role": "user", "content": "a " * 50_000}]}, 400),
        (broken.body, 400),
        ([], 400),
    ]
    body, expected = drawn.choice(bodies)
    status, _ = post(connection, body)
    return "busy" if status == 429 else "right" if status == expected else f"{status} in place of {expected}"


REQUESTS = {
    "whole": whole,
    "streamed": streamed,
    "further question": further_question,
    "response": response,
    "video": video,
    "aborted": aborted,
    "refused": refused,
}


def post(
    connection: http.client.HTTPConnection, body: Any, *, path: str = "/v1/chat/completions"
) -> tuple[int, bytes]:
    """Return status and body of the answer."""
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.status, answer.read()


def judged(status: int, answer: bytes, expected: str) -> str:
    """Return what a chat completion is."""
    if status != 200:
        return "busy" if status == 429 else f"{status}: {answer.decode()}"
    return compared(json.loads(answer)["choices"][0]["message"]["content"], expected)


def compared(text: str, expected: str) -> str:
    return "right" if text == expected else f"{text!r} in place of {expected!r}"


def own_answer(pipeline: Pipeline, case: Case, **settings: Any) -> str:
    """Return the pipeline's own answer."""
    return pipeline.generate(
        case.data, case.question, **{"temperature": 1.0, "seed": case.seed, **settings}
    ).text


def plain_cases(count: int) -> list[Case]:
    pairs = itertools.cycle(itertools.product(PICTURES, QUESTIONS))
    drawn = zip(range(count), pairs)
    return [Case(path.read_bytes(), "image/png", question, seed) for seed, (path, question) in drawn]


def mixed_cases() -> list[Case]:
    """Return questions about the pictures in many sizes, as PNG and JPEG."""
    cases = []
    for seed in range(NUM_CASES):
        kind, file = ("png", "jpeg")[seed % 2], io.BytesIO()
        with Image.open(PICTURES[seed % len(PICTURES)]) as picture:
            picture.convert("RGB").resize(SIZES[seed % len(SIZES)]).save(file, kind)
        cases.append(Case(file.getvalue(), f"image/{kind}", QUESTIONS[seed % len(QUESTIONS)], seed))
    return cases


@contextmanager
def server(options: argparse.Namespace) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Run ``trio-serve`` and yield its process and port."""
    command = [sys.executable, "-m", "trio_edge.serving.cli", f"model={options.bundle}", "--port", "0"]
    # Answers of clients that went away end at their next token, and hold a place until then.
    command += ["--threads", str(options.threads), "--max-queue", str(4 * options.clients)]
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
