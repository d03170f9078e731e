"""Typed objects from JSON values, also when threads open bundles at the same time."""

from __future__ import annotations

import subprocess
import sys

import pytest

# A class is set up when it is used first, so each round has new ones; a crash would end the tests, so it has a process.
ROUNDS = """
import sys, threading
import msgspec
from trio_edge.runtime.bundle.limits import typed, typed_json

read = {"values": typed, "text": lambda value, kind: typed_json(msgspec.json.encode(value), kind)}[sys.argv[1]]

sys.setswitchinterval(1e-6)

def one_round():
    inner = msgspec.defstruct("Inner", [(f"field{i}", int) for i in range(30)])
    outer = msgspec.defstruct("Outer", [(f"part{i}", list[inner]) for i in range(10)])
    value = {f"part{i}": [{f"field{j}": j for j in range(30)}] for i in range(10)}
    start, found = threading.Barrier(4), []

    def convert():
        start.wait()
        found.append(read(value, outer))

    threads = [threading.Thread(target=convert) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(one == found[0] for one in found)

for _ in range(100):
    one_round()
"""


@pytest.mark.parametrize("form", ["values", "text"])
def test_threads_may_use_a_class_for_the_first_time_at_once(form: str) -> None:
    result = subprocess.run([sys.executable, "-c", ROUNDS, form], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
