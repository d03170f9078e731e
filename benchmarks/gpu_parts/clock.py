"""Times on a device: events on a GPU, the processor's clock on a CPU."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import torch


class Mark(Protocol):
    """A moment in the device's order of work."""

    def ms_until(self, later: Mark) -> float:
        """Return the milliseconds from this moment to ``later``; both must have passed."""


class _Event:
    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def ms_until(self, later: Mark) -> float:
        assert isinstance(later, _Event)
        return float(self.event.elapsed_time(later.event))


class _Moment:
    def __init__(self) -> None:
        self.seconds = time.perf_counter()

    def ms_until(self, later: Mark) -> float:
        assert isinstance(later, _Moment)
        return 1e3 * (later.seconds - self.seconds)


def mark(device: torch.device) -> Mark:
    """Return the moment at which the device has finished all work so far."""
    return _Event() if device.type == "cuda" else _Moment()


def differences_ms(marks: Sequence[Mark], device: torch.device) -> list[float]:
    """Wait for the device and return the milliseconds between neighbouring marks."""
    wait(device)
    return [earlier.ms_until(later) for earlier, later in zip(marks, marks[1:])]


def wait(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
