"""The machine: its processor, operating system, GPU and driver. Engines depend on all of them."""

from __future__ import annotations

import ctypes
import platform
import re
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trio_edge.runtime.bundle.errors import install_command

_CUDA_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_TEGRA = Path("/etc/nv_tegra_release")
_DRIVER = Path("/proc/driver/nvidia/version")
_NAME_BYTES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """The first GPU of a machine."""

    name: str
    compute_capability: int
    """Ten times the major number plus the minor one: 87 is 8.7."""
    memory_bytes: int
    driver: str
    """Version of the kernel driver, if known, and the CUDA version that it supports."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The machine that engines are built or run on."""

    machine: str
    """"x86_64" or "aarch64"."""
    system: str
    """"Linux" or "Windows"."""
    gpu: Gpu | None

    @property
    def platform(self) -> str:
        """Machine and system in one word, such as "aarch64-linux"."""
        return f"{self.machine}-{self.system}".lower()


def find_host() -> Host:
    """Return the machine that this process runs on."""
    machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    return Host(machine=machine, system=platform.system(), gpu=find_gpu())


def is_jetson() -> bool:
    """Return whether this is a Jetson with JetPack."""
    return _TEGRA.exists()


def l4t_release() -> str | None:
    """Return the release of Jetson Linux, such as "36.4.3" (JetPack 6.2); None on other machines."""
    return found_in(_TEGRA, r"R(\d+) \(release\), REVISION: ([\d.]+)")


def found_in(file: Path, pattern: str) -> str | None:
    """Return the groups of the first match in a text, with dots between them; None without the file or a match."""
    try:
        found = re.search(pattern, file.read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else ".".join(found.groups())


def memory_bytes() -> int | None:
    """Return the machine's memory; None if it is not known."""
    return _meminfo().get("MemTotal")


def available_memory_bytes() -> int | None:
    """Return the memory that new processes can have without swapping; None if it is not known."""
    return _meminfo().get("MemAvailable")


def whole_memory_bytes() -> int | None:
    """Return all memory of the machine, including swap; None if it is not known."""
    info = _meminfo()
    return info["MemTotal"] + info.get("SwapTotal", 0) if "MemTotal" in info else None


def process_bytes(name: str) -> int | None:
    """Return a size of this process by its name in Linux's ``/proc/self/status``: "VmRSS" is resident, "VmHWM" its peak."""
    found = found_in(Path("/proc/self/status"), rf"^{name}:\s+(\d+) kB")
    return None if found is None else 1024 * int(found)


def _meminfo() -> dict[str, int]:
    """Return the numbers of Linux's ``/proc/meminfo`` in bytes; an empty dict on other systems."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return {}
    return {name: 1024 * int(count) for name, count in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}


def cuda_problem() -> str | None:
    """Return why this process cannot use a GPU, or None if it can."""
    if find_gpu() is None:
        return "expected an NVIDIA GPU and its driver on this machine, got none; use --backend onnxruntime"
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        return f"expected cuda-python to be installed, it is not; run {install_command('gpu')}"
    return None


def find_gpu(library: str = _CUDA_LIBRARY) -> Gpu | None:
    """Return the first GPU that the CUDA driver ``library`` shows, or None without driver or GPU.

    Asks the driver through ctypes, because the driver is there before any package is installed.
    """
    try:
        return _first_gpu(ctypes.CDLL(library))
    except OSError:
        return None


def _first_gpu(cuda: ctypes.CDLL) -> Gpu | None:
    device, major, minor, version = (ctypes.c_int() for _ in range(4))
    name, memory = ctypes.create_string_buffer(_NAME_BYTES), ctypes.c_size_t()
    calls: tuple[tuple[str, tuple[Any, ...]], ...] = (
        ("cuInit", (0,)),
        ("cuDeviceGet", (ctypes.byref(device), 0)),
        ("cuDeviceGetAttribute", (ctypes.byref(major), _MAJOR, device)),
        ("cuDeviceGetAttribute", (ctypes.byref(minor), _MINOR, device)),
        ("cuDeviceGetName", (name, _NAME_BYTES, device)),
        ("cuDeviceTotalMem_v2", (ctypes.byref(memory), device)),
        ("cuDriverGetVersion", (ctypes.byref(version),)),
    )
    if any(getattr(cuda, function)(*arguments) != 0 for function, arguments in calls):
        return None
    cuda_version = f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"
    kernel = _kernel_driver()
    return Gpu(
        name=name.value.decode(errors="replace"),
        compute_capability=10 * major.value + minor.value,
        memory_bytes=memory.value,
        driver=cuda_version if kernel is None else f"{kernel} ({cuda_version})",
    )


def _kernel_driver() -> str | None:
    return found_in(_DRIVER, r"Kernel Module.*?\s(\d+\.[\d.]+)")
