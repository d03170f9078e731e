"""Sensors: lines that devices printed, folders as Linux lays them out, and what becomes of a machine that lacks them."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trio_edge.profiling.measure.machine_info import parse_power_mode
from trio_edge.profiling.measure.sensors import tegrastats as sensor_tegrastats
from trio_edge.profiling.measure.sensors.cpu import CpuClock, Rapl, ThermalZones
from trio_edge.profiling.measure.sensors.nvml import Nvml
from trio_edge.profiling.measure.sensors.sampling_thread import (
    SamplingThread,
    SensorSample,
    joules,
    open_sensors,
    sensor_ranges,
)
from trio_edge.profiling.measure.sensors.tegrastats import Tegrastats, parse_tegrastats

# As published with the devices' output: JetPack 6 on an AGX Orin and an Orin Nano, a newer release with largest values,
# L4T 32 on a Xavier NX without units.
AGX_ORIN = (
    "05-09-2026 18:42:06 RAM 18207/62841MB (lfb 466x4MB) SWAP 86/31420MB (cached 0MB)"
    " CPU [14%@2188,5%@2112,8%@2036,off] EMC_FREQ 3%@2133 GR3D_FREQ 26%@[306,305] NVENC off APE 174 cv0@-256C"
    " cpu@52.562C soc2@48.437C tj@52.562C VDD_GPU_SOC 2412mW/2400mW VDD_CPU_CV 1607mW/1600mW VIN_SYS_5V0 4707mW/4700mW"
)
ORIN_NANO = (
    "01-27-2026 11:15:02 RAM 2250/7620MB (lfb 3x4MB) SWAP 0/3810MB (cached 0MB) CPU [66%@1728,16%@1728]"
    " GR3D_FREQ 0% cpu@45.968C gpu@45.437C tj@45.968C VDD_IN 4046mW/4236mW VDD_CPU_GPU_CV 720mW/786mW VDD_SOC 1201mW/1261mW"
)
WITH_LARGEST = (
    "10-01-2026 20:36:32 RAM 974/7546MB (lfb 6x4MB) CPU [0%@729,0%@883] GR3D_FREQ 12% cpu@49.843C/50.9C"
    " tj@50.875C/51.2C VDD_IN 4548mW/4549mW/4600mW VDD_SOC 1489mW/1489mW/1489mW"
)
XAVIER_NX = (
    "RAM 2673/7765MB (lfb 118x4MB) SWAP 0/3883MB (cached 0MB) CPU [12%@1190,off] EMC_FREQ 7% GR3D_FREQ 33%"
    " AO@35C GPU@33C PMIC@100C VDD_IN 3902/3611 VDD_CPU_GPU_CV 1331/1180 VDD_SOC 997/941"
)


def test_tegrastats_of_an_agx_orin_sums_its_rails() -> None:
    assert parse_tegrastats(AGX_ORIN) == {
        "memory_mb.module": 18207,
        "clock_mhz.cpu": pytest.approx((2188 + 2112 + 2036) / 3),
        "load_percent.memory": 3,
        "clock_mhz.memory": 2133,
        "load_percent.gpu": 26,
        "clock_mhz.gpu": 306,
        "temperature_c.cpu": 52.562,
        "temperature_c.soc2": 48.437,
        "temperature_c.tj": 52.562,
        "power_w.module": pytest.approx(2.412 + 1.607 + 4.707),
        "power_w.VDD_GPU_SOC": 2.412,
        "power_w.VDD_CPU_CV": 1.607,
        "power_w.VIN_SYS_5V0": 4.707,
    }


@pytest.mark.parametrize(
    ("line", "watts", "temperature", "load"),
    [
        pytest.param(ORIN_NANO, 4.046, ("cpu", 45.968), 0, id="Orin Nano"),
        pytest.param(WITH_LARGEST, 4.548, ("tj", 50.875), 12, id="with largest values"),
        pytest.param(XAVIER_NX, 3.902, ("gpu", 33), 33, id="without units"),
    ],
)
def test_the_input_rail_is_the_modules_power(
    line: str, watts: float, temperature: tuple[str, float], load: float
) -> None:
    readings = parse_tegrastats(line)
    assert readings["power_w.module"] == watts
    assert readings[f"temperature_c.{temperature[0]}"] == temperature[1]
    assert readings["load_percent.gpu"] == load


@pytest.mark.parametrize("line", ["", "tegrastats: permission denied", "RAM", "VDD_IN mW/mW"])
def test_another_line_of_tegrastats_gives_no_reading(line: str) -> None:
    assert parse_tegrastats(line) == {}


def test_tegrastats_is_read_while_it_runs_and_ended_with_the_sensor(tmp_path: Path) -> None:
    command = tmp_path / "tegrastats"
    command.write_text(f'#!/bin/sh\necho "$$" > {tmp_path}/pid\necho "{ORIN_NANO}"\nexec sleep 60\n')
    command.chmod(command.stat().st_mode | stat.S_IEXEC)
    sensor = Tegrastats(command=str(command))
    end = time.monotonic() + 10
    while not sensor.read() and time.monotonic() < end:
        time.sleep(0.01)
    assert sensor.read()["power_w.module"] == 4.046
    sensor.close()
    with pytest.raises(ProcessLookupError, match="No such process"):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def tegrastats_of(folder: Path, script: str) -> Tegrastats:
    (command := folder / "tegrastats").write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)
    return Tegrastats(command=str(command))


def test_a_tegrastats_that_prints_anything_is_read_and_ended_with_all_that_it_started(tmp_path: Path) -> None:
    sensor = tegrastats_of(tmp_path, f"printf '\\377\\n{ORIN_NANO}\\n'; yes | tr -d '\\n'")
    end = time.monotonic() + 10
    while not sensor.read() and time.monotonic() < end:
        time.sleep(0.01)
    sensor.close()  # the pipe's writer is a child


def test_a_tegrastats_that_stops_printing_shows_nothing_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sensor = tegrastats_of(tmp_path, f'echo "{ORIN_NANO}"')
    end = time.monotonic() + 10
    while not sensor.read() and time.monotonic() < end:
        time.sleep(0.01)
    assert sensor.read()["power_w.module"] == 4.046
    monkeypatch.setattr(sensor_tegrastats, "_STALE_SECONDS", 0.0)
    assert sensor.read() == {}
    sensor.close()


def test_a_device_without_tegrastats_says_so() -> None:
    with pytest.raises(OSError, match="No such file"):
        Tegrastats(command="/no/tegrastats")


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("NV Power Mode: MAXN\n0\n", "MAXN (0)"),
        ("NVPM VERB: Current mode: NV Power Mode: MODE_30W\n2\n", "MODE_30W (2)"),
        ("NV Fan Mode:quiet\nNV Power Mode: 15W\n", "15W"),
        ("sudo: a password is required", None),
    ],
)
def test_the_power_mode_is_what_nvpmodel_says(text: str, mode: str | None) -> None:
    assert parse_power_mode(text) == mode


def write(root: Path, files: dict[str, str]) -> Path:
    """Write files below ``root`` and return it."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_cpu_clocks_come_from_cpufreq_before_cpuinfo(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\ncpu MHz\t\t: 2000.5\nprocessor\t: 1\ncpu MHz\t\t: 1000.5\n")
    assert CpuClock(sys=tmp_path, cpuinfo=cpuinfo).read() == {"clock_mhz.cpu": 1500.5}
    cores = {f"devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq": "3200000\n" for core in range(2)}
    assert CpuClock(sys=write(tmp_path, cores), cpuinfo=cpuinfo).read() == {"clock_mhz.cpu": 3200}
    assert CpuClock(sys=tmp_path / "none", cpuinfo=tmp_path / "none").read() == {}


def test_rapl_counts_on_when_its_counter_starts_again(tmp_path: Path) -> None:
    zone = "class/powercap/intel-rapl:0"
    write(
        tmp_path,
        {
            f"{zone}/name": "package-0\n",
            f"{zone}/energy_uj": "900000000",
            f"{zone}/max_energy_range_uj": "1000000000",
            "class/powercap/intel-rapl:0:0/energy_uj": "5",  # a part of the package, not counted twice
        },
    )
    rapl = Rapl(sys=tmp_path)
    write(tmp_path, {f"{zone}/energy_uj": "950000000"})
    assert rapl.read() == {"energy_j.package-0": 50.0}
    write(tmp_path, {f"{zone}/energy_uj": "20000000"})
    assert rapl.read() == {"energy_j.package-0": 120.0}


def test_of_zones_with_one_name_the_hottest_counts(tmp_path: Path) -> None:
    zones = {"0": ("cpu-thermal", "51500"), "1": ("cpu-thermal", "55000"), "2": ("acpitz", "fails")}
    for number, (name, value) in zones.items():
        folder = f"class/thermal/thermal_zone{number}"
        write(tmp_path, {f"{folder}/type": f"{name}\n", f"{folder}/temp": value})
    assert ThermalZones(sys=tmp_path).read() == {"temperature_c.cpu-thermal": 55.0}


class _NVMLError(Exception):
    pass


def fake_nvml(**changes: Any) -> SimpleNamespace:
    """Return functions with the names and units of pynvml; no machine of ours has the real ones."""

    def refuse(*_: Any) -> float:
        raise _NVMLError("Not Supported")

    functions = {
        "NVMLError": _NVMLError,
        "NVML_CLOCK_SM": "sm",
        "NVML_CLOCK_MEM": "memory",
        "NVML_TEMPERATURE_GPU": "core",
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetPowerUsage": lambda _: 71_500,
        "nvmlDeviceGetTotalEnergyConsumption": refuse,
        "nvmlDeviceGetClockInfo": lambda _, kind: {"sm": 1410, "memory": 2619}[kind],
        "nvmlDeviceGetTemperature": lambda _, kind: {"core": 42}[kind],
        "nvmlDeviceGetMemoryInfo": lambda _: SimpleNamespace(used=5_000_000_000),
        "nvmlDeviceGetUtilizationRates": lambda _: SimpleNamespace(gpu=87),
        "refuse": refuse,
    }
    return SimpleNamespace(**functions | changes)


def test_nvml_leaves_out_what_a_gpu_does_not_offer() -> None:
    assert Nvml(nvml=fake_nvml()).read() == {
        "power_w.gpu": 71.5,
        "clock_mhz.gpu": 1410,
        "clock_mhz.memory": 2619,
        "temperature_c.gpu": 42,
        "memory_mb.gpu": 5000,
        "load_percent.gpu": 87,
    }


def test_a_driver_without_nvml_is_told_in_its_own_words() -> None:
    with pytest.raises(OSError, match="Not Supported"):
        Nvml(nvml=fake_nvml(nvmlInit=fake_nvml().refuse))


def test_the_real_nvml_opens_a_gpu_or_says_that_it_cannot() -> None:
    try:
        sensor = Nvml()
    except OSError as reason:
        assert str(reason)
        return
    assert "temperature_c.gpu" in sensor.read()
    sensor.close()


def test_each_missing_sensor_is_one_line() -> None:
    sensors, missing = open_sensors()
    for sensor in sensors:
        assert sensor.read()
        sensor.close()
    assert all(line and "\n" not in line for line in missing)


class _Ramp:
    """Shows how often it was read, as power, and says when it was closed."""

    name = "ramp"

    def __init__(self) -> None:
        self.reads, self.closed = 0, False

    def read(self) -> dict[str, float]:
        self.reads += 1
        return {"power_w.board": float(self.reads)}

    def close(self) -> None:
        self.closed = True


def test_sampling_ends_with_its_block_and_closes_the_sensors() -> None:
    sensor = _Ramp()
    with (
        pytest.raises(KeyboardInterrupt, match="stop"),
        SamplingThread([sensor], interval_seconds=0.001) as sampling,
    ):
        while len(sampling.samples) < 3:
            time.sleep(0.001)
        raise KeyboardInterrupt("stop")
    count = sensor.reads
    time.sleep(0.01)
    assert (sensor.reads, sensor.closed) == (count, True)
    assert [sample.readings["power_w.board"] for sample in sampling.samples] == list(range(1, count + 1))


class _Broken:
    """Fails at its second reading, and when it is closed."""

    name = "broken"

    def __init__(self) -> None:
        self.reads = 0

    def read(self) -> dict[str, float]:
        self.reads += 1
        if self.reads == 2:
            raise RuntimeError("the driver has gone")
        return {"power_w.broken": 1.0}

    def close(self) -> None:
        raise RuntimeError("closed twice")


class _Silent:
    name = "silent"

    def read(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass


def test_a_sensor_that_fails_is_one_line_and_the_others_go_on() -> None:
    broken, ramp = _Broken(), _Ramp()
    with SamplingThread([broken, ramp, _Silent()], interval_seconds=0.001) as sampling:
        while len(sampling.samples) < 4:
            time.sleep(0.001)
    assert (broken.reads, ramp.closed) == (2, True)
    assert ramp.reads == len(sampling.samples)
    assert sampling.lost == [
        "broken: failed after 1 readings (the driver has gone)",
        "silent: gave no reading",
    ]


def test_energy_that_was_not_measured_to_the_end_is_left_out() -> None:
    samples = [
        SensorSample(float(second), {"power_w.module": 4.0} | ({"power_w.gpu": 2.0} if second < 3 else {}))
        for second in range(10)
    ]
    assert joules(samples, [(0.5, 1.0), (8.0, 9.0)]) == {"module": pytest.approx(6.0)}


def test_energy_of_a_window_is_interpolated_between_readings_of_a_counter() -> None:
    samples = [
        SensorSample(float(second), {"energy_j.cpu": 10.0 * second, "power_w.cpu": 99.0})
        for second in range(5)
    ]
    assert joules(samples, [(0.5, 1.0), (2.0, 3.5)]) == {"cpu": pytest.approx(20.0)}


def test_energy_without_a_counter_is_integrated_power() -> None:
    samples = [SensorSample(0.0, {"power_w.module": 4.0}), SensorSample(2.0, {"power_w.module": 8.0})]
    assert joules(samples, [(0.0, 2.0)]) == {"module": pytest.approx(12.0)}


def test_one_reading_gives_no_energy() -> None:
    assert joules([SensorSample(0.0, {"power_w.module": 4.0})], [(0.0, 2.0)]) == {}


def test_ranges_are_of_the_runs_alone_and_counters_have_none() -> None:
    samples = [SensorSample(float(t), {"clock_mhz.cpu": 100.0 * t, "energy_j.cpu": 1.0}) for t in range(5)]
    ((name, found),) = sensor_ranges(samples, start=1.0, end=3.0).items()
    assert (name, found.least, found.mean, found.most) == ("clock_mhz.cpu", 100, 200, 300)
