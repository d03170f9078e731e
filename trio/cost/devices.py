"""Target devices: memory, bandwidth and peak rates, each value with its source. Plain data, no torch.

``trio-export --target`` compares a bundle with the memory; predictions of times use the rates. Rates are dense (not
sparse) peaks of the GPU alone, without a Jetson's DLAs.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from trio_edge.runtime.bundle.errors import TargetError
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


_verified = partial(Source, status="verified")
_third_party = partial(Source, status="third-party")
_derived = partial(Source, status="derived")
_unverified = partial(Source, status="unverified")

_NAME = _verified("the module's name")
_SM87 = _derived(
    "CUDA deviceQuery of an Orin NX: capability 8.7; the other Orin modules have the same GPU generation"
)
_NO_FP8 = _derived("FP8 came with compute capability 8.9")
_TWICE_FP16 = _derived("twice the float16 rate, as on the RTX 4090")
_JETPACK = _verified(
    "JetPack 6.1 and 6.2: docs.pytorch.org/TensorRT/getting_started/jetpack.html; 7.2: TensorRT Edge-LLM's performance page"
)
_ORIN_TENSORRT = ("10.3", "10.16")
_RATE_RULE = "SMs x clock x 2048 float16 FLOP (4096 int8 operations), the rule that gives the 64 GB module its 170 sparse TOPS"
_AGX_BANDWIDTH = _third_party("a public table of device rates; 256 bits of LPDDR5 at 6400 MT/s give the same")
_DISCRETE_RESERVE = _unverified("assumed: 1 GiB for the display, the driver and the CUDA context")
_SPEC_SHEET = _unverified("the vendor's published specification, not checked")
_RTX_4090 = _third_party("waredb.com/processor/nvidia-geforce-rtx-4090")


def _orin(
    name: str,
    *,
    memory_gib: int,
    reserve_gib: float,
    reserve: Source,
    bandwidth: tuple[float, Source],
    fp16_flops: float,
    rates: Source,
) -> DeviceSpec:
    """Return an Orin module, whose int8 rate is twice its float16 rate."""
    return DeviceSpec(
        name=name,
        memory_bytes=memory_gib * GIB,
        reserve_bytes=int(reserve_gib * GIB),
        bandwidth_bytes_per_s=bandwidth[0],
        fp16_flops=fp16_flops,
        int8_ops=2 * fp16_flops,
        fp8_flops=None,
        compute_capability=(8, 7),
        tensorrt=_ORIN_TENSORRT,
        sources={
            "memory_bytes": _NAME,
            "reserve_bytes": reserve,
            "bandwidth_bytes_per_s": bandwidth[1],
            "fp16_flops": rates,
            "int8_ops": rates,
            "fp8_flops": _NO_FP8,
            "compute_capability": _SM87,
            "tensorrt": _JETPACK,
        },
    )


def _geforce(
    name: str,
    *,
    memory_gib: int,
    bandwidth: float,
    fp16_flops: float,
    int8_ops: float,
    fp8: tuple[float | None, Source],
    compute_capability: tuple[int, int],
    source: Source,
) -> DeviceSpec:
    """Return a GeForce card; ``source`` is that of all values but the FP8 rate."""
    fields = ("memory_bytes", "bandwidth_bytes_per_s", "fp16_flops", "int8_ops")
    return DeviceSpec(
        name=name,
        memory_bytes=memory_gib * GIB,
        reserve_bytes=GIB,
        bandwidth_bytes_per_s=bandwidth,
        fp16_flops=fp16_flops,
        int8_ops=int8_ops,
        fp8_flops=fp8[0],
        compute_capability=compute_capability,
        tensorrt=(),
        sources={
            **dict.fromkeys(fields, source),
            "fp8_flops": fp8[1],
            "reserve_bytes": _DISCRETE_RESERVE,
            "compute_capability": _derived("its architecture's; tensorrt-rtx 1.7 builds for it"),
            "tensorrt": _verified("tensorrt-rtx is a Python package; no JetPack decides"),
        },
    )


_ALL = (
    _orin(
        "jetson-agx-orin-64",
        memory_gib=64,
        reserve_gib=4.5,
        reserve=_unverified("assumed: about 3 GiB of carve-outs and 1.5 GiB for a system without desktop"),
        bandwidth=(204.8e9, _AGX_BANDWIDTH),
        fp16_flops=42.5e12,
        rates=_derived(
            "half of 170 sparse int8 TOPS of the GPU: NVIDIA's technical brief, quoted at mzph.cn/web/30785.shtml, and"
            " the README of NVIDIA/Deep-Learning-Accelerator-SW"
        ),
    ),
    _orin(
        "jetson-agx-orin-32",
        memory_gib=32,
        reserve_gib=3.5,
        reserve=_unverified("assumed: about 2 GiB of carve-outs and 1.5 GiB for a system without desktop"),
        bandwidth=(204.8e9, _AGX_BANDWIDTH),
        fp16_flops=26.7e12,
        rates=_derived(
            f"14 SMs at 0.93 GHz (6.66 TFLOPS without tensor cores: huggingface/huggingface.js#1333); {_RATE_RULE}"
        ),
    ),
    _orin(
        "jetson-orin-nx-16",
        memory_gib=16,
        reserve_gib=3.4,
        reserve=_derived(
            "deviceQuery sees 15189422080 bytes (gist atinfinity/8cede915acda05d0ff427c09604735dd), less 1.5 GiB assumed"
            " for a system without desktop"
        ),
        bandwidth=(102.4e9, _third_party("techpowerup.com, quoted in huggingface/huggingface.js#1333")),
        fp16_flops=15.0e12,
        rates=_derived(f"8 SMs at 0.918 GHz (deviceQuery, not the faster Super mode); {_RATE_RULE}"),
    ),
    _orin(
        "jetson-orin-nano-8",
        memory_gib=8,
        reserve_gib=2.1,
        reserve=_unverified("assumed: about 0.6 GiB of carve-outs and 1.5 GiB for a system without desktop"),
        bandwidth=(
            102.0e9,
            _third_party("Super mode: golemfactory/yagna#3405 quotes NVIDIA's page (68 GB/s without it)"),
        ),
        fp16_flops=16.7e12,
        rates=_derived(f"8 SMs at 1.02 GHz in Super mode (67 sparse int8 TOPS); {_RATE_RULE}"),
    ),
    _geforce(
        "rtx-3090",
        memory_gib=24,
        bandwidth=936e9,
        fp16_flops=71e12,
        int8_ops=284e12,
        fp8=(None, _NO_FP8),
        compute_capability=(8, 6),
        source=_SPEC_SHEET,
    ),
    _geforce(
        "rtx-4060",
        memory_gib=8,
        bandwidth=272e9,
        fp16_flops=30e12,
        int8_ops=121e12,
        fp8=(60e12, _TWICE_FP16),
        compute_capability=(8, 9),
        source=_SPEC_SHEET,
    ),
    _geforce(
        "rtx-4090",
        memory_gib=24,
        bandwidth=1008e9,
        fp16_flops=165.2e12,
        int8_ops=660.6e12,
        fp8=(330.3e12, _RTX_4090),
        compute_capability=(8, 9),
        source=_RTX_4090,
    ),
    _geforce(
        "rtx-5090",
        memory_gib=32,
        bandwidth=1792e9,
        fp16_flops=209.5e12,
        int8_ops=838e12,
        fp8=(419e12, _TWICE_FP16),
        compute_capability=(12, 0),
        source=_SPEC_SHEET,
    ),
)
DEVICES: dict[str, DeviceSpec] = {device.name: device for device in _ALL}


def find_device(name: str, *, option: str = "--target") -> DeviceSpec:
    """Return the device called ``name``, with or without "jetson-".

    Raises:
        TargetError: If there is none; the message starts with ``option`` and lists all names.
    """
    known = DEVICES.get(name) or DEVICES.get(f"jetson-{name}")
    if known is not None:
        return known
    names = sorted(DEVICES)
    near = difflib.get_close_matches(name, [*names, *(entry.removeprefix("jetson-") for entry in names)], n=1)
    hint = f"did you mean {near[0]}?" if near else "choose one of these"
    raise TargetError(f"{option}: expected one of {', '.join(names)}, got {name!r}; {hint}")
