"""Answers per second of trio-serve without Ray, and with one or more replicas, measured in turns.

    python benchmarks/replicas.py BUNDLE --replicas 0 1 2 --clients 4 --requests 40

0 is the server without Ray. Each client asks about a new image of random pixels as soon as it has its answer. A request's service
time is its time on the replica: first token and decode, from ``usage``. --times writes the service times, one per line, for
benchmarks/fleet_size.py. Each replica has one thread.
"""

from __future__ import annotations

import base64
import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import openai
from parts.arguments import errors_in_one_line, parser_for, positive
from parts.tables import markdown
from PIL import Image

from trio_edge.profiling.predict.plan import parse_size
from trio_edge.runtime.bundle.errors import BackendError

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Iterator

COMMAND = Path(sys.executable).parent / "trio-serve"
_END_S = 60
_REST_S = 10  # a server answers as soon as its first replica does


@contextlib.contextmanager
def served(bundle: Path, replicas: int, *, clients: int) -> Iterator[str]:
    """Serve a bundle until the block ends, and yield the address."""
    more = ["--replicas", str(replicas)] if replicas else []
    words = [f"model={bundle}", "--port", "0", "--threads", "1", "--max-queue", str(2 * clients), *more]
    process = subprocess.Popen([str(COMMAND), *words], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        found = re.match(r"trio-serve: (http://\S+) answers", line)
        if found is None:
            raise BackendError(line.strip())
        yield found[1]
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=_END_S)


def image_url(seed: int, size: tuple[int, int]) -> str:
    """Return an image of random pixels as a data URL."""
    width, height = size
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(file, "JPEG")
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def ask(client: openai.OpenAI, url: str, tokens: int) -> tuple[float, float]:
    """Return the milliseconds of a request for its client, and on its replica."""
    content: Any = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "What is in the image?"},
    ]
    start = time.perf_counter()
    answer = client.chat.completions.create(
        model="model",
        messages=[{"role": "user", "content": content}],
        max_tokens=tokens,
        extra_body={"ignore_eos": True},
    )
    usage: Any = answer.usage
    return 1e3 * (time.perf_counter() - start), usage.ttft_ms + usage.decode_ms


def measured(address: str, options: Any, count: int) -> tuple[float, list[tuple[float, float]]]:
    """Return answers per second, and the times of each."""
    urls = [image_url(seed, options.image_size) for seed in range(count)]
    with (
        openai.OpenAI(base_url=address, api_key="none") as client,
        ThreadPoolExecutor(options.clients) as clients,
    ):
        start = time.perf_counter()
        times = list(clients.map(lambda url: ask(client, url, options.tokens), urls))
    return count / (time.perf_counter() - start), times


def parsed() -> tuple[ArgumentParser, Any]:
    parser = parser_for(__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--replicas", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--clients", type=positive, default=4)
    parser.add_argument("--requests", type=positive, default=40, help="requests per round")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--tokens", type=positive, default=8)
    parser.add_argument("--image-size", type=parse_size, default=(640, 480), metavar="WxH")
    parser.add_argument("--times", type=Path, help="file for the service times of the last server")
    return parser, parser.parse_args()


def main() -> None:
    """Print a line for each number of replicas."""
    parser, options = parsed()
    rates: dict[int, list[float]] = {replicas: [] for replicas in options.replicas}
    times: dict[int, list[tuple[float, float]]] = {replicas: [] for replicas in options.replicas}
    with errors_in_one_line(parser), contextlib.ExitStack() as servers:
        addresses = {
            replicas: servers.enter_context(served(options.bundle, replicas, clients=options.clients))
            for replicas in options.replicas
        }
        time.sleep(_REST_S)
        for address in addresses.values():
            measured(address, options, 4 * options.clients)
        for _ in range(options.rounds):
            for replicas, address in addresses.items():
                rate, round_times = measured(address, options, options.requests)
                rates[replicas].append(rate)
                times[replicas] += round_times
    if options.times is not None:
        services = (service for _, service in times[options.replicas[-1]])
        options.times.write_text("".join(f"{service:.3f}\n" for service in services))
    figures = ("answers/s of each round", "median", "latency, ms", "95 %", "service time, ms", "its spread")
    print(f"load average {os.getloadavg()[1]:.1f} on {os.cpu_count()} cores\n")
    rows = [row(count, rates[count], np.array(times[count])) for count in options.replicas]
    print(markdown(("replicas", *figures), rows))


def row(replicas: int, rates: list[float], times: np.ndarray) -> tuple[str, ...]:
    """Return a line of the table."""
    waits, services = times.T
    numbers = (np.median(waits), np.percentile(waits, 95), services.mean())
    return (
        str(replicas) if replicas else "without Ray",
        ", ".join(f"{rate:.1f}" for rate in rates),
        f"{np.median(rates):.2f}",
        *(f"{number:.0f}" for number in numbers),
        f"{services.std() / services.mean():.2f}",
    )


if __name__ == "__main__":
    main()
