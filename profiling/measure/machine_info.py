"""The machine: processor, GPU, power mode, load, and the versions of packages that affect its speed."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

from trio_edge.runtime.devices.machine import find_host, found_in, memory_bytes

NVPMODEL = "nvpmodel"
_COMMAND_SECONDS = 5.0
_PACKAGES = (
    "trio-edge", "numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "tokenizers", "pillow",
)  # fmt: skip
_MODULE_NAME = Path("/proc/device-tree/model")
_CPUINFO = Path("/proc/cpuinfo")
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


class MachineReport(msgspec.Struct, frozen=True, kw_only=True):
    """The machine."""

    name: str
    """The module's name on a Jetson, else the processor's."""
    machine: str
    system: str
    cores: int
    memory_bytes: int | None
    gpu: str | None
    gpu_compute_capability: int | None
    gpu_memory_bytes: int | None
    gpu_driver: str | None


def find_machine() -> MachineReport:
    """Return the machine that this process runs on."""
    host = find_host()
    gpu, module = host.gpu, found_in(_MODULE_NAME, r"^([^\0]*[^\s\0])")
    return MachineReport(
        name=module
        or found_in(_CPUINFO, r"^model name\s*:\s*(.*\S)")
        or platform.processor()
        or host.machine,
        machine=host.machine,
        system=f"{host.system} {platform.release()}",
        cores=len(os.sched_getaffinity(0)) if host.system == "Linux" else os.cpu_count() or 1,
        memory_bytes=memory_bytes(),
        gpu=None if gpu is None else gpu.name,
        gpu_compute_capability=None if gpu is None else gpu.compute_capability,
        gpu_memory_bytes=None if gpu is None else gpu.memory_bytes,
        gpu_driver=None if gpu is None else gpu.driver,
    )


def find_versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that affect the speed of a bundle."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def find_power_mode(command: str = NVPMODEL) -> str | None:
    """Return the name of a Jetson's power mode; None elsewhere."""
    if shutil.which(command) is None:
        return None
    try:
        result = subprocess.run(
            [command, "-q"], capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse_power_mode(result.stdout)


def parse_power_mode(text: str) -> str | None:
    """Return the mode that ``nvpmodel -q`` printed, for instance "MAXN (0)"."""
    found = re.search(r"NV Power Mode:[ \t]*(\S.*?)[ \t]*$(?:\s+(\d+))?", text, re.MULTILINE)
    if found is None:
        return None
    return found[1] if found[2] is None else f"{found[1]} ({found[2]})"


def find_governor() -> str | None:
    """Return the CPU frequency governor; None if the kernel shows none."""
    return found_in(_GOVERNOR, r"^(.*\S)")


def load_average() -> float | None:
    """Return the mean number of running processes in the last minute; None if the system does not tell."""
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):
        return None
