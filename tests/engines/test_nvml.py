"""The state of the GPU: NVML's numbers and units, its reasons as words, and no error where it does not answer."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from polar_deploy import gpu
from polar_deploy.engines import cuda, nvml
from tests.support.fake_gpu import Cuda, Error

pynvml = pytest.importorskip("pynvml")
UNKNOWN = dict.fromkeys(("name", "driver", "sm_mhz", "memory_mhz", "power_w", "temperature_c", "energy_mj"))


class Library:
    """NVML with one GPU in the right slot; `silent` functions are not supported."""

    def __init__(self, mask: int = 0, silent: tuple[str, ...] = ()) -> None:
        device = "the device"
        clocks = {pynvml.NVML_CLOCK_SM: 1980, pynvml.NVML_CLOCK_MEM: 2619}
        self.functions = {
            "nvmlInit": lambda: None,
            "nvmlDeviceGetHandleByPciBusId": lambda where: {b"0000:65:00.0": device}[where],
            "nvmlSystemGetDriverVersion": lambda: "580.65",
            "nvmlDeviceGetClockInfo": lambda whom, which: {device: clocks}[whom][which],
            "nvmlDeviceGetPowerUsage": lambda whom: {device: 412_345}[whom],
            "nvmlDeviceGetTemperature": lambda whom, which: {(device, pynvml.NVML_TEMPERATURE_GPU): 61}[whom, which],
            "nvmlDeviceGetCurrentClocksThrottleReasons": lambda whom: {device: mask}[whom],
            "nvmlDeviceGetTotalEnergyConsumption": lambda whom: {device: 987_654_321}[whom],
        }
        self.silent = silent

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, function in self.functions.items():
            monkeypatch.setattr(pynvml, name, self._silent if name in self.silent else function)

    def _silent(self, *_: Any) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    made = Cuda()
    monkeypatch.setattr(cuda, "_runtime", lambda: made)
    monkeypatch.setattr(gpu, "first", lambda: gpu.Gpu("NVIDIA H200", (9, 0)))
    nvml._reader.cache_clear()
    yield made
    nvml._reader.cache_clear()


def test_numbers_come_in_their_units(monkeypatch: pytest.MonkeyPatch) -> None:
    Library().install(monkeypatch)
    assert nvml.conditions().as_json() == {
        "name": "NVIDIA H200",
        "driver": "580.65",
        "sm_mhz": 1980,
        "memory_mhz": 2619,
        "power_w": 412.345,
        "temperature_c": 61,
        "throttle": [],
        "energy_mj": 987_654_321,
    }


@pytest.mark.parametrize(
    ("mask", "words"),  # bits as nvml.h has them
    [
        (0x1 | 0x2 | 0x100, []),  # idle, clocks set by somebody, a display
        (0x4, ["power cap"]),
        (0x8 | 0x80, ["hardware slowdown", "power brake"]),
        (0x1 | 0x20, ["software thermal slowdown"]),
        (0x40, ["hardware thermal slowdown"]),
        (0x10, ["sync boost"]),
    ],
)
def test_reasons_become_words(monkeypatch: pytest.MonkeyPatch, mask: int, words: list[str]) -> None:
    Library(mask).install(monkeypatch)
    assert nvml.conditions().throttle == words


@pytest.mark.parametrize(
    ("function", "keys"),
    [
        ("nvmlDeviceGetTotalEnergyConsumption", ["energy_mj"]),
        ("nvmlDeviceGetPowerUsage", ["power_w"]),
        ("nvmlDeviceGetClockInfo", ["sm_mhz", "memory_mhz"]),
        ("nvmlDeviceGetTemperature", ["temperature_c"]),
        ("nvmlDeviceGetCurrentClocksThrottleReasons", []),
        ("nvmlInit", [key for key in UNKNOWN if key != "name"]),
        ("nvmlDeviceGetHandleByPciBusId", [key for key in UNKNOWN if key != "name"]),
    ],
)
def test_what_a_gpu_does_not_tell_is_unknown(monkeypatch: pytest.MonkeyPatch, function: str, keys: list[str]) -> None:
    Library(silent=(function,)).install(monkeypatch)
    found = nvml.conditions().as_json()
    assert [key for key, value in found.items() if value is None] == [key for key in found if key in keys]
    assert found["throttle"] == []


def _without_package(monkeypatch: pytest.MonkeyPatch, device: Cuda) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)


def _without_cuda(monkeypatch: pytest.MonkeyPatch, device: Cuda) -> None:
    Library().install(monkeypatch)
    device.broken["cudaDeviceGetPCIBusId"] = Error.cudaErrorInvalidValue


@pytest.mark.parametrize("lack", [_without_package, _without_cuda])
def test_nothing_is_known_without_library_or_driver(monkeypatch: pytest.MonkeyPatch, device: Cuda, lack: Any) -> None:
    def none() -> gpu.Gpu:
        raise gpu.NoGpuError("no NVIDIA driver")

    monkeypatch.setattr(gpu, "first", none)
    lack(monkeypatch, device)
    assert nvml.conditions().as_json() == {**UNKNOWN, "throttle": []}


def test_the_library_is_opened_once(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = SimpleNamespace(times=0)
    Library().install(monkeypatch)
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: setattr(opened, "times", opened.times + 1))
    assert [nvml.conditions().sm_mhz for _ in range(3)] == [1980] * 3
    assert opened.times == 1
