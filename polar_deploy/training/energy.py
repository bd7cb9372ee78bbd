"""Energy that the machine itself counts: RAPL for processors and their memory (Intel, AMD), NVML for the GPU.

It is the whole machine's, other processes included; what has no counter, fans and disks, is not in it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

POWERCAP = Path("/sys/class/powercap")  # docs.kernel.org/power/powercap/powercap.html
_Counter = Callable[[], float]  # joules since some time


class Meter:
    """Joules from one reading to the next.

    Args:
        device: a CUDA device's own counter counts, too.
        powercap: where Linux shows RAPL's counters.
        processors: whether these count; of several processes on a machine only one may count them.
    """

    def __init__(self, device: torch.device, powercap: Path = POWERCAP, *, processors: bool = True) -> None:
        self._counters = [*(_processors(powercap) if processors else ()), *_gpu(device)]
        self._last = [counter() for counter in self._counters]

    def read(self) -> float | None:
        """Joules since the last reading, or since the start; None where nothing is counted."""
        now = [counter() for counter in self._counters]
        used = sum(after - before for before, after in zip(self._last, now, strict=True))
        self._last = now
        return used if self._counters else None


class _Zone:
    """One of RAPL's counters; it starts again at zero after its range, which a busy package takes half an hour for."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "energy_uj"
        self._range = int((folder / "max_energy_range_uj").read_text())
        self._raw, self._turns = self._read(), 0

    def __call__(self) -> float:
        raw = self._read()
        self._turns += raw < self._raw
        self._raw = raw
        return (self._turns * self._range + raw) / 1e6

    def _read(self) -> int:
        return int(self._file.read_text())


def _processors(powercap: Path) -> list[_Counter]:
    """Packages, and their memory, which is no part of them; other zones lie inside of these, or around them.

    Most systems show the counters to root alone: then there are none.
    """
    zones = []
    for folder in sorted(powercap.glob("intel-rapl:*")):
        try:
            if (folder / "name").read_text().strip().partition("-")[0] in ("package", "dram"):
                zones.append(_Zone(folder))
        except PermissionError:
            continue
    return list(zones)


def _gpu(device: torch.device) -> list[_Counter]:
    """The GPU's counter, where it has one and NVML can be asked."""
    if device.type != "cuda":
        return []
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return []
    return [lambda: float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3]
