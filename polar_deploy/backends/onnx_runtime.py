"""ONNX Runtime, on the CPU or on an NVIDIA GPU: one backend for each of its execution providers."""

from __future__ import annotations

from dataclasses import dataclass

from polar_deploy.backends.base import Backend, GpuSupport, Package, triton_instances

_OLDEST = "1.19"
PACKAGE = Package("onnxruntime", ("onnxruntime", "onnxruntime-gpu"), _OLDEST)
_GPU_PACKAGE = Package("onnxruntime", ("onnxruntime-gpu",), _OLDEST)
_TENSORRT = ("tensorrt", "tensorrt-cu12", "tensorrt-cu12-libs", "tensorrt-cu13", "tensorrt-cu13-libs")


@dataclass(frozen=True, eq=False)
class OnnxRuntime(Backend):
    """ONNX Runtime with one of its execution providers.

    Attributes:
        provider: its name.
        plugin: the module of a provider that comes in a package of its own, and has to be registered; None: built in.
    """

    provider: str = "CPUExecutionProvider"
    plugin: str | None = None

    def triton_settings(self, *, threads: int, tf32: bool) -> list[str]:
        """As `Backend.triton_settings`: left to itself, ONNX Runtime takes all cores, and TF32 on a GPU."""
        if self.gpu is None:
            parameter = f'key: "intra_op_thread_count" value {{ string_value: "{threads}" }}'
            return [triton_instances("CPU"), f"parameters {{ {parameter} }}"]
        name, key, value = ("cuda", "use_tf32", str(int(tf32))) if self.proves_types else ("tensorrt", *_FP16)
        parameter = f'parameters {{ key: "{key}" value: "{value}" }}'
        accelerator = f'gpu_execution_accelerator [ {{ name: "{name}" {parameter} }} ]'
        return [triton_instances("GPU"), f"optimization {{ execution_accelerators {{ {accelerator} }} }}"]


_FP16 = ("precision_mode", "FP16")

# On a CPU, ONNX Runtime leaves its blocked kernels where a convolution reads more than 16 channels that are no
# multiple of 4, and computes 8 or 16 outputs at a time.
ORT = OnnxRuntime(
    name="ort",
    library="ONNX Runtime",
    runtime="ort",
    extra="ort",
    align={"fp32": 8, "int8": 16},
    packages=(PACKAGE,),
    triton="onnxruntime",
)
ORT_CUDA = OnnxRuntime(
    name="ort-cuda",
    library="ONNX Runtime",
    runtime="ort",
    extra="ort-gpu",
    align={"fp32": 1, "fp16": 8},
    packages=(_GPU_PACKAGE,),
    gpu=GpuSupport(since=(5, 0)),
    triton="onnxruntime",
    provider="CUDAExecutionProvider",
)
# Neither provider says in which type TensorRT computes a layer, nor can either be told to leave TF32 off: so there is
# no FP32 target.
ORT_TRT = OnnxRuntime(
    name="ort-trt",
    library="ONNX Runtime with TensorRT",
    runtime="ort",
    extra="ort-trt",
    align={"fp16": 8},
    packages=(_GPU_PACKAGE, Package("tensorrt", _TENSORRT, "10.0")),
    gpu=GpuSupport(since=(7, 5)),
    triton="onnxruntime",
    provider="TensorrtExecutionProvider",
    proves_types=False,
)
ORT_RTX = OnnxRuntime(
    name="ort-rtx",
    library="ONNX Runtime with TensorRT for RTX",
    runtime="ort",
    extra="ort-rtx",
    align={"fp16": 8},
    packages=(
        Package("onnxruntime", ("onnxruntime",), "1.24"),
        Package(
            "onnxruntime_ep_nv_tensorrt_rtx",
            ("onnxruntime-ep-nv-tensorrt-rtx-cu13", "onnxruntime-ep-nv-tensorrt-rtx-cu12"),
            "0.4",
        ),
    ),
    # none of the GPUs for data centres
    gpu=GpuSupport(since=(8, 6), never=frozenset({(9, 0), (10, 0), (10, 3)})),
    provider="NvTensorRTRTXExecutionProvider",
    plugin="onnxruntime_ep_nv_tensorrt_rtx",
    proves_types=False,
)
