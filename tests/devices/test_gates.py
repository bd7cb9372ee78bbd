"""Gates whose widths come from a device."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from polar_deploy import Gates, devices
from polar_deploy.errors import UsageError
from polar_deploy.export import Example
from polar_deploy.gating.analysis import Analysis, analyse
from polar_deploy.gating.on_device import device_cost

X = torch.zeros(2, 3, 8, 8)


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 72, 3), nn.ReLU(), nn.Conv2d(72, 80, 3), nn.ReLU(), nn.Conv2d(80, 8, 3), nn.Flatten()
    )


@cache
def analysis_of(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> Analysis:
    """What can go from a network: looked at once, since that takes a second."""
    return analyse(make(), Example.of(torch.zeros(shape)))


def gated(budget: float | str, steps: int, **options: Any) -> Gates:
    """Gates on a new `net`."""
    return Gates(net(), X, budget, steps, rehearse=0, analysis=analysis_of(net, tuple(X.shape)), **options)


def test_what_stays_are_widths_that_the_device_likes() -> None:
    gates = gated(0.5, 10, device="rk3588")
    gates.freeze()
    widths = [int(gates.opened[site.gates.start : site.gates.stop].sum()) for site in gates.sites]
    assert len(widths) == 2
    # FP16 of an RK3588: multiples of 16. Of 72 and 80 channels those, or all
    assert all(width % 16 == 0 or width == site.width for width, site in zip(widths, gates.sites, strict=True))
    assert widths != [72, 80]


def test_int8_has_other_widths() -> None:
    gates = gated(0.6, 10, device=devices.choose("rk3588", "int8"))
    gates.freeze()
    widths = [int(gates.opened[site.gates.start : site.gates.stop].sum()) for site in gates.sites]
    assert all(width in (32, 64, site.width) for width, site in zip(widths, gates.sites, strict=True))


def test_an_unknown_device() -> None:
    with pytest.raises(UsageError, match="unknown device 'rk1'"):
        gated(0.5, 10, device="rk1")


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1))


def _share_by_file(device: str, channels: int) -> float:
    """What a device's file says of two like layers of 64 channels, `channels` between them open."""
    x = torch.zeros(2, 64, 8, 8)
    gates = Gates(two_layers(), x, analysis=analysis_of(two_layers, tuple(x.shape)))
    gates.freeze(np.arange(64) < channels)
    return device_cost(devices.choose(device), gates.analysis.choices).share(gates.state())


def _measured_between(device: str) -> dict[int, float]:
    """By width, what the device's file says of two 3 x 3 convolutions with so many channels between them."""
    content = json.loads((files(devices) / f"{device}.json").read_text(encoding="utf-8"))
    (sweep,) = (each for each in content["sweeps"] if each["layer"] == "conv3x3" and each["around"] == 64)
    assert sweep["varies"] == "between"
    return dict(zip(sweep["widths"], sweep["cost"], strict=True))


@pytest.mark.parametrize(
    ("device", "channels", "share"),
    [
        # Its compiler says what writing 48 of 64 channels costs, 13,824 of 18,432, and reading them, 18,432 of 18,432
        ("rk3588", 48, (0.75 + 1) / 2),
        ("rk3588", 17, (9216 / 18432 + 9216 / 18432) / 2),
    ],
)
def test_a_device_tells_latency(device: str, channels: int, share: float) -> None:
    assert _share_by_file(device, channels) == pytest.approx(share, rel=1e-6)


@pytest.mark.parametrize("channels", [32, 31])  # 32 are on offer and 31 are not
def test_a_runtime_tells_latency(channels: int) -> None:
    costs = _measured_between("onnxruntime-x86")
    # Two such layers are what was measured. No clock draws straight lines
    assert _share_by_file("onnxruntime-x86", channels) == pytest.approx(costs[channels] / costs[64], rel=0.04)


def test_weights_cost_whatever_they_are_multiplied_with() -> None:
    def sweep(around: int, pixels: int, cost: Callable[[int, int], float]) -> dict[str, Any]:
        costs = [cost(2 * around * width * 9, pixels**2) for width in (16, 32, 64)]
        what = {"precision": "fp32", "layer": "conv3x3", "varies": "between", "around": around, "pixels": pixels}
        return {**what, "widths": [16, 32, 64], "cost": costs}

    rk3588 = devices.load("rk3588").model_dump(by_alias=True)
    sweeps = [sweep(64, 10, lambda weights, pixels: weights * pixels)]
    sweeps.append(sweep(512, 2, lambda weights, pixels: weights * pixels + 30 * weights))
    device = devices.Device.model_validate({**rk3588, "name": "mine", "sweeps": sweeps})
    for side in (8, 2):
        x = torch.zeros(2, 64, side, side)
        gates = Gates(two_layers(), x, analysis=analysis_of(two_layers, tuple(x.shape)))
        cost = device_cost(devices.Chosen(device, "fp32"), gates.analysis.choices)
        # per weight and channel between: as many multiplications as pixels, and as much as 30 more
        assert cost.full == pytest.approx(100 * 2 * 64 * 64 * 9 * (side**2 + 30), rel=1e-6)


class Residual(nn.Module):
    """Two branches, the second one on the sum of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 1)
        self.branches = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        for branch in self.branches:
            x = torch.relu(x + branch(x))
        return self.head(x)


def test_a_sum_costs_and_goes_with_its_branch() -> None:
    choices = analyse(Residual(), Example.of(X)).choices
    rk3588 = devices.load("rk3588")

    def cost(opened: np.ndarray, addition: float) -> float:
        device = rk3588.model_copy(update={"addition": addition})
        return device_cost(devices.Chosen(device, "fp16"), choices).absolute(choices.state(opened))

    everything = np.ones(choices.gates, bool)
    one_closed = everything.copy()
    one_closed[choices.blocks[0].gate] = False
    half = everything.copy()
    (stream,) = (site for site in choices.sites if site.kind == "stream")
    half[stream.gates.start + 8 : stream.gates.stop] = False
    # What a convolution of 64 channels costs for an element: half of 18,432 + 18,432 cycles, over 64 channels
    element = 0.25 * 18432 / 64
    for opened, elements in ((everything, 2 * 16 * 64), (one_closed, 16 * 64), (half, 2 * 8 * 64)):
        assert cost(opened, 0.25) - cost(opened, 0.0) == pytest.approx(element * elements, rel=1e-6)


def test_kinds_of_layers_cost_differently() -> None:
    network = nn.Sequential(
        nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1, groups=64), nn.Conv2d(64, 64, 1)
    )
    choices = analyse(network, Example.of(torch.zeros(2, 64, 8, 8))).choices
    rk3588 = devices.load("rk3588")
    without_weights = [sweep for sweep in rk3588.sweeps if sweep.around == 64]
    cost = device_cost(devices.Chosen(rk3588.model_copy(update={"sweeps": without_weights}), "fp16"), choices)
    plain, depthwise, pointwise = (term(choices.state(np.ones(choices.gates, bool))) for term in cost.terms)
    # What the file has for 64 channels: 18,432 cycles to write, as many to read; 3,117 and 3,117; 2,820
    assert (plain / pointwise, plain / depthwise) == pytest.approx((18432 / 3117, 18432 / 2820))


def test_a_latency_budget_without_a_table() -> None:
    gates = gated("latency=0.6", 10, device="ethos-u55-128")
    gates.freeze()
    assert 0.3 < gates.cost()["latency"] <= 0.6
    with pytest.raises(UsageError, match="needs a latency table, or a device"):
        gated("latency=0.6", 10)


@pytest.mark.parametrize("slower", [1.0, 1.019, 1.25])
def test_what_is_chosen_is_tightened_until_it_keeps_to_the_latency_as_it_runs(slower: float) -> None:
    asked: list[float] = []

    def measured(opened: Mapping[str, int]) -> float:
        """As if everything took so much longer than the device's file says."""
        assert list(opened) == [name for _, name, _ in gates.analysis.choices.owners()]
        state = np.concatenate([np.arange(len(own)) < opened[name] for own, name, _ in gates.analysis.choices.owners()])
        asked.append(slower * gates.cost(state)["latency"])
        return asked[-1]

    gates = gated("latency=0.6", 10, device="onnxruntime-x86", measured=measured)
    gates.freeze()
    left = gates.cost()["latency"]
    assert left * slower <= 0.6 * 1.02
    assert left * slower > 0.5  # and is no smaller than it has to be: there are widths in steps of 4
    assert asked[0] == pytest.approx(slower * plain(0.6))
    assert len(asked) == 1 if slower * plain(0.6) <= 0.6 * 1.02 else len(asked) > 1
    assert len({*asked}) == len(asked)  # nothing was too slow twice


def plain(budget: float) -> float:
    """What is left of the latency where nothing is measured."""
    gates = gated(f"latency={budget}", 10, device="onnxruntime-x86")
    gates.freeze()
    return gates.cost()["latency"]


def test_a_latency_that_no_choice_keeps_to_leaves_the_last_one_within_reach() -> None:
    calls = iter(range(100))

    def measured(opened: Mapping[str, int]) -> float:
        next(calls)
        return 1.0  # nothing is ever faster here

    gates = gated("latency=0.6", 10, device="onnxruntime-x86", measured=measured)
    gates.freeze()
    assert gates.smallest()["latency"] <= gates.cost()["latency"] < plain(0.6)
    assert next(calls) <= 3


def test_nothing_is_measured_without_a_latency_budget() -> None:
    def measured(opened: Mapping[str, int]) -> float:
        raise AssertionError("was asked")

    gates = gated("macs=0.6", 10, measured=measured)
    gates.freeze()
    assert gates.cost()["macs"] <= 0.6
