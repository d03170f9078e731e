"""The CPU's clock, energy counters and temperatures, from the files of Linux."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from collections.abc import Iterable

_SYS = Path("/sys")
_CPUINFO = Path("/proc/cpuinfo")
_CLOCK = re.compile(rb"^cpu MHz\s*:\s*([\d.]+)", re.MULTILINE)
_CHUNK = 1 << 16  # /proc/cpuinfo of many cores is longer than one page


@final
class _KernelFile:
    """A file that is read again and again: it stays open, for opening it takes longer than reading it."""

    def __init__(self, path: Path) -> None:
        try:
            self._descriptor: int | None = os.open(path, os.O_RDONLY)
        except OSError:
            self._descriptor = None

    def read(self) -> bytes:
        """Return what it holds now; nothing if it cannot be read."""
        parts: list[bytes] = []
        if self._descriptor is None:
            return b""
        try:
            while part := os.pread(self._descriptor, _CHUNK, sum(map(len, parts))):
                parts.append(part)
        except OSError:
            return b""
        return b"".join(parts)

    def number(self) -> int | None:
        """Return the number it holds now; None if it cannot be read."""
        try:
            return int(self.read())
        except ValueError:
            return None

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _close(files: Iterable[_KernelFile]) -> None:
    for file in files:
        file.close()


def _number(path: Path) -> int | None:
    file = _KernelFile(path)
    try:
        return file.number()
    finally:
        file.close()


@final
class CpuClock:
    """Mean clock of all cores: what cpufreq says, or /proc/cpuinfo where there is no cpufreq."""

    name = "CPU clock"

    def __init__(self, *, sys: Path = _SYS, cpuinfo: Path = _CPUINFO) -> None:
        paths = sorted(sys.glob("devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq"))
        self._files = [_KernelFile(path) for path in paths]
        self._cpuinfo = _KernelFile(cpuinfo)

    def read(self) -> dict[str, float]:
        """Return the readings of this moment."""
        found = [value / 1e3 for file in self._files if (value := file.number()) is not None]
        if not found:
            found = [float(value) for value in _CLOCK.findall(self._cpuinfo.read())]
        return {"clock_mhz.cpu": sum(found) / len(found)} if found else {}

    def close(self) -> None:
        """Close the files."""
        _close([*self._files, self._cpuinfo])


@final
class Rapl:
    """Energy counters of CPU packages (and their memory), in joules since the first reading."""

    name = "RAPL"

    def __init__(self, *, sys: Path = _SYS) -> None:
        self._counters: dict[str, _Counter] = {}
        for zone in sorted(sys.glob("class/powercap/*-rapl:*")):
            # With two colons it is a part of a package, as its cores, which the package's counter includes.
            if zone.name.count(":") == 1 and _number(zone / "energy_uj") is not None:
                self._counters[_text(zone / "name") or zone.name] = _Counter(zone)

    def read(self) -> dict[str, float]:
        """Return the readings of this moment."""
        readings = {name: counter.joules() for name, counter in self._counters.items()}
        return {f"energy_j.{name}": value for name, value in readings.items() if value is not None}

    def close(self) -> None:
        """Close the files."""
        _close(counter.file for counter in self._counters.values())


class _Counter:
    """A counter in microjoules that starts again at its range."""

    def __init__(self, zone: Path) -> None:
        self.file = _KernelFile(zone / "energy_uj")
        self._range = _number(zone / "max_energy_range_uj") or 0
        self._last = self.file.number() or 0
        self._total = 0

    def joules(self) -> float | None:
        now = self.file.number()
        if now is None:
            return None
        self._total += now - self._last if now >= self._last else now - self._last + self._range
        self._last = now
        return self._total / 1e6


@final
class ThermalZones:
    """Temperatures that the kernel shows; of zones with one name the hottest."""

    name = "thermal zones"

    def __init__(self, *, sys: Path = _SYS) -> None:
        self._zones = [
            (_text(zone / "type") or zone.name, _KernelFile(zone / "temp"))
            for zone in sorted(sys.glob("class/thermal/thermal_zone*"))
        ]

    def read(self) -> dict[str, float]:
        """Return the readings of this moment."""
        hottest: dict[str, float] = {}
        for name, file in self._zones:
            if (value := file.number()) is not None:
                key = f"temperature_c.{name}"
                hottest[key] = max(hottest.get(key, value / 1e3), value / 1e3)
        return hottest

    def close(self) -> None:
        """Close the files."""
        _close(file for _, file in self._zones)


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
