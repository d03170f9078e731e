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
from trio_edge.profiling.measure.sensors.tegrastats import Tegrastats
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
        raise OSError('nvidia-ml-py is missing; pip install "trio-edge[profile]"')
    from trio_edge.profiling.measure.sensors.nvml import Nvml

    return Nvml()


def _working(sensor: Sensor, missing: str) -> Sensor:
    if not sensor.read():
        raise OSError(missing)
    return sensor
