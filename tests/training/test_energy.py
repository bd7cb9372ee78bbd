"""Joules of a run, from counters as Linux shows them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polar_deploy.training.energy import Meter

CPU = torch.device("cpu")


def _zone(powercap: Path, zone: str, name: str, microjoules: int) -> Path:
    folder = powercap / zone
    folder.mkdir(parents=True)
    (folder / "name").write_text(name + "\n")
    (folder / "max_energy_range_uj").write_text("10000000\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    return folder / "energy_uj"


def test_packages_and_memory_count_once(tmp_path: Path) -> None:
    package = _zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    core = _zone(tmp_path, "intel-rapl:0:0", "core", 0)  # inside of the package
    memory = _zone(tmp_path, "intel-rapl:0:1", "dram", 500_000)
    platform = _zone(tmp_path, "intel-rapl:1", "psys", 0)  # around it
    meter = Meter(CPU, tmp_path)
    for counter, value in ((package, 3_000_000), (core, 900_000), (memory, 700_000), (platform, 9_000_000)):
        counter.write_text(f"{value}\n")
    assert meter.read() == pytest.approx(2.2)
    assert meter.read() == 0


def test_a_counter_that_starts_again_goes_on(tmp_path: Path) -> None:
    package = _zone(tmp_path, "intel-rapl:0", "package-0", 9_000_000)
    meter = Meter(CPU, tmp_path)
    package.write_text("500000\n")
    assert meter.read() == pytest.approx(1.5)


def test_where_nothing_is_counted_there_is_no_figure(tmp_path: Path) -> None:
    assert Meter(CPU, tmp_path).read() is None
