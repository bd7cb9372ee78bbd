"""INT8 kernels of the device that compute something else than the graphs of a bundle say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polar_deploy.bundle import device, kernels
from polar_deploy.bundle.read import Bundle, opened
from polar_deploy.precision import saturation
from polar_deploy.tensors import Arrays
from tests.support.bundles import write_bundle

INT8 = Path(__file__).parent / "data/format-1.zip"


@dataclass
class Stretched:
    """An engine whose outputs are too large, or too small."""

    engine: Any
    factor: float

    @property
    def batches(self) -> tuple[int, int | None]:
        return self.engine.batches

    def infer(self, inputs: Arrays) -> dict[str, np.ndarray]:
        return {name: self.factor * value for name, value in self.engine.infer(inputs).items()}


@pytest.fixture(scope="module")
def bundle() -> Iterator[tuple[Bundle, dict[str, Any]]]:
    with opened(INT8) as read, device.open_engines(read, device.Options()) as here:
        yield read, here.engines


def test_kernels_that_compute_the_graph_pass(bundle: tuple[Bundle, dict[str, Any]]) -> None:
    judged = kernels.judge(*bundle)
    assert judged is not None
    assert judged.result == "pass"


@pytest.mark.parametrize("factor", [0.9, 1.1])
@pytest.mark.parametrize("overflow", [True, False])
def test_kernels_that_are_off_by_a_tenth_fail(
    bundle: tuple[Bundle, dict[str, Any]], factor: float, overflow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The golden samples allow a quarter."""
    monkeypatch.setattr(saturation, "saturates", lambda *_: overflow)
    read, engines = bundle
    judged = kernels.judge(read, engines | {"compressed": Stretched(engines["compressed"], factor)})
    assert judged is not None
    assert judged.result == "fail"
    assert "move the compressed network's outputs by 0.1 of their size" in judged.reason
    assert ("--set build.reduce_range=true" in judged.reason) == overflow


@pytest.mark.parametrize("target", ["ort-fp32", "trt-int8"])
def test_there_is_nothing_to_judge(target: str, tmp_path: Path) -> None:
    with opened(write_bundle(tmp_path / "bundle", target)) as read:
        assert kernels.judge(read, {"compressed": object()}) is None
        assert kernels.judge(read, {}) is None
