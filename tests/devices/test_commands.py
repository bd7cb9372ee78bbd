"""`python -m polar_deploy.devices list | show`."""

from __future__ import annotations

import json

import pytest

from polar_deploy import devices
from polar_deploy.devices.__main__ import main


def test_every_device_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == devices.names()
    assert main(["list", "--json"]) == 0
    assert [each["name"] for each in json.loads(capsys.readouterr().out)] == devices.names()


def test_a_device_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "rk3588"]) == 0
    out = capsys.readouterr().out
    assert "rknn-toolkit2 2.5.0" in out
    assert "\n   32 *" in out
    assert "\n   33  " in out
    assert main(["show", "rk3588", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["offered"]["int8"] == [32, 64, 96, 128]


def test_an_unknown_device_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "rk3589"]) == 2
    assert "did you mean rk3588?" in capsys.readouterr().err
