"""The host's work per decoded token: the runtime's Python code, with a CUDA that does nothing.

    python benchmarks/host_overhead.py out/tiny

The TensorRT backend runs a prefill and its first steps on the CPU (``tests/cuda_on_host.py``) and captures them. After that every
function of the CUDA runtime returns at once, so only the runtime's own work is left of a step: looking up the embedding, the
decode step, choosing the token. The calls of the CUDA runtime are counted; their time on a GPU is not included.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from parts.arguments import errors_in_one_line, parser_for, positive

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.cuda_on_host import CudaOnHost, Error, pretend_gpu, write_engines
from tests.engine_bundles import HOST
from trio_edge.profiling.measure.answers import without_stop_tokens
from trio_edge.profiling.measure.measuring import PROMPT, measured_sizes, random_image
from trio_edge.runtime.backends.registry import make_backend
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.pipeline import Pipeline

FIRST_STEPS = 3
"""Plain, captured, replayed."""


class CudaThatCanRest(CudaOnHost):
    """Computes at first; after ``rest`` every call returns at once and is counted."""

    def __init__(self) -> None:
        super().__init__()
        self.num_calls = 0

    def rest(self) -> None:
        def nothing(*_: Any) -> tuple[Error]:
            self.num_calls += 1
            return (Error.cudaSuccess,)

        for name in dir(CudaOnHost):
            if name.startswith("cuda") and callable(getattr(CudaOnHost, name)):
                setattr(self, name, nothing)


class _RestingIds(list[int]):
    """Token ids that let CUDA rest before the step that follows the first ones."""

    def __init__(self, cuda: CudaThatCanRest) -> None:
        super().__init__()
        self._cuda = cuda

    def append(self, token: int) -> None:
        super().append(token)
        if len(self) == FIRST_STEPS + 1:
            self._cuda.rest()


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--answers", type=positive, default=10)
    options = parser.parse_args()
    with errors_in_one_line(parser):
        open_bundle(options.bundle)
    steps: list[float] = []
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        folder = Path(place) / "bundle"
        shutil.copytree(options.bundle, folder, ignore=shutil.ignore_patterns("engines"))
        write_engines(folder, host=HOST)
        for _ in range(options.answers):
            cuda = CudaThatCanRest()
            pretend_gpu(patch, cuda, HOST)
            times = step_ms(folder, cuda)
            num_calls = cuda.num_calls / len(times)
            steps += times
        num_ranges = len(open_bundle(folder).manifest.ranges)
    parts = statistics.quantiles(steps, n=20)
    print(
        f"{num_ranges} layer ranges, {len(steps)} tokens: {1e3 * statistics.median(steps):.1f} us of the host's work for each"
        f" (5 to 95 %: {1e3 * parts[0]:.1f} to {1e3 * parts[-1]:.1f}), and {num_calls:.1f} calls of the CUDA runtime"
    )


def step_ms(folder: Path, cuda: CudaThatCanRest) -> list[float]:
    """Return the time of each token with a resting CUDA: embedding, decode step, choice of the token."""
    bundle = open_bundle(folder)
    with Pipeline(without_stop_tokens(bundle), make_backend("tensorrt", bundle=bundle)) as pipeline:
        picture = random_image(measured_sizes(pipeline)[0])
        answer = pipeline.generate(picture, PROMPT, max_new_tokens=bundle.manifest.max_new_tokens)
        answer.token_ids = _RestingIds(cuda)
        for _ in answer:
            pass
        return answer.statistics.token_ms[FIRST_STEPS:]


if __name__ == "__main__":
    main()
