"""The long checks, run for a moment, so that they keep step with what they check."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import bar_typed_graphs
from polar_deploy import targets


@pytest.mark.parametrize("target", bar_typed_graphs.BOUNDS)
def test_typed_graphs(target: str, tmp_path: Path) -> None:
    found = bar_typed_graphs.trial(1, target, tmp_path)
    if bar_typed_graphs._not_here(targets.parse(target)) is None:
        assert "refused" in found or found["off"] <= bar_typed_graphs.BOUNDS[target], found


def test_typed_graphs_tells_what_was_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bar_typed_graphs.RandomNetwork, "draw", lambda self: 1 / 0)
    assert bar_typed_graphs.trial(0, "ort-int8", tmp_path)["raised"] == "ZeroDivisionError: division by zero"
