"""The CPU's clock, energy counters and temperatures, from Linux's files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import final

_SYS = Path("/sys")
_CPUINFO = Path("/proc/cpuinfo")
_CLOCK = re.compile(r"^cpu MHz\s*:\s*([\d.]+)", re.MULTILINE)


class _FileSensor:
    """Base of sensors that open their files for each reading."""

    def close(self) -> None:
        """Nothing stays open."""


@final
class CpuClock(_FileSensor):
    """Mean clock of all cores, from cpufreq or else from /proc/cpuinfo."""

    name = "CPU clock"

    def __init__(self, *, sys: Path = _SYS, cpuinfo: Path = _CPUINFO) -> None:
        self._files = sorted(sys.glob("devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq"))
        self._cpuinfo = cpuinfo

    def read(self) -> dict[str, float]:
        """Return the readings of this moment."""
        found = [value / 1e3 for file in self._files if (value := _number(file)) is not None]
        if not found:
            found = [float(value) for value in _CLOCK.findall(_text(self._cpuinfo))]
        return {"clock_mhz.cpu": sum(found) / len(found)} if found else {}


@final
class Rapl(_FileSensor):
    """Energy counters of CPU packages and their memory, in joules since the first reading."""

    name = "RAPL"

    def __init__(self, *, sys: Path = _SYS) -> None:
        self._counters: dict[str, _Counter] = {}
        for zone in sorted(sys.glob("class/powercap/*-rapl:*")):
            # a name with two colons is part of a package, such as its cores, which the package's counter includes
            if zone.name.count(":") == 1 and _number(zone / "energy_uj") is not None:
                self._counters[_text(zone / "name") or zone.name] = _Counter(zone)

    def read(self) -> dict[str, float]:
        """Return the readings of this moment."""
        readings = {name: counter.joules() for name, counter in self._counters.items()}
        return {f"energy_j.{name}": value for name, value in readings.items() if value is not None}


class _Counter:
    """A counter in microjoules that wraps around at its range."""

    def __init__(self, zone: Path) -> None:
        self._file = zone / "energy_uj"
        self._range = _number(zone / "max_energy_range_uj") or 0
        self._last = _number(self._file) or 0
        self._total = 0

    def joules(self) -> float | None:
        now = _number(self._file)
        if now is None:
            return None
        self._total += now - self._last if now >= self._last else now - self._last + self._range
        self._last = now
        return self._total / 1e6


@final
class ThermalZones(_FileSensor):
    """Temperatures from the kernel; the hottest of all zones with one name."""

    name = "thermal zones"

    def __init__(self, *, sys: Path = _SYS) -> None:
        self._zones = [
            (_text(zone / "type") or zone.name, zone / "temp")
            for zone in sorted(sys.glob("class/thermal/thermal_zone*"))
        ]

    def read(self) -> dict[str, float]:
        """Return the readings of this moment."""
        hottest: dict[str, float] = {}
        for name, file in self._zones:
            if (value := _number(file)) is not None:
                key = f"temperature_c.{name}"
                hottest[key] = max(hottest.get(key, value / 1e3), value / 1e3)
        return hottest


def _number(file: Path) -> int | None:
    """Return the number in a file; None if it cannot be read."""
    try:
        return int(_text(file))
    except ValueError:
        return None


def _text(file: Path) -> str:
    """Return the text of a file; an empty one if it cannot be read."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""
