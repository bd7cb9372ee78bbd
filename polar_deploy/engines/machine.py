"""What kind of machine measured: enough to judge a figure by, nothing that tells whose machine it is."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

_CPUINFO = Path("/proc/cpuinfo")


def describe() -> dict[str, Any]:
    """CPU model, cores that this process may use, architecture, operating system. No host and no user name."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "architecture": platform.machine(),
        "system": platform.system(),
    }


def _cpu_model() -> str:
    """As Linux gives it; ARM boards often give none there, then the architecture has to do."""
    if _CPUINFO.is_file():
        for line in _CPUINFO.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in {"model name", "Model"}:
                return value.strip()
    return platform.processor() or platform.machine()
