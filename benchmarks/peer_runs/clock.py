"""Clock of one answer, which needs no package: wall and processor seconds of loading, the first token and each further token."""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version


class Clock:
    """Wall and processor seconds of this process. It is made before any package is imported."""

    def __init__(self) -> None:
        self._marks = [(time.perf_counter(), time.process_time())]

    def mark(self) -> None:
        """Note the time: when the model is loaded, then after each token."""
        self._marks.append((time.perf_counter(), time.process_time()))

    def report(self, *packages: str, prompt_tokens: int | None = None) -> None:
        """Print one line of JSON: every step's seconds as (wall, processor), and the versions of ``packages``."""
        load, first, *tokens = (
            (after[0] - before[0], after[1] - before[1])
            for before, after in zip(self._marks, self._marks[1:])
        )
        versions = {"Python": sys.version.split()[0]} | {name: version(name) for name in packages}
        found = {"load": load, "first": first, "tokens": tokens, "versions": versions}
        print(json.dumps(found | {"prompt_tokens": prompt_tokens}), flush=True)
