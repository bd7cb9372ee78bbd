"""OpenVINO, on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

from polar_deploy import cpu
from polar_deploy.backends import onnx_runtime
from polar_deploy.backends.base import Backend, Package, triton_instances

_BF16 = {"amx_bf16", "avx512_bf16"}


@dataclass(frozen=True, eq=False)
class OpenVino(Backend):
    """OpenVINO with its plugin for CPUs."""

    def lacking_hardware(self, precision: str) -> str | None:
        """As `Backend.lacking_hardware`: BF16 without instructions for it is FP32 that is rounded, and slower."""
        if precision == "bf16" and not _BF16 & cpu.instructions():
            return f"the CPU has no BF16 ({' or '.join(sorted(_BF16))} is needed)"
        return None

    def triton_settings(self, *, threads: int, tf32: bool) -> list[str]:
        """As `Backend.triton_settings`: left to itself, OpenVINO takes all cores."""
        settings = {"INFERENCE_NUM_THREADS": str(threads), "NUM_STREAMS": "1", "PERFORMANCE_HINT": "LATENCY"}
        written = [f'{{ key: "{key}" value {{ string_value: "{value}" }} }}' for key, value in settings.items()]
        return [triton_instances("CPU"), f"parameters [ {', '.join(written)} ]"]

    def triton_notes(self, precision: str) -> list[str]:
        """As `Backend.triton_notes`: of the precisions, Triton's backend can be told BF16 only."""
        if precision == "bf16":
            return []
        return [
            f"Triton's OpenVINO backend cannot be told to keep FP32: on a CPU with {' or '.join(sorted(_BF16))} it "
            f"computes FP32 layers in BF16; --backend {onnx_runtime.ORT.triton} serves FP32 as such"
        ]


# A convolution's time grows in steps of 16 outputs in each precision (2026.4 on AMX: 24 channels cost what 32 do).
OPENVINO = OpenVino(
    name="ov",
    library="OpenVINO",
    runtime="openvino",
    extra="openvino",
    align={"fp32": 16, "bf16": 16, "int8": 16},
    packages=(Package("openvino", ("openvino",), "2025.0"),),
    build_packages=(onnx_runtime.PACKAGE,),  # writes BF16 and INT8 graphs, and proves them
    int8="openvino",
    triton="openvino",
)
