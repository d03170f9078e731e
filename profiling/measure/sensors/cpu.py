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
        # a name with two colons is part of a package, such as its cores, which the package's counter includes
        zones = [zone for zone in sorted(sys.glob("class/powercap/*-rapl:*")) if zone.name.count(":") == 1]
        self._zones = {_text(zone / "name") or zone.name: zone for zone in zones}
        counts = {name: _number(zone / "energy_uj") for name, zone in self._zones.items()}
        self._last = {name: count for name, count in counts.items() if count is not None}
        self._total = dict.fromkeys(self._last, 0)

    def read(self) -> dict[str, float]:
        """Return the readings of this moment."""
        readings = {}
        for name, last in self._last.items():
            if (now := _number(self._zones[name] / "energy_uj")) is not None:
                # the counter in microjoules wraps around at its range
                wrapped = 0 if now >= last else _number(self._zones[name] / "max_energy_range_uj") or 0
                self._total[name] += now - last + wrapped
                self._last[name] = now
                readings[f"energy_j.{name}"] = self._total[name] / 1e6
        return readings


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
