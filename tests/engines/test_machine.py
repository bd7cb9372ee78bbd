from __future__ import annotations

import getpass
import platform
from pathlib import Path

import pytest

from polar_deploy import cpu
from polar_deploy.engines import machine


def test_cpu_is_read_from_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(cpu, "_CPUINFO", cpuinfo)
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Some CPU @ 2.0 GHz\nmodel\t: 85\n")
    assert machine.describe().cpu == "Some CPU @ 2.0 GHz"
    cpuinfo.write_text("processor\t: 0\nBogoMIPS\t: 62.5\n")
    assert machine.describe().cpu in {platform.processor(), platform.machine()}


def test_nothing_tells_whose_machine_it_is() -> None:
    text = str(machine.describe())
    assert platform.node() not in text
    assert getpass.getuser() not in text
    assert machine.describe().cores >= 1
