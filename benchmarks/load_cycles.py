"""Load a bundle, answer, close, again and again, and print how memory grows.

python benchmarks/load_cycles.py BUNDLE --cycles 1000 --backend onnxruntime
"""

from __future__ import annotations

import argparse
import gc
import re
from pathlib import Path

from parts.arguments import errors_in_one_line, parser_for, positive

from trio_edge.runtime.backends.registry import make_backend
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.devices.cuda import CudaDevice, cuda_problem, load_cuda
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
            first = memory()
        elif (cycle - options.warm_up) % max(1, options.cycles // 10) == 0 and first is not None:
            grown = {name: (now - first[name]) / 1e6 for name, now in memory().items()}
            print(
                cycle - options.warm_up,
                "cycles:",
                ", ".join(f"{name} {mb:+.2f} MB" for name, mb in grown.items()),
            )


def memory() -> dict[str, int]:
    """Return bytes of resident host memory, and of GPU memory in use where there is one."""
    gc.collect()
    resident = re.search(r"^VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    found = {"host": 1024 * int(resident[1]) if resident else 0}
    if cuda_problem() is None:
        device = CudaDevice(load_cuda())
        found["GPU"] = -(device.free_bytes() or 0)
        device.close()
    return found


if __name__ == "__main__":
    main()
