"""A Jetson's sensors, from the lines that ``tegrastats`` prints.

A line (L4T 36, AGX Orin) without the parts that are not read:

    RAM 4001/62841MB (…) CPU [0%@729,3%@1190,off,…] EMC_FREQ 3%@2133 GR3D_FREQ 26%@[306,306] cpu@45.6C tj@45.6C
    VDD_GPU_SOC 2388mW/2388mW VDD_CPU_CV 397mW/397mW VIN_SYS_5V0 3824mW/3824mW

Power is now/average. Newer releases add the largest value to temperatures and powers; older ones omit the unit of power.
Source: "Tegrastats Utility" in NVIDIA's Jetson Linux developer guide, and lines printed by devices.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from typing import final

TEGRASTATS = "tegrastats"
_INTERVAL_MS = 100  # half of the sampling interval, so that every sample finds a new line
_STOP_SECONDS = 5.0
_STALE_SECONDS = 2.0  # twenty lines were missed
_LONGEST_LINE = 1 << 16  # output without line ends must not fill the memory
_RAM = re.compile(r"\bRAM (\d+)/(\d+)MB")
_CPU = re.compile(r"\bCPU \[([^\]]*)\]")
_CORE_CLOCK = re.compile(r"\d+%@(\d+)")
_ENGINE = re.compile(r"\b(EMC|GR3D)_FREQ (\d+)%(?:@\[?(\d+))?")
_TEMPERATURE = re.compile(r"\b([A-Za-z]\w*)@(-?\d+(?:\.\d+)?)C")
_RAIL = re.compile(r"\b((?:VDD|VIN|POM|NC)\w*) (-?\d+)(?:mW)?/-?\d+(?:mW)?")
_ENGINE_NAMES = {"GR3D": "gpu", "EMC": "memory"}
_BOARD_RAILS = ("VDD_IN", "VIN", "POM_5V_IN")  # names of the whole board's input rail
_COLDEST_C = -200.0  # a sensor that is switched off shows -256


def parse_tegrastats(line: str) -> dict[str, float]:
    """Return the readings in one line.

    ``power_w.module`` is the board's input rail if the device measures it, else the sum of all rails.
    """
    readings: dict[str, float] = {}
    if found := _RAM.search(line):
        readings["memory_mb.module"] = float(found[1])
    if (cores := _CPU.search(line)) and (clocks := _CORE_CLOCK.findall(cores[1])):
        readings["clock_mhz.cpu"] = sum(map(float, clocks)) / len(clocks)
    for engine, load, clock in _ENGINE.findall(line):
        readings[f"load_percent.{_ENGINE_NAMES[engine]}"] = float(load)
        if clock:
            readings[f"clock_mhz.{_ENGINE_NAMES[engine]}"] = float(clock)
    for name, value in _TEMPERATURE.findall(line):
        if float(value) > _COLDEST_C:
            readings[f"temperature_c.{name.lower()}"] = float(value)
    return readings | _powers(line)


def _powers(line: str) -> dict[str, float]:
    rails = {name: float(value) / 1e3 for name, value in _RAIL.findall(line) if name != "NC"}  # not connected
    if not rails:
        return {}
    total = next((rails[name] for name in _BOARD_RAILS if name in rails), sum(rails.values()))
    return {"power_w.module": total, **{f"power_w.{name}": value for name, value in rails.items()}}


@final
class Tegrastats:
    """A running ``tegrastats`` and its last line."""

    name = TEGRASTATS

    def __init__(self, *, command: str = TEGRASTATS) -> None:
        """Start it; raises OSError with the reason if it does not start."""
        try:
            self._process = subprocess.Popen(
                [command, "--interval", str(_INTERVAL_MS)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C must reach only this program, which stops tegrastats itself
            )
        except OSError as error:
            raise OSError(f"{TEGRASTATS} does not start ({error.strerror})") from None
        self._latest: dict[str, float] = {}
        self._seconds = 0.0
        self._reader = threading.Thread(target=self._follow, name="tegrastats", daemon=True)
        self._reader.start()

    def _follow(self) -> None:
        stdout = self._process.stdout
        assert stdout is not None
        for line in iter(lambda: stdout.readline(_LONGEST_LINE), ""):
            if found := parse_tegrastats(line):
                self._latest, self._seconds = found, time.monotonic()

    def read(self) -> dict[str, float]:
        """Return the readings of the last line; none if it is too old."""
        return self._latest if time.monotonic() - self._seconds < _STALE_SECONDS else {}

    def close(self) -> None:
        """Stop it and its children."""
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_SECONDS)
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._reader.join()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _signal(self, number: int) -> None:
        # to the whole group: if the command is a script, its children may keep the pipe open
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)  # the session's leader has the group's number
