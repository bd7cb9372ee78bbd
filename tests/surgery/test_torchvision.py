"""Four torchvision networks as PyTorch exports them, half of the channels closed behind every activation.

The same code as `benchmarks.bar_surgery_exact`, which does it with all eighteen.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="networks are exported from PyTorch")
pytest.importorskip("torchvision", reason="networks are torchvision's")

from benchmarks.bar_surgery_exact import check

NETWORKS = {  # quick to export; with the share of their MACs that is left
    "squeezenet1_1": 0.323,  # Concat
    "resnet18": 0.428,  # residual streams
    "mnasnet1_0": 0.272,  # depthwise
    "convnext_tiny": 0.534,  # LayerNormalization, MatMul, channels on the last axis
}


@pytest.mark.parametrize("name", NETWORKS)
def test_independent_gates_behind_every_activation(name: str, tmp_path: Path) -> None:
    row = check(name, tmp_path)
    assert row["exact"], row["difference"]
    assert not row["faults"]
    assert row["macs"][1] / row["macs"][0] == pytest.approx(NETWORKS[name], abs=1e-3)
