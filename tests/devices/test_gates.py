"""Gates whose widths come from a device."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from polar_deploy import Gates, devices
from polar_deploy.errors import UsageError

X = torch.zeros(2, 3, 8, 8)


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 72, 3), nn.ReLU(), nn.Conv2d(72, 80, 3), nn.ReLU(), nn.Conv2d(80, 8, 3), nn.Flatten()
    )


def test_what_stays_are_widths_that_the_device_likes() -> None:
    gates = Gates(net(), X, 0.5, 10, device="rk3588", rehearse=0)
    gates.freeze()
    widths = [int(gates.opened[site.gates.start : site.gates.stop].sum()) for site in gates.sites]
    assert len(widths) == 2
    # FP16 of an RK3588: multiples of 16. Of 72 and 80 channels those, or all
    assert all(width % 16 == 0 or width == site.width for width, site in zip(widths, gates.sites, strict=True))
    assert widths != [72, 80]


def test_int8_has_other_widths() -> None:
    gates = Gates(net(), X, 0.6, 10, device=devices.choose("rk3588", "int8"), rehearse=0)
    gates.freeze()
    widths = [int(gates.opened[site.gates.start : site.gates.stop].sum()) for site in gates.sites]
    assert all(width in (32, 64, site.width) for width, site in zip(widths, gates.sites, strict=True))


def test_an_unknown_device() -> None:
    with pytest.raises(UsageError, match="unknown device 'rk1'"):
        Gates(net(), X, 0.5, 10, device="rk1", rehearse=0)
