"""The state of the GPU that CUDA uses, as NVIDIA's management library (NVML) tells it: what a measurement stands on."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from polar_deploy import gpu
from polar_deploy.documents.parity import Conditions
from polar_deploy.errors import MachineError

# Why clocks are lower than they could be. Left out: being idle, and clocks that somebody has set.
_REASONS = {
    "SwPowerCap": "power cap",
    "HwSlowdown": "hardware slowdown",
    "SyncBoost": "sync boost",
    "SwThermalSlowdown": "software thermal slowdown",
    "HwThermalSlowdown": "hardware thermal slowdown",
    "HwPowerBrakeSlowdown": "power brake",
}


def conditions() -> Conditions:
    """What state the GPU is in now; a Jetson has little of this library, and some GPUs count no energy."""
    read = _reader()
    power = read("nvmlDeviceGetPowerUsage")
    return Conditions(
        name=_name(),
        driver=read("nvmlSystemGetDriverVersion"),
        sm_mhz=read("nvmlDeviceGetClockInfo", "NVML_CLOCK_SM"),
        memory_mhz=read("nvmlDeviceGetClockInfo", "NVML_CLOCK_MEM"),
        power_w=None if power is None else power / 1000,
        temperature_c=read("nvmlDeviceGetTemperature", "NVML_TEMPERATURE_GPU"),
        throttle=_throttle(read("nvmlDeviceGetCurrentClocksThrottleReasons") or 0),
        energy_mj=read("nvmlDeviceGetTotalEnergyConsumption"),
    )


def _throttle(mask: int) -> list[str]:
    if mask == 0:
        return []
    import pynvml

    return [words for name, words in _REASONS.items() if mask & getattr(pynvml, f"nvmlClocksThrottleReason{name}")]


def _name() -> str | None:
    try:
        return gpu.first().name
    except gpu.NoGpuError:
        return None


@cache
def _reader() -> Callable[..., Any]:
    """A function that asks NVML something about the GPU, and gives None where there is no answer."""
    try:
        import pynvml
    except ImportError:
        return lambda *_: None
    try:
        pynvml.nvmlInit()
        device = pynvml.nvmlDeviceGetHandleByPciBusId(_bus_id())
    except (pynvml.NVMLError, MachineError):
        return lambda *_: None

    def read(function: str, *constants: str) -> Any:
        whom = [] if function.startswith("nvmlSystem") else [device]
        try:
            return getattr(pynvml, function)(*whom, *(getattr(pynvml, name) for name in constants))
        except pynvml.NVMLError:
            return None

    return read


def _bus_id() -> bytes:
    """Where CUDA's first GPU sits: NVML counts otherwise, and does not know CUDA_VISIBLE_DEVICES."""
    from polar_deploy.engines import cuda

    bus_id: bytes = cuda.call("cudaDeviceGetPCIBusId", 13, 0)
    return bus_id.partition(b"\0")[0]
