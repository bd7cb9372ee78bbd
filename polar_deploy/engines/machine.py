"""What kind of machine measured: enough to judge a figure by, nothing that tells whose machine it is."""

from __future__ import annotations

import os
import platform

from polar_deploy import cpu
from polar_deploy.documents.parity import Machine

_DOT_PRODUCTS = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"}  # x86 and ARM


def describe() -> Machine:
    """This one: cores are those that this process may use. No host and no user name."""
    return Machine(cpu=_cpu_model(), cores=cores(), architecture=platform.machine(), system=platform.system())


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def int8_instructions() -> list[str]:
    """The CPU's instructions for dot products of bytes, without which INT8 gains little, and weights get 7 bits."""
    return sorted(_DOT_PRODUCTS & cpu.instructions())


def _cpu_model() -> str:
    """As Linux gives it; ARM boards often give none there, then the architecture has to do."""
    return cpu.info("model name", "Model") or platform.processor() or platform.machine()
