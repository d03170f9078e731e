"""The interface of a sensor, and the sensors of this machine.

A reading is a quantity's name with its value. Names are ``<quantity>.<where>``:

    power_w.gpu  power_w.module  power_w.VDD_SOC       watts at this moment
    energy_j.gpu  energy_j.package-0                   joules since some moment in the past
    temperature_c.gpu  clock_mhz.cpu  load_percent.gpu  memory_mb.gpu
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

from trio_edge.profiling.measure.sensors.cpu import CpuClock, Rapl, ThermalZones
from trio_edge.profiling.measure.sensors.tegrastats import TEGRASTATS, Tegrastats
from trio_edge.runtime.devices.machine import find_gpu, is_jetson

if TYPE_CHECKING:
    from collections.abc import Callable

POWER, ENERGY = "power_w", "energy_j"


class Sensor(Protocol):
    """A source of readings during the measurement."""

    @property
    def name(self) -> str:
        """Name for the report."""

    def read(self) -> dict[str, float]:
        """Return the present readings; empty if there are none."""

    def close(self) -> None:
        """Release the sensor."""


class SensorMissing(Exception):  # noqa: N818 - no error: it becomes one line of the report
    """This machine lacks the sensor; the text gives the reason."""


def open_sensors() -> tuple[list[Sensor], list[str]]:
    """Return the sensors of this machine, and one line for each that it lacks."""
    sensors: list[Sensor] = []
    missing: list[str] = []
    for make in _makers():
        try:
            sensors.append(make())
        except SensorMissing as reason:
            missing.append(str(reason))
    return sensors, missing


def _makers() -> list[Callable[[], Sensor]]:
    if is_jetson():
        return [_tegrastats]
    return [
        _gpu,
        lambda: _working(CpuClock(), "CPU clock: the system shows none"),
        lambda: _working(Rapl(), "CPU energy: no readable counter in /sys/class/powercap (it may need root)"),
        lambda: _working(ThermalZones(), "CPU temperature: no readable zone in /sys/class/thermal"),
    ]


def _tegrastats() -> Sensor:
    try:
        return Tegrastats()
    except OSError as error:
        raise SensorMissing(
            f"power, clocks and temperatures: {TEGRASTATS} does not start ({error.strerror})"
        ) from None


def _gpu() -> Sensor:
    if find_gpu() is None:
        raise SensorMissing("GPU power, clocks and memory: this machine has no NVIDIA GPU")
    if find_spec("pynvml") is None:
        raise SensorMissing(
            'GPU power, clocks and memory: nvidia-ml-py is missing; pip install "trio-edge[profile]"'
        )
    from trio_edge.profiling.measure.sensors.nvml import Nvml, NvmlUnavailable

    try:
        return Nvml()
    except NvmlUnavailable as error:
        raise SensorMissing(f"GPU power, clocks and memory: {error}") from None


def _working(sensor: Sensor, missing: str) -> Sensor:
    if sensor.read():
        return sensor
    sensor.close()
    raise SensorMissing(missing)
