"""Growth of memory when a bundle is loaded, answers and is closed many times.

python benchmarks/load_cycles.py BUNDLE --cycles 1000 --backend onnxruntime
"""

from __future__ import annotations

import argparse
from pathlib import Path

from parts.arguments import errors_in_one_line, parser_for, positive

from trio_edge.profiling.check.checks import memory_in_use
from trio_edge.runtime.backends.registry import make_backend
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.pipeline import Pipeline


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--cycles", type=positive, default=1000)
    parser.add_argument("--warm-up", type=positive, default=50, help="cycles before memory is compared")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--prompt", default="w1 w2 w3")
    options = parser.parse_args()
    with errors_in_one_line(parser):
        run(options)


def run(options: argparse.Namespace) -> None:
    bundle = open_bundle(options.bundle)
    first = None
    for cycle in range(1, options.warm_up + options.cycles + 1):
        with Pipeline(bundle, make_backend(options.backend, bundle=bundle, threads=1)) as pipeline:
            _ = pipeline.generate(None, options.prompt, max_new_tokens=3).text
        del pipeline
        if cycle == options.warm_up:
            first = memory_in_use()
        elif (cycle - options.warm_up) % max(1, options.cycles // 10) == 0 and first is not None:
            grown = {name: (now - first[name]) / 1e6 for name, now in memory_in_use().items()}
            text = ", ".join(f"{name} {mb:+.2f} MB" for name, mb in grown.items())
            print(f"{cycle - options.warm_up} cycles: {text}")


if __name__ == "__main__":
    main()
