"""Memory of this process and of the GPU while one bundle is loaded and answers its first questions."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, field
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # of proc(5): the peak starts again at what is resident now


@dataclass(slots=True, kw_only=True)
class MeasuredMemory:
    """Bytes; None where the system does not say."""

    planned: dict[str, int] = field(default_factory=dict)
    """Bytes by purpose, as the backend says them."""
    before: int | None = None
    """Resident in the process before the bundle was loaded."""
    loaded: int | None = None
    """Resident once it was loaded."""
    peak: int | None = None
    """The most that was resident during the first answers."""
    device_free: int | None = None
    """Free on the GPU after them; None on a CPU."""


def resident_bytes() -> int | None:
    """Return what is resident now; None where the system does not say."""
    return _kilobytes("VmRSS")


def peak_bytes() -> int | None:
    """Return the most that was resident since ``reset_peak``, or since the start where the system cannot reset it."""
    return _kilobytes("VmHWM")


def reset_peak() -> None:
    """Let the peak start again, where the system can."""
    with contextlib.suppress(OSError):
        _CLEAR.write_text(_RESET_PEAK)


def _kilobytes(name: str) -> int | None:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else 1024 * int(found[1])
