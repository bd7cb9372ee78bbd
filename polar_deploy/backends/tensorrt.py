"""TensorRT, and TensorRT for RTX: one API under two names."""

from __future__ import annotations

from dataclasses import dataclass

from polar_deploy import gpu
from polar_deploy.backends import onnx_runtime
from polar_deploy.backends.base import PLAN, Backend, GpuSupport, Package, numbers

_POLYGRAPHY = Package("polygraphy", ("polygraphy",), "0.49")  # that of NVIDIA's containers
_SINCE_11 = "0.53.4"  # older ones break on TensorRT 11
_CUDA = Package("cuda.bindings", ("cuda-bindings",), "12.6")
_WHEELS = ("tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu13-bindings", "tensorrt-cu12-bindings")


@dataclass(frozen=True, eq=False)
class TensorRT(Backend):
    """One of the two libraries.

    Attributes:
        shared_library: how the name of its file begins; the file tells its version.
        jit: whether kernels are chosen and compiled where the plan runs, so that building needs no GPU, times nothing,
            and is for several architectures at once.
    """

    shared_library: str = "libnvinfer.so"
    jit: bool = False

    @property
    def module(self) -> str:
        """Name of its Python module."""
        return self.packages[0].module

    def lacks_to_build(self, precision: str) -> list[str]:
        """As `Backend.lacks_to_build`; how old Polygraphy may be depends on the library."""
        lacking = super().lacks_to_build(precision)
        library, polygraphy = (each.installed() or "" for each in (self.packages[0], _POLYGRAPHY))
        if lacking or numbers(library) < (11,) or numbers(polygraphy) >= numbers(_SINCE_11):
            return lacking
        return [f"polygraphy is {polygraphy}, older than {_SINCE_11}, which {self.library} {library} takes"]

    def lacks_to_run(self, precision: str) -> list[str]:
        """As `Backend.lacks_to_run`; what CUDA's bindings ask of the driver counts, too."""
        lacking = super().lacks_to_run(precision)
        driver = None if lacking else _driver_too_old()
        return [driver] if driver else lacking


def _driver_too_old() -> str | None:
    """Why the installed cuda-bindings are none for this driver: CUDA 13's ask for a driver of CUDA 13."""
    bindings, driver = _CUDA.installed() or "", gpu.cuda_version()
    if numbers(bindings)[:1] <= numbers(driver)[:1]:
        return None
    major = numbers(driver)[0]
    return f"cuda-bindings is {bindings}, the driver knows CUDA {driver} (pip install 'cuda-bindings<{major + 1}')"


TRT = TensorRT(
    name="trt",
    library="TensorRT",
    runtime="trt",
    extra="trt",
    align={"fp32": 1, "fp16": 8, "bf16": 8, "int8": 32},
    packages=(Package("tensorrt", ("tensorrt", *_WHEELS), "10.0"), _CUDA),
    build_packages=(_POLYGRAPHY, onnx_runtime.PACKAGE),  # ONNX Runtime writes FP16 and INT8 graphs
    artefact=PLAN,
    int8="tensorrt",
    gpu=GpuSupport(since=(7, 5)),
    triton="tensorrt",
)
RTX = TensorRT(
    name="rtx",
    library="TensorRT for RTX",
    runtime="trt",
    extra="rtx",
    align={"fp32": 1, "fp16": 8, "int8": 32},
    packages=(Package("tensorrt_rtx", ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"), "1.1"), _CUDA),
    build_packages=(Package("polygraphy", ("polygraphy",), _SINCE_11), onnx_runtime.PACKAGE),
    artefact=PLAN,
    int8="tensorrt",
    # none of the GPUs for data centres
    gpu=GpuSupport(since=(7, 5), never=frozenset({(9, 0), (10, 0), (10, 3)}), to_build=False),
    shared_library="libtensorrt_rtx.so",
    jit=True,
)
