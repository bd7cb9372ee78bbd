"""ONNX Runtime, on the CPU or on an NVIDIA GPU."""

from __future__ import annotations

from dataclasses import dataclass

from polar_deploy.backends.base import Backend, GpuSupport, Package, triton_instances

_OLDEST = "1.19"
PACKAGE = Package("onnxruntime", ("onnxruntime", "onnxruntime-gpu"), _OLDEST)


@dataclass(frozen=True, eq=False)
class OnnxRuntime(Backend):
    """ONNX Runtime with its provider for the CPU, or for CUDA where `gpu` is set."""

    def triton_settings(self, *, threads: int, tf32: bool) -> list[str]:
        """As `Backend.triton_settings`: left to itself, ONNX Runtime takes all cores, and TF32 on a GPU."""
        if self.gpu is None:
            parameter = f'key: "intra_op_thread_count" value {{ string_value: "{threads}" }}'
            return [triton_instances("CPU"), f"parameters {{ {parameter} }}"]
        parameter = f'parameters {{ key: "use_tf32" value: "{int(tf32)}" }}'
        accelerator = f'gpu_execution_accelerator [ {{ name: "cuda" {parameter} }} ]'
        return [triton_instances("GPU"), f"optimization {{ execution_accelerators {{ {accelerator} }} }}"]


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
    packages=(Package("onnxruntime", ("onnxruntime-gpu",), _OLDEST),),
    gpu=GpuSupport(since=(5, 0)),
    triton="onnxruntime",
)
