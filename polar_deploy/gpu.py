"""What the NVIDIA driver says about the GPUs here, asked by ctypes: nothing is imported that may abort without a GPU.

Most of this file runs only where there is a GPU, so it is left out of the coverage figure.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute of the driver API


@dataclass(frozen=True)
class Gpu:
    """One GPU: its name, and its compute capability, such as (9, 0)."""

    name: str
    capability: tuple[int, int]


class NoGpuError(Exception):
    """There is no driver, no GPU, or the driver does not answer: the message says which."""


def first() -> Gpu:
    """Describe the GPU that CUDA would use (the first one; CUDA_VISIBLE_DEVICES is respected), or raise NoGpuError."""
    return _describe(_driver(), 0)


def every() -> list[Gpu]:
    """Describe all GPUs that CUDA sees, at least one, or raise NoGpuError."""
    driver, count = _driver(), ctypes.c_int()
    _ask(driver, "cuDeviceGetCount", ctypes.byref(count))
    return [_describe(driver, index) for index in range(count.value)]


def cuda_version() -> str:
    """The newest CUDA that the driver knows, such as "12.8", or raise NoGpuError."""
    version = ctypes.c_int()
    _ask(_driver(), "cuDriverGetVersion", ctypes.byref(version))
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def _driver() -> ctypes.CDLL:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise NoGpuError("no NVIDIA driver (libcuda.so.1 is not found)") from error
    _ask(driver, "cuInit", 0)
    return driver


def _describe(driver: ctypes.CDLL, index: int) -> Gpu:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(128)
    _ask(driver, "cuDeviceGet", ctypes.byref(device), index)
    _ask(driver, "cuDeviceGetName", name, len(name), device)
    _ask(driver, "cuDeviceGetAttribute", ctypes.byref(major), _CAPABILITY_MAJOR, device)
    _ask(driver, "cuDeviceGetAttribute", ctypes.byref(minor), _CAPABILITY_MINOR, device)
    return Gpu(name.value.decode(errors="replace"), (major.value, minor.value))


def _ask(driver: ctypes.CDLL, function: str, *arguments: object) -> None:
    code = getattr(driver, function)(*arguments)
    if code != 0:
        reason = ctypes.c_char_p()
        driver.cuGetErrorString(code, ctypes.byref(reason))
        raise NoGpuError(f"no NVIDIA GPU answers (the driver says: {(reason.value or b'unknown error').decode()})")
