"""Backends: the runtimes that engines are built for, one file each. What can be told of one without importing it.

`polar_deploy.engines` has the other half, which imports the library and builds, loads and runs engines.
"""

from __future__ import annotations

from polar_deploy.backends.base import GRAPH, PLAN, Artefact, Backend, Package
from polar_deploy.backends.onnx_runtime import ORT, ORT_CUDA, ORT_RTX, ORT_TRT
from polar_deploy.backends.openvino import OPENVINO
from polar_deploy.backends.tensorrt import RTX, TRT

__all__ = ["BACKENDS", "GRAPH", "PLAN", "Artefact", "Backend", "Package"]

BACKENDS: tuple[Backend, ...] = (ORT, ORT_CUDA, TRT, RTX, OPENVINO, ORT_TRT, ORT_RTX)
