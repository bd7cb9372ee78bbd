"""INT8 weights of 7 bits, where 8 would overflow in the runtime's kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from polar_deploy import cpu, engines, precision, targets
from polar_deploy.config import Build
from polar_deploy.precision import calibration, saturation
from polar_deploy.precision.proof import Kernels
from polar_deploy.precision.qdq import OPENVINO, ORT, Scheme
from polar_deploy.tensors import Arrays
from tests.precision.kinds import KINDS, SIDE
from tests.support.residual import saved

BATCH = np.random.default_rng(2).standard_normal((32, 3, SIDE, SIDE), np.float32)


def as_written(model: onnx.ModelProto, samples: Arrays, path: Path) -> Mapping[str, np.ndarray]:
    return calibration.outputs(model, samples, path)


def overflowing(model: onnx.ModelProto, samples: Arrays, path: Path) -> Mapping[str, np.ndarray]:
    """What a kernel gives that adds two products of bytes in 16 bits, of a network in which all bytes are the largest.

    127 and 255 make 64770 of two, which is cut off at 32767; 64 and 255 make 32640.
    """
    weights = [numpy_helper.to_array(each) for each in model.graph.initializer]
    largest = max(int(np.abs(each).max()) for each in weights if each.dtype == np.int8 and each.ndim > 1)
    kept = min(1.0, 32767 / (2 * 255 * largest))
    return {name: kept * value for name, value in as_written(model, samples, path).items()}


def largest_weights(said: Path) -> set[int]:
    """The largest magnitude in each matrix and kernel of a typed file."""
    values = [numpy_helper.to_array(each) for each in onnx.load(said).graph.initializer]
    return {int(np.abs(each).max()) for each in values if each.dtype == np.int8 and each.ndim > 1}


@pytest.mark.parametrize("scheme", [ORT, OPENVINO], ids=["onnxruntime", "openvino"])
def test_kernels_that_overflow_are_told_from_those_that_do_not(scheme: Scheme) -> None:
    assert not saturation.saturates(Kernels("exact", as_written), scheme)
    assert saturation.saturates(Kernels("16 bits", overflowing), scheme)
    assert not saturation.saturates(Kernels("16 bits", overflowing), replace(scheme, largest=saturation.LARGEST))


@pytest.mark.parametrize("target", ["ort-int8", "ov-int8"])
def test_kernels_here_overflow_where_the_cpu_is_x86_without_vnni(target: str) -> None:
    instructions = cpu.instructions()
    if "avx2" not in instructions:
        pytest.skip("not an x86 CPU with AVX2, or its instructions are not known")
    parsed = targets.parse(target)
    kernels = engines.kernels(parsed)
    assert kernels is not None
    scheme = {"onnxruntime": ORT, "openvino": OPENVINO}[parsed.backend.int8]
    assert saturation.saturates(kernels, scheme) == instructions.isdisjoint({"avx512_vnni", "avx_vnni"})


@pytest.mark.parametrize(
    ("asked", "kernels", "largest"),
    [
        (None, as_written, 127),
        (None, overflowing, 64),
        (None, None, 127),
        (True, as_written, 64),
        (True, None, 64),
        (False, None, 127),
    ],
)
def test_weights_have_seven_bits_where_that_is_asked_for_or_needed(
    asked: bool | None, kernels: object, largest: int, tmp_path: Path
) -> None:
    source = saved(KINDS["what_lies_between"](), tmp_path / "source.onnx")
    told = None if kernels is None else Kernels("a runtime", kernels)
    typed = tmp_path / "typed.onnx"
    target, options = targets.parse("ort-int8"), Build(reduce_range=asked)
    said = precision.write(source, typed, target, options, {"input": BATCH}, told)
    assert said.calibration["reduce_range"] == (largest == 64)
    assert largest_weights(typed) == {largest}
