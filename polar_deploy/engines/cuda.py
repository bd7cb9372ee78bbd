"""The little of CUDA's runtime that running and timing an engine takes. Through cuda-bindings, no torch.

Whatever is made here is owned by an `ExitStack`, which frees it in reverse order. Errors while freeing are ignored:
they stem from an earlier call that has raised already, and must not hide its error.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import numpy.typing as npt

from polar_deploy import extras
from polar_deploy.errors import MachineError

_TODO = {
    "cudaErrorMemoryAllocation": "end what else uses the GPU, or build with a smaller largest batch (--batch)",
    "cudaErrorInsufficientDriver": "install the cuda-bindings of the driver's CUDA, such as `cuda-bindings<13`, or "
    "a newer driver; `polar-deploy engines doctor` says what is here",
}
_ELSE = "see what the driver says (`nvidia-smi`, `dmesg`), then run again"


def call(function: str, *arguments: Any) -> Any:
    """Call a function of CUDA's runtime by its name; return the value it gives, None if it gives none.

    Raises:
        MachineError: it fails; names the function and gives CUDA's own text.
    """
    error, *values = getattr(_runtime(), function)(*arguments)
    _require(error, function, arguments)
    return values[0] if values else None


def stream(owner: ExitStack) -> Any:
    """A stream that waits for no other one: work on the default stream could not be captured."""
    made = call("cudaStreamCreateWithFlags", _runtime().cudaStreamNonBlocking)
    owner.callback(_runtime().cudaStreamDestroy, made)
    return made


def event(owner: ExitStack) -> Any:
    """A point in a stream whose time the device notes."""
    made = call("cudaEventCreate")
    owner.callback(_runtime().cudaEventDestroy, made)
    return made


def device(owner: ExitStack, size: int) -> int:
    """The address of `size` bytes of the GPU's memory."""
    address = int(call("cudaMalloc", size))
    owner.callback(_runtime().cudaFree, address)
    return address


def pinned(owner: ExitStack, shape: tuple[int, ...], kind: type[np.generic]) -> npt.NDArray[Any]:
    """An array in the host's memory that the GPU can copy from and to by itself. Not to be used once it is freed."""
    size = math.prod(shape) * np.dtype(kind).itemsize
    address = int(call("cudaMallocHost", size))
    owner.callback(_runtime().cudaFreeHost, address)
    return np.ctypeslib.as_array((ctypes.c_ubyte * size).from_address(address)).view(kind).reshape(shape)


def send(host: npt.NDArray[Any], address: int, stream: Any) -> None:
    """Put a copy of a pinned array to the GPU's `address` on the stream."""
    kind = _runtime().cudaMemcpyKind.cudaMemcpyHostToDevice
    call("cudaMemcpyAsync", address, host.ctypes.data, host.nbytes, kind, stream)


def fetch(address: int, host: npt.NDArray[Any], stream: Any) -> None:
    """Put a copy from the GPU's `address` into a pinned array on the stream."""
    kind = _runtime().cudaMemcpyKind.cudaMemcpyDeviceToHost
    call("cudaMemcpyAsync", host.ctypes.data, address, host.nbytes, kind, stream)


def graph(owner: ExitStack, stream: Any, enqueue: Callable[[], bool]) -> Callable[[], None] | None:
    """Record what `enqueue` puts on a stream and return what launches the record; None if it cannot be recorded.

    Args:
        owner: frees the record.
        stream: an idle stream, not the default one.
        enqueue: puts work on it and says whether it could.
    """
    runtime = _runtime()
    call("cudaStreamBeginCapture", stream, runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
    enqueued = enqueue()
    error, captured = runtime.cudaStreamEndCapture(stream)  # which has to be, whatever became of the work
    executable = None
    if not error and captured is not None:
        if enqueued:
            error, executable = runtime.cudaGraphInstantiate(captured, 0)
        runtime.cudaGraphDestroy(captured)
    if error or executable is None:
        runtime.cudaGetLastError()  # else the library finds this error and takes it for its own
        return None
    owner.callback(_runtime().cudaGraphExecDestroy, executable)
    launch = runtime.cudaGraphLaunch

    def run() -> None:
        (error,) = launch(executable, stream)
        if error:
            _require(error, "cudaGraphLaunch", ())

    return run


def _runtime() -> Any:
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        what = f"cuda-bindings cannot be imported: {error}"
        raise MachineError(what, f"install it, {extras.install('gpu')}") from error
    return runtime


def _require(error: Any, function: str, arguments: tuple[Any, ...]) -> None:
    """Raise MachineError unless `error` is none."""
    if not error:
        return
    _, text = _runtime().cudaGetErrorString(error)
    size = f" of {arguments[0] / 2**20:.1f} MiB" if function in ("cudaMalloc", "cudaMallocHost") else ""
    raise MachineError(
        f"{function}{size} failed: CUDA says {text.decode()} ({error.name})", _TODO.get(error.name, _ELSE)
    )
