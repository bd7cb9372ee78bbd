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
    fp16 = [line.split() for line in out.split("int8:")[0].splitlines() if line.endswith("#")]
    starred = [line[0] for line in fp16 if line[1] == "*"]
    assert starred == ["1", "16", "32", "48", "64", "80", "96", "112", "128"]  # the pack of 16, and the narrowest
    assert [line[:2] for line in fp16[4:6]] == [["32", "*"], ["33-47", "32256"]]  # neighbours as dear share a line
    assert main(["show", "rk3588", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["offered"]["int8"] == [32, 64, 96, 128]


def test_an_unknown_device_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "rk3589"]) == 2
    assert "did you mean rk3588?" in capsys.readouterr().err
