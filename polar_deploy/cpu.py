"""What Linux says about the CPU here."""

from __future__ import annotations

from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


def info(*keys: str) -> str:
    """The first line of Linux's description of the CPU that has one of the keys; "" where there is none."""
    if _CPUINFO.is_file():
        for line in _CPUINFO.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in keys:
                return value.strip()
    return ""


def instructions() -> set[str]:
    """The names of its extensions, such as "avx512_vnni" on x86 and "asimddp" on ARM."""
    return set(info("flags", "Features").split())
