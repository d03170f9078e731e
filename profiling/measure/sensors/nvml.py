"""The first NVIDIA GPU's power, energy, clocks, temperature and memory through NVML. The only file that imports pynvml."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import pynvml

if TYPE_CHECKING:
    from collections.abc import Callable


@final
class Nvml:
    """One GPU, without the quantities that it does not offer."""

    name = "NVML"

    def __init__(self, *, nvml: Any = pynvml) -> None:
        """Open the first GPU.

        Raises:
            OSError: If the driver has no NVML or shows no GPU.
        """
        self._nvml = nvml
        try:
            nvml.nvmlInit()
            self._device = nvml.nvmlDeviceGetHandleByIndex(0)
        except nvml.NVMLError as error:
            raise OSError(str(error)) from None
        # checked once: old and small GPUs offer fewer quantities, and each refusal would cost time in every reading
        self._quantities = {
            name: read for name, read in self._all_quantities().items() if self._value(read) is not None
        }

    def _all_quantities(self) -> dict[str, Callable[[], float]]:
        nvml, device = self._nvml, self._device
        return {
            "power_w.gpu": lambda: nvml.nvmlDeviceGetPowerUsage(device) / 1e3,
            "energy_j.gpu": lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(device) / 1e3,
            "clock_mhz.gpu": lambda: nvml.nvmlDeviceGetClockInfo(device, nvml.NVML_CLOCK_SM),
            "clock_mhz.memory": lambda: nvml.nvmlDeviceGetClockInfo(device, nvml.NVML_CLOCK_MEM),
            "temperature_c.gpu": lambda: nvml.nvmlDeviceGetTemperature(device, nvml.NVML_TEMPERATURE_GPU),
            "memory_mb.gpu": lambda: nvml.nvmlDeviceGetMemoryInfo(device).used / 1e6,
            "load_percent.gpu": lambda: nvml.nvmlDeviceGetUtilizationRates(device).gpu,
        }

    def _value(self, read: Callable[[], float]) -> float | None:
        try:
            return float(read())
        except self._nvml.NVMLError:
            return None

    def read(self) -> dict[str, float]:
        """Return the readings of this moment."""
        values = {name: self._value(read) for name, read in self._quantities.items()}
        return {name: value for name, value in values.items() if value is not None}

    def close(self) -> None:
        """Shut NVML down."""
        self._nvml.nvmlShutdown()
