"""What the inspector says about an engine is read right, and an engine that is not what it claims is refused.

The inspector's words (keys, formats, kernels) are those of real engines: TensorRT 8.6 to 10.x as quoted in
NVIDIA/TensorRT issues 2418 (FP16 pooling), 3583 (TF32), 4020 (INT8, reformats), 4397 (Myelin) and the developer guide's
section on the engine inspector. Layers' names and sizes are made up.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from polar_deploy.documents.layers import Layer
from polar_deploy.engines.trt import proof
from polar_deploy.errors import ContentError

LINEAR, CHANNELS_8 = "Row major linear FP32", "Channel major FP16 format where channel % 8 == 0"
INT8_32, DYNAMIC = "Thirty-two wide channel vectorized row major Int8 format", "N/A due to dynamic shapes"
INT8_KERNEL = (
    "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_nchw_vect_c_32kcrs_vect_c_32_nchw_vect_c_32_"
    "tilesize32x32x64_stage6_warpsize2x2x1_g1_tensor16x8x32_t1r3s3"
)
INT8_TO_FLOAT_KERNEL = "sm80_xmma_fprop_implicit_gemm_interleaved_i8f32_i8i32_f32_nchw_vect_c_32kcrs_vect_c_32_nchw"
TF32_KERNEL = "sm80_xmma_gemm_f32f32_tf32f32_f32_nn_n_tilesize64x128x16_stage4_warpsize2x2x1_tensor16x8x8"
FP16_KERNEL = "sm80_xmma_gemm_f16f16_f16f16_f16_nn_n_tilesize32x32x64_stage6_warpsize2x2x1_tensor16x8x16"


def tensor(text: str, *shape: int) -> dict[str, Any]:
    return {"Name": "t", "Location": "Device", "Dimensions": list(shape or (8, 16, 32, 32)), "Format/Datatype": text}


def convolution(read: str, written: str, weights: str | None = None, tactic: str = "0x4749124f") -> dict[str, Any]:
    stored = {} if weights is None else {"Weights": {"Type": weights, "Count": 2304}}
    return {
        "Name": "layer1.0.conv1 + relu",
        "LayerType": "CaskConvolution",
        "Inputs": [tensor(read)],
        "Outputs": [tensor(written)],
        "ParameterType": "Convolution",
        "Kernel": [3, 3],
        "OutMaps": 16,
        **stored,
        "Bias": {"Type": "Float", "Count": 16},
        "Activation": "RELU",
        "TacticName": tactic,
        "TacticValue": "0x4749124f62d8bd23",
        "StreamId": 0,
        "Metadata": "[ONNX Layer: layer1.0.conv1]\u001e[ONNX Layer: relu]",
    }


REFORMAT = {
    "Name": "Reformatting CopyNode for Input Tensor 0 to layer1.0.conv1 + relu",
    "LayerType": "Reformat",
    "Inputs": [tensor(LINEAR, 8, 3, 32, 32)],
    "Outputs": [tensor(INT8_32, 8, 3, 32, 32)],
    "ParameterType": "Reformat",
    "Origin": "REFORMAT",
    "TacticValue": "0x00000000000003e8",
    "StreamId": 0,
    "Metadata": "",
}
POOLING = {
    "Name": "pool",
    "LayerType": "CaskPooling",
    "Inputs": [tensor(CHANNELS_8, 8, 12, 8, 8)],
    "Outputs": [tensor(CHANNELS_8, 8, 12, 1, 1)],
    "ParameterType": "Pooling",
    "TacticName": "sm50_xmma_pooling_fw_4d_FP16FP32NHWC_Average_FastDiv_GenericWindowWidth_CAlign4",
}
MYELIN = {
    "Name": "fc_myl0_7",
    "LayerType": "gemm",
    "Inputs": [{"Name": "a", "Dimensions": [8, 64], "Format/Datatype": "Half"}],
    "Outputs": [{"Name": "b", "Dimensions": [8, 10], "Format/Datatype": "Float"}],
    "TacticName": "__myl_gemm_0xf2543c36",
    "StreamId": 0,
    "Metadata": "[ONNX Layer: fc]",
}


@pytest.mark.parametrize(
    ("layer", "computes_in"),
    [
        (convolution(INT8_32, INT8_32, "Int8", INT8_KERNEL), "int8"),
        (convolution(INT8_32, LINEAR, "Int8", INT8_TO_FLOAT_KERNEL), "int8"),
        (convolution(INT8_32, CHANNELS_8), "int8"),
        (convolution(CHANNELS_8, INT8_32), "fp16"),  # quantises what it writes
        (convolution(CHANNELS_8, CHANNELS_8, "Half"), "fp16"),
        (convolution(DYNAMIC, DYNAMIC, "Half"), "fp16"),
        (convolution(LINEAR, CHANNELS_8), "fp16"),  # the cast at the edge is fused
        (convolution(LINEAR, LINEAR, "Float", FP16_KERNEL), "fp16"),
        (convolution(LINEAR, LINEAR, "Float"), "fp32"),
        (convolution(LINEAR, LINEAR, "Float", TF32_KERNEL), "tf32"),
        (convolution("BFloat16", "BFloat16"), "bf16"),
        (convolution(DYNAMIC, DYNAMIC), "unknown"),
        (POOLING, "fp16"),
        (MYELIN, "fp16"),
        (REFORMAT, "fp32"),
    ],
)
def test_what_a_layer_computes_in(layer: dict[str, Any], computes_in: str) -> None:
    assert proof.of_inspector({"Layers": [layer]})[0].type == computes_in


def test_a_layer_is_told_with_formats_and_tactic() -> None:
    (layer,) = proof.of_inspector({"Layers": [convolution(INT8_32, CHANNELS_8, "Int8", INT8_KERNEL)]})
    assert layer.as_json() == {
        "name": "layer1.0.conv1 + relu",
        "op": "CaskConvolution",
        "kind": "Convolution",
        "inputs": ["int8"],
        "type": "int8",
        "format": CHANNELS_8,
        "tactic": INT8_KERNEL,
        "padded": 0,
    }


def test_reformats_and_padding_are_counted() -> None:
    layers = proof.of_inspector({"Layers": [REFORMAT, POOLING, MYELIN, REFORMAT]})
    # 3 channels in vectors of 32, twice; 12 in multiples of 8
    assert proof.counts(layers) == proof.Formats(reformats=2, padded_channels=2 * 29 + 4)


CONV = {"op": "CaskConvolution", "kind": "Convolution", "tactic": ""}
RELU = {"op": "PointWiseV2", "kind": "PointWise", "tactic": ""}


def layers(*kinds: str) -> list[Layer]:
    """Convolutions of these types; "relu:fp16" is a layer without weights."""
    made = []
    for index, kind in enumerate(kinds):
        what, _, type_ = kind.rpartition(":")
        made.append(Layer(name=f"layer {index}", inputs=[], type=type_, **(RELU if what else CONV)))
    return made


@pytest.mark.parametrize(
    ("kinds", "precision", "tf32", "found"),
    [
        (["fp16", "fp16", "relu:fp32"], "fp16", False, {"fp16": 2, "fp32": 1}),
        (["int8", "fp16", "int8"], "int8", False, {"int8": 2, "fp16": 1}),
        (["bf16"], "bf16", False, {"bf16": 1}),
        (["fp32", "relu:fp32", "relu:int64"], "fp32", False, {"fp32": 2}),
        (["fp32", "tf32"], "fp32", True, {"fp32": 1, "tf32": 1}),
    ],
)
def test_engine_is_what_it_claims(kinds: list[str], precision: str, tf32: bool, found: dict[str, int]) -> None:
    assert proof.require(layers(*kinds), precision, Path("a.onnx"), tf32=tf32) == found


@pytest.mark.parametrize(
    ("kinds", "precision", "message"),
    [
        (["fp32", "fp32"], "fp16", "a.onnx: no layer of the engine computes in fp16: 2 in fp32"),
        (["fp16", "fp32"], "fp16", "a.onnx: layer 'layer 1' (CaskConvolution) computes in fp32, the target is fp16"),
        (["fp32", "tf32"], "fp32", "a.onnx: layer 'layer 1' (CaskConvolution) computes in tf32, the target is fp32"),
        (["fp32", "relu:fp16"], "fp32", "a.onnx: layer 'layer 1' (PointWiseV2) computes in fp16, the target is fp32"),
        (["fp16", "relu:int8"], "int8", "a.onnx: no layer of the engine computes in int8: 1 in fp16"),
        (["unknown"], "fp16", "a.onnx: no layer of the engine computes in fp16: 1 in unknown"),
        (["relu:fp16"], "fp16", "a.onnx: no layer of the engine computes in fp16: none has weights"),
    ],
)
def test_engine_that_is_not_is_refused(kinds: list[str], precision: str, message: str) -> None:
    with pytest.raises(ContentError) as error:
        proof.require(layers(*kinds), precision, Path("a.onnx"))
    assert error.value.what == message


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (REFORMAT, "computes in fp16: none has weights"),
        (MYELIN | {"LayerType": "kgen", "TacticName": "__myl_AddCastMul_0xf254"}, "computes in fp16: none has weights"),
        (MYELIN | {"LayerType": "kgen", "TacticName": TF32_KERNEL}, "computes in fp16: 1 in tf32"),
    ],
)
def test_what_computes_is_seen_by_type_or_kernel(layer: dict[str, Any], message: str) -> None:
    with pytest.raises(ContentError, match=message):
        proof.require(proof.of_inspector({"Layers": [layer]}), "fp16", Path("a.onnx"))
