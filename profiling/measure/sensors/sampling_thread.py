"""The sensors of this machine, read in a thread during the measurement; ranges and energy from their readings.

A reading is a quantity's name with its value. Names are ``<quantity>.<where>``:

    power_w.gpu  power_w.module  power_w.VDD_SOC       watts at this moment
    energy_j.gpu  energy_j.package-0                   joules since some moment in the past
    temperature_c.gpu  clock_mhz.cpu  load_percent.gpu  memory_mb.gpu
"""

from __future__ import annotations

import contextlib
import threading
import time
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple, Protocol, final

import msgspec
import numpy as np

from trio_edge.profiling.measure.sensors.cpu import CpuClock, Rapl, ThermalZones
from trio_edge.profiling.measure.sensors.tegrastats import Tegrastats
from trio_edge.runtime.bundle.errors import install_command
from trio_edge.runtime.devices.machine import find_gpu, is_jetson

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from numpy.typing import NDArray


POWER, ENERGY = "power_w", "energy_j"
INTERVAL_SECONDS = 0.2  # each reading takes 0.05 ms of processor time
_SLACK = 1.0
"""Seconds at either end of the runs that need no reading."""


class Sensor(Protocol):
    """A source of readings during the measurement."""

    @property
    def name(self) -> str:
        """Name for the report."""

    def read(self) -> dict[str, float]:
        """Return the present readings; empty if there are none."""

    def close(self) -> None:
        """Release the sensor."""


def open_sensors() -> tuple[list[Sensor], list[str]]:
    """Return the sensors of this machine, and one line for each that it lacks."""
    sensors: list[Sensor] = []
    missing: list[str] = []
    for quantities, make in _makers().items():
        try:
            sensors.append(make())
        except OSError as error:
            missing.append(f"{quantities}: {error}")
    return sensors, missing


def _makers() -> dict[str, Callable[[], Sensor]]:
    """Return functions that open a sensor, or raise OSError with the reason, by what it measures."""
    if is_jetson():
        return {"power, clocks and temperatures": Tegrastats}
    return {
        "GPU power, clocks and memory": _gpu,
        "CPU clock": lambda: _working(CpuClock(), "the system shows none"),
        "CPU energy": lambda: _working(
            Rapl(), "no readable counter in /sys/class/powercap (it may need root)"
        ),
        "CPU temperature": lambda: _working(ThermalZones(), "no readable zone in /sys/class/thermal"),
    }


def _gpu() -> Sensor:
    if find_gpu() is None:
        raise OSError("this machine has no NVIDIA GPU")
    if find_spec("pynvml") is None:
        raise OSError(f"nvidia-ml-py is missing; {install_command('profile')}")
    from trio_edge.profiling.measure.sensors.nvml import Nvml

    return Nvml()


def _working(sensor: Sensor, missing: str) -> Sensor:
    if not sensor.read():
        raise OSError(missing)
    return sensor


class SensorSample(NamedTuple):
    """All sensors at one moment."""

    seconds: float
    """Value of ``time.perf_counter``."""
    readings: dict[str, float]


class SensorRange(msgspec.Struct, frozen=True, kw_only=True):
    """Range of one quantity during the runs."""

    least: float
    mean: float
    most: float


@final
class SamplingThread:
    """Samples all sensors within its block, then closes them; ``samples`` can be read at any time.

    A sensor that fails is not read again, and ``lost`` has the reason; the others continue.
    """

    def __init__(self, sensors: Sequence[Sensor], *, interval_seconds: float = INTERVAL_SECONDS) -> None:
        self.samples: list[SensorSample] = []
        self.lost: list[str] = []
        """One line for each sensor that failed or gave no reading; complete at the end of the block."""
        self._working = list(sensors)
        self._silent = list(sensors)
        self._sensors = sensors
        self._interval = interval_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sensors", daemon=True)

    def __enter__(self) -> SamplingThread:
        if self._sensors:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._sensors:
            self._thread.join()
            self._sample()  # so that counters are known at the end of the last run
        self.lost += [f"{sensor.name}: gave no reading" for sensor in self._silent if sensor in self._working]
        for sensor in self._sensors:
            with contextlib.suppress(Exception):  # the measurement is complete without it
                sensor.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._sample()
            self._stop.wait(self._interval)

    def _sample(self) -> None:
        readings: dict[str, float] = {}
        for sensor in tuple(self._working):  # a copy, because failing ones are removed
            try:
                found = sensor.read()
            except Exception as error:  # drivers' libraries raise anything
                self._working.remove(sensor)
                self.lost.append(f"{sensor.name}: failed after {len(self.samples)} readings ({error})")
                continue
            if found and sensor in self._silent:
                self._silent.remove(sensor)
            readings |= found
        self.samples.append(SensorSample(time.perf_counter(), readings))


def sensor_ranges(samples: Sequence[SensorSample], *, start: float, end: float) -> dict[str, SensorRange]:
    """Return the range of each quantity between two moments, without counters."""
    values: dict[str, list[float]] = {}
    for sample in samples:
        if start <= sample.seconds <= end:
            for name, value in sample.readings.items():
                if not name.startswith(ENERGY):
                    values.setdefault(name, []).append(value)
    return {
        name: SensorRange(least=min(found), mean=sum(found) / len(found), most=max(found))
        for name, found in sorted(values.items())
    }


def joules(samples: Sequence[SensorSample], windows: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Return the total energy of all ``windows`` (``time.perf_counter`` seconds), by the place of its sensor.

    A counter is interpolated between its readings; without a counter, power is integrated. A place without readings from the
    first window to the last is left out.
    """
    names = sorted({name for sample in samples for name in sample.readings})
    counted = {name.partition(".")[2] for name in names if name.startswith(f"{ENERGY}.")}
    result = {}
    for name in names:
        quantity, _, where = name.partition(".")
        if quantity == ENERGY or (quantity == POWER and where not in counted):
            times, total = _running_total(samples, name, integrate=quantity == POWER)
            if len(times) > 1 and times[0] - _SLACK <= windows[0][0] and windows[-1][1] <= times[-1] + _SLACK:
                ends = np.interp(np.asarray(windows, np.float64), times, total)
                result[where] = float((ends[:, 1] - ends[:, 0]).sum())
    return result


def _running_total(
    samples: Sequence[SensorSample], name: str, *, integrate: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the moments of a quantity's readings, and its values or their integral from the first moment."""
    points = [(one.seconds, one.readings[name]) for one in samples if name in one.readings]
    times, values = np.asarray(points, np.float64).T
    if integrate:
        areas = np.diff(times) * (values[1:] + values[:-1]) / 2
        values = np.concatenate([[0.0], np.cumsum(areas)])
    return times, values
