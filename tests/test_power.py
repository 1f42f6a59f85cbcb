"""Energy of a test: tegrastats' lines, a process that prints them, NVML's counter and its samples, and who measures where.

The lines are as the tool prints them on the boards named; no board and no GPU was at hand.
"""

from __future__ import annotations

import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

from mythos_export import meters, tegrastats
from mythos_export.power import Integral, Stopwatch, measure
from runtimes import cuda
from runtimes.errors import BackendError

LINES = {
    "AGX Orin, JetPack 5": (
        "04-24-2023 00:01:24 RAM 1282/62795MB (lfb 15152x4MB) SWAP 0/31398MB (cached 0MB) CPU [0%@729,0%@729,off,off] "
        "EMC_FREQ 0%@2133 GR3D_FREQ 0%@0 GR3D2_FREQ 0%@0 VIC_FREQ 729 APE 174 CV0@-256C CPU@42.593C Tboard@32C "
        "SOC2@39.343C tj@42.593C VDD_GPU_SOC 2399mW/2399mW VDD_CPU_CV 400mW/400mW VIN_SYS_5V0 4032mW/4032mW NC 0mW/0mW "
        "VDDQ_VDD2_1V8AO 301mW/301mW NC 0mW/0mW",
        (2.399 + 0.4 + 4.032, 1282 << 20, 0.0),
    ),
    "AGX Orin, JetPack 6": (
        "05-09-2026 18:42:06 RAM 18207/62841MB (lfb 466x4MB) SWAP 86/31420MB (cached 0MB) CPU [14%@2188,5%@2112] EMC_FREQ 3%@2133 "
        "GR3D_FREQ 97%@[1300,1300] NVENC 79%@166 NVDEC off VIC 36%@115 OFA off PVA0_FREQ off APE 174 cpu@52.562C tj@52.562C "
        "VDD_GPU_SOC 22412mW/18412mW VDD_CPU_CV 1607mW/1607mW VIN_SYS_5V0 4707mW/4707mW",
        (22.412 + 1.607 + 4.707, 18207 << 20, 0.97),
    ),
    "Orin Nano": (
        "11-15-2024 08:38:09 RAM 6185/7620MB (lfb 8x2MB) SWAP 851/3810MB (cached 1MB) CPU [15%@729,11%@729] EMC_FREQ 43%@2133 "
        "GR3D_FREQ 63%@[621] NVDEC off APE 200 cpu@53.968C gpu@53.343C VDD_IN 12479mW/12479mW VDD_CPU_GPU_CV 4667mW/4667mW "
        "VDD_SOC 2817mW/2817mW",
        (12.479, 6185 << 20, 0.63),
    ),
    "AGX Xavier, JetPack 5": (
        "RAM 3000/31919MB (lfb 5x4MB) CPU [0%@1190,1%@1190] EMC_FREQ 0%@1331 GR3D_FREQ 12%@114 VIC_FREQ 115 APE 150 AUX@36C "
        "GPU@35C PMIC@50C GPU 467mW/467mW CPU 467mW/467mW SOC 1245mW/1245mW CV 0mW/0mW VDDRQ 311mW/311mW SYS5V 2768mW/2768mW",
        (0.467 + 0.467 + 1.245 + 0.311 + 2.768, 3000 << 20, 0.12),
    ),
    "AGX Xavier, JetPack 4": (
        "RAM 1545/31919MB (lfb 7400x4MB) SWAP 2/15959MB (cached 1MB) CPU [0%@1190,1%@1190] EMC_FREQ 1%@408 GR3D_FREQ 12%@318 "
        "AO@38C GPU@39.5C thermal@38.8C GPU 120/100 CPU 468/450 SOC 937/900 CV 0/0 VDDRQ 312/234 SYS5V 1458/1400",
        (0.12 + 0.468 + 0.937 + 0.312 + 1.458, 1545 << 20, 0.12),
    ),
    "Nano": (
        "RAM 1041/3956MB (lfb 505x4MB) SWAP 0/1978MB (cached 0MB) IRAM 0/252kB(lfb 252kB) CPU [8%@102,2%@102,0%@102,0%@102] "
        "EMC_FREQ 2%@1600 GR3D_FREQ 40%@76 APE 25 PLL@26C CPU@28.5C PMIC@100C GPU@28C AO@34C thermal@28.25C "
        "POM_5V_IN 2591/2503 POM_5V_GPU 120/40 POM_5V_CPU 280/252",
        (2.591, 1041 << 20, 0.4),
    ),
    "Thor": (
        "11-20-2026 09:00:00 RAM 9000/125772MB (lfb 2x4MB) SWAP 0/0MB (cached 0MB) CPU [1%@972,0%@972] EMC_FREQ 0%@4266 "
        "GR3D_FREQ 0%@[0,0,0] cpu@40.2C tj@41.5C VDD_GPU 0mW/0mW VDD_CPU_SOC_MSS 6510mW/6500mW VIN_SYS_5V0 6520mW/6510mW "
        "VIN 23000mW/22800mW",
        (23.0, 9000 << 20, 0.0),
    ),
    "no rail": ("RAM 100/200MB (lfb 1x4MB) CPU [off,1%@102]", (None, 100 << 20, None)),
}  # fmt: skip


@pytest.mark.parametrize("board", LINES)
def test_lines(board: str) -> None:
    line, (watts, ram, gpu) = LINES[board]
    found = tegrastats.parse(line)
    assert found.watts == (None if watts is None else pytest.approx(watts))
    assert (found.ram_bytes, found.gpu) == (ram, gpu)
    assert not {"RAM", "SWAP", "IRAM", "EMC_FREQ"} & set(found.rails)


def install_tool(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    tool = folder / tegrastats.COMMAND
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_a_process_is_read_as_it_goes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    line = LINES["Orin Nano"][0]
    install_tool(
        monkeypatch, tmp_path, f'test "$1 $2" = "--interval 100" || exit 3\nwhile echo "{line}"; do sleep 0.05; done'
    )
    meter, problem = meters.find_meter(on_device=False)
    assert meter is not None, problem
    try:
        before, began = meter.joules(), time.perf_counter()
        time.sleep(0.2)
        used, seconds = meter.joules() - before, time.perf_counter() - began
        assert used == pytest.approx(12.479 * seconds, rel=0.05)
        assert meter.about() == {"ram_bytes": 6185 << 20, "gpu_utilisation": 0.63}
    finally:
        meter.close()
    meter.close()


@pytest.mark.parametrize(
    ("script", "message"),
    [("exit 1", "it printed nothing"), ("echo RAM 1/2MB; exec sleep 5", "a line without a rail: RAM 1/2MB")],
)
def test_a_tool_that_says_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, message: str) -> None:
    install_tool(monkeypatch, tmp_path, script)
    meter, problem = meters.find_meter(on_device=True)
    assert meter is None
    assert problem == f"tegrastats says nothing of power: {message}"


class FakeNvml(types.ModuleType):
    """pynvml of a GPU that draws 250 W. counts: whether it counts its energy; powered: whether it tells its power."""

    class NVMLError(Exception):
        pass

    class NVMLError_NotSupported(NVMLError):
        pass

    def __init__(self, counts: bool, powered: bool = True) -> None:
        super().__init__("pynvml")
        self.counts, self.powered, self.open = counts, powered, 0

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetHandleByPciBusId(self, bus: bytes) -> str:
        assert bus == b"0000:17:00.0"
        return "the GPU"

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu: str) -> int:
        if not self.counts:
            raise self.NVMLError_NotSupported("no counter")
        return int(time.perf_counter() * 250 * 1000)

    def nvmlDeviceGetPowerUsage(self, gpu: str) -> int:
        if not self.powered:
            raise self.NVMLError_NotSupported("no power")
        return 250_000


@pytest.mark.parametrize("counts", [True, False])
def test_nvml(monkeypatch: pytest.MonkeyPatch, counts: bool) -> None:
    nvml = FakeNvml(counts)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(cuda, "pci_bus_id", lambda: "0000:17:00.0")
    monkeypatch.setattr("mythos_export.power._SECONDS", 0.1)
    monkeypatch.setattr("shutil.which", lambda _: None)
    meter, problem = meters.find_meter(on_device=True)
    assert meter is not None, problem

    def test(watch: Stopwatch) -> None:
        time.sleep(0.01)  # not of the test
        with watch:
            time.sleep(0.02)

    power = measure(meter, test)
    assert power.watts == pytest.approx(250, rel=0.1)
    assert 250 * 0.02 < power.joules < 250 * 0.05
    assert ("counter" in power.source) == counts
    meter.close()
    meter.close()
    assert nvml.open == 0


def test_no_meter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert meters.find_meter(on_device=False)[1] == "power is measured of GPUs and of Jetsons, not of this CPU"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    meter, problem = meters.find_meter(on_device=True)
    assert meter is None
    assert "pip install 'mythos-export[profile]'" in str(problem)
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(counts=False, powered=False))
    monkeypatch.setattr(cuda, "pci_bus_id", lambda: "0000:17:00.0")
    assert meters.find_meter(on_device=True)[1] == "NVML tells nothing of this GPU's power: no power"

    def no_gpu() -> Any:
        raise BackendError("no GPU can be used")

    monkeypatch.setattr(cuda, "pci_bus_id", no_gpu)
    assert meters.find_meter(on_device=True)[1] == "no GPU can be used"


def test_samples_hold_until_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 4.0])
    monkeypatch.setattr("mythos_export.power.time.perf_counter", lambda: next(clock))
    integral = Integral()
    integral.add(10.0)  # at 1
    integral.add(20.0)  # at 3
    assert integral.joules() == 10.0 * 2 + 20.0 * 1
