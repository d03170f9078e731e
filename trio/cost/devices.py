"""Target devices: memory, bandwidth and peak rates, each value with its source. Plain data, no torch.

``trio-export --target`` compares a bundle with the memory; predictions of times use the rates. Rates are dense (not
sparse) peaks of the GPU alone, without a Jetson's DLAs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from trio_edge.runtime.bundle.errors import TargetError, did_you_mean
from trio_edge.runtime.bundle.fp8 import fp8_refusal

if TYPE_CHECKING:
    from collections.abc import Mapping

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Source:
    """The origin of a value."""

    text: str
    status: Literal["verified", "third-party", "derived", "unverified"]
    """Read in the vendor's or a device's own output; read in somebody else's table; concluded; or not checked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceSpec:
    """One device."""

    name: str
    memory_bytes: int
    """Nominal size. On a Jetson, CPU and GPU share it."""
    reserve_bytes: int
    """Memory that is never free for engines: firmware carve-outs, operating system, CUDA context."""
    bandwidth_bytes_per_s: float
    fp16_flops: float
    """Dense tensor-core FLOP/s with float16 inputs and float32 sums."""
    int8_ops: float
    """Dense tensor-core operations/s."""
    fp8_flops: float | None
    """Dense tensor-core FLOP/s with FP8 inputs and float32 sums; None for a GPU without FP8."""
    compute_capability: tuple[int, int]
    tensorrt: tuple[str, ...]
    """Releases of its JetPacks; empty if any release can be installed."""
    sources: dict[str, Source]

    @property
    def usable_bytes(self) -> int:
        """Memory that weights, KV caches and activations can share."""
        return self.memory_bytes - self.reserve_bytes

    def refusal(self, formats: Mapping[Any, str | None], *, option: str = "--target") -> str | None:
        """Return one line, for ``option``, that says why this device cannot run ``formats``; None if it can."""
        major, minor = self.compute_capability
        return fp8_refusal(formats, capability=10 * major + minor, where=option, device=self.name)

    def is_verified(self, field: str) -> bool:
        """Whether the vendor or a device itself gives the value of ``field``."""
        return self.sources[field].status == "verified"


_NO_FP8 = Source("FP8 came with compute capability 8.9", "derived")
_TWICE_FP16 = Source("twice the float16 rate, as on the RTX 4090", "derived")
_ASSUMED = "assumed: about {} GiB of carve-outs and 1.5 GiB for a system without desktop"
_RATE_RULE = "SMs x clock x 2048 float16 FLOP (4096 int8 operations), the rule that gives the 64 GB module its 170 sparse TOPS"
_AGX_BANDWIDTH = Source(
    "a public table of device rates; 256 bits of LPDDR5 at 6400 MT/s give the same", "third-party"
)
_RTX_4090 = Source("waredb.com/processor/nvidia-geforce-rtx-4090", "third-party")
_SPEC_SHEET = Source("the vendor's published specification, not checked", "unverified")
_ORIN = {
    "memory_bytes": Source("the module's name", "verified"),
    "fp8_flops": _NO_FP8,
    "compute_capability": Source(
        "CUDA deviceQuery of an Orin NX: capability 8.7; the other Orin modules have the same GPU generation",
        "derived",
    ),
    "tensorrt": Source(
        "JetPack 6.1 and 6.2: docs.pytorch.org/TensorRT/getting_started/jetpack.html; 7.2: TensorRT Edge-LLM's"
        " performance page",
        "verified",
    ),
}
_GEFORCE = {
    **dict.fromkeys(("memory_bytes", "bandwidth_bytes_per_s", "fp16_flops"), _SPEC_SHEET),
    "reserve_bytes": Source("assumed: 1 GiB for the display, the driver and the CUDA context", "unverified"),
    "compute_capability": Source("its architecture's; tensorrt-rtx 1.7 builds for it", "derived"),
    "tensorrt": Source("tensorrt-rtx is a Python package; no JetPack decides", "verified"),
}
_SOURCES: dict[str, dict[str, Source]] = {
    "jetson-agx-orin-64": {
        **_ORIN,
        "reserve_bytes": Source(_ASSUMED.format(3), "unverified"),
        "bandwidth_bytes_per_s": _AGX_BANDWIDTH,
        "fp16_flops": Source(
            "half of 170 sparse int8 TOPS of the GPU: NVIDIA's technical brief, quoted at mzph.cn/web/30785.shtml, and"
            " the README of NVIDIA/Deep-Learning-Accelerator-SW",
            "derived",
        ),
    },
    "jetson-agx-orin-32": {
        **_ORIN,
        "reserve_bytes": Source(_ASSUMED.format(2), "unverified"),
        "bandwidth_bytes_per_s": _AGX_BANDWIDTH,
        "fp16_flops": Source(
            "14 SMs at 0.93 GHz (6.66 TFLOPS without tensor cores: huggingface/huggingface.js#1333);"
            f" {_RATE_RULE}",
            "derived",
        ),
    },
    "jetson-orin-nx-16": {
        **_ORIN,
        "reserve_bytes": Source(
            "deviceQuery sees 15189422080 bytes (gist atinfinity/8cede915acda05d0ff427c09604735dd), less 1.5 GiB assumed"
            " for a system without desktop",
            "derived",
        ),
        "bandwidth_bytes_per_s": Source(
            "techpowerup.com, quoted in huggingface/huggingface.js#1333", "third-party"
        ),
        "fp16_flops": Source(
            f"8 SMs at 0.918 GHz (deviceQuery, not the faster Super mode); {_RATE_RULE}", "derived"
        ),
    },
    "jetson-orin-nano-8": {
        **_ORIN,
        "reserve_bytes": Source(_ASSUMED.format(0.6), "unverified"),
        "bandwidth_bytes_per_s": Source(
            "Super mode: golemfactory/yagna#3405 quotes NVIDIA's page (68 GB/s without it)", "third-party"
        ),
        "fp16_flops": Source(
            f"8 SMs at 1.02 GHz in Super mode (67 sparse int8 TOPS); {_RATE_RULE}", "derived"
        ),
    },
    "rtx-3090": {**_GEFORCE, "fp8_flops": _NO_FP8},
    "rtx-4060": {**_GEFORCE, "fp8_flops": _TWICE_FP16},
    "rtx-4090": {
        **_GEFORCE,
        **dict.fromkeys(("memory_bytes", "bandwidth_bytes_per_s", "fp16_flops", "fp8_flops"), _RTX_4090),
    },
    "rtx-5090": {**_GEFORCE, "fp8_flops": _TWICE_FP16},
}
"""By device and field; int8 rates have the source of float16 rates."""
_NUMBERS: dict[str, tuple[int, float, float, float, float, float | None, tuple[int, int]]] = {
    # GiB, GiB of the reserve, bandwidth, rates of float16, int8 and FP8, compute capability
    "jetson-agx-orin-64": (64, 4.5, 204.8e9, 42.5e12, 85e12, None, (8, 7)),
    "jetson-agx-orin-32": (32, 3.5, 204.8e9, 26.7e12, 53.4e12, None, (8, 7)),
    "jetson-orin-nx-16": (16, 3.4, 102.4e9, 15e12, 30e12, None, (8, 7)),
    "jetson-orin-nano-8": (8, 2.1, 102e9, 16.7e12, 33.4e12, None, (8, 7)),
    "rtx-3090": (24, 1, 936e9, 71e12, 284e12, None, (8, 6)),
    "rtx-4060": (8, 1, 272e9, 30e12, 121e12, 60e12, (8, 9)),
    "rtx-4090": (24, 1, 1008e9, 165.2e12, 660.6e12, 330.3e12, (8, 9)),
    "rtx-5090": (32, 1, 1792e9, 209.5e12, 838e12, 419e12, (12, 0)),
}
DEVICES: dict[str, DeviceSpec] = {
    name: DeviceSpec(
        name=name,
        memory_bytes=memory * GIB,
        reserve_bytes=int(reserve * GIB),
        bandwidth_bytes_per_s=bandwidth,
        fp16_flops=fp16,
        int8_ops=int8,
        fp8_flops=fp8,
        compute_capability=capability,
        tensorrt=("10.3", "10.16") if capability == (8, 7) else (),
        sources={**_SOURCES[name], "int8_ops": _SOURCES[name]["fp16_flops"]},
    )
    for name, (memory, reserve, bandwidth, fp16, int8, fp8, capability) in _NUMBERS.items()
}


def find_device(name: str, *, option: str = "--target") -> DeviceSpec:
    """Return the device called ``name``, with or without "jetson-".

    Raises:
        TargetError: If there is none; the message starts with ``option`` and lists all names.
    """
    known = DEVICES.get(name) or DEVICES.get(f"jetson-{name}")
    if known is not None:
        return known
    names = sorted(DEVICES)
    known_names = [*names, *(entry.removeprefix("jetson-") for entry in names)]
    hint = did_you_mean(name, known_names, otherwise="choose one of these")
    raise TargetError(f"{option}: expected one of {', '.join(names)}, got {name!r}; {hint}")
