"""Which widths a device's file offers, and which files are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polar_deploy import devices
from polar_deploy.devices import Chosen, Device
from polar_deploy.devices.width_costs import WidthCosts
from polar_deploy.errors import ContentError, UsageError
from tests.support.schemas import schema, valid

FOLDER = Path(devices.__file__).parent


def document(costs: dict[int, float], **changes: Any) -> dict[str, Any]:
    sweep = {"precision": "fp32", "layer": "conv3x3", "varies": "between", "pixels": 10}
    source = {"kind": "measured", "tool": "a clock", "version": "1", "date": "2026-11-29", "method": "", "script": ""}
    return {
        "schema": 1,
        "name": "mine",
        "title": "mine",
        "source": source,
        "unit": "ms",
        "sweeps": [{**sweep, "widths": list(costs), "cost": list(costs.values())}],
        **changes,
    }


def costs_of(device: Device) -> WidthCosts:
    return Chosen(device, "fp32").costs


def offered(costs: dict[int, float]) -> tuple[int, ...]:
    return Device.model_validate(document(costs)).offered("fp32")


@pytest.mark.parametrize("name", devices.names())
def test_every_file_is_what_the_schema_says_and_offers_widths(name: str) -> None:
    valid("device", json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")))
    device = devices.load(name)
    assert device.name == name
    assert (FOLDER.parents[1] / device.source.script).is_file()
    for precision in device.precisions:
        widths = device.offered(precision)
        assert {32, 64, 128} <= {*widths}  # which no device here punishes
        assert 33 not in widths  # which every one does


def test_the_schema_is_that_of_the_types() -> None:
    types = Device.model_json_schema(by_alias=True)
    assert schema("device").schema == {"$schema": "https://json-schema.org/draft/2020-12/schema", **types}


def test_a_width_is_offered_that_saves_half_of_its_share() -> None:
    assert offered({8: 2, 16: 4, 24: 6, 32: 8}) == (8, 16, 24, 32)  # linear
    assert offered({8: 8, 16: 8, 24: 8, 32: 8}) == (32,)  # nothing saved
    assert offered({8: 3, 16: 5, 24: 9, 31: 8, 32: 8}) == (8, 16, 32)  # 24 dearer, 31 as dear as 32
    # 24 of 32 channels give up a quarter: an eighth of the cost has to be saved
    assert offered({24: 7.01, 32: 8}) == (32,)
    assert offered({24: 6.99, 32: 8}) == (24, 32)


def test_writing_and_reading_a_width_both_count() -> None:
    sweep = {"precision": "int8", "layer": "conv3x3", "pixels": 16, "widths": [16, 24, 32]}
    sweeps = [{**sweep, "varies": "output", "cost": [4, 6, 8]}, {**sweep, "varies": "input", "cost": [4, 9, 8]}]
    device = Device.model_validate(document({}, sweeps=sweeps))
    assert device.staircase("int8") == {16: 8, 24: 15, 32: 16}
    assert device.offered("int8") == (16, 32)


def test_what_is_multiplied_and_what_is_moved_are_told_apart() -> None:
    """Between 64 and 64 channels: 2 * 64 * 9 multiplications a channel for 0.001 each, and what is moved for 0.05."""
    costs = {width: 1.152 * width + 0.05 * (128 + 2 * width) for width in (8, 16, 24, 32, 40, 48, 56, 64)}
    device = Device.model_validate(document(dict(sorted((costs | {33: costs[32] + 1.252 + 20}).items()))))
    assert device.offered("fp32") == tuple(costs)
    assert costs_of(device).each("conv3x3") == pytest.approx(0.001)
    assert costs_of(device).moved("conv3x3") == pytest.approx(0.05)
    # 33 channels cost 20 more, which are shared as the costs of a channel are: 64 * 9 * 0.001, and 2 * 0.05 moved
    fixed, each = costs_of(device).surcharge(np.array([32.0, 33.0]), "conv3x3", beside_offered=True)
    np.testing.assert_allclose(fixed, [0, 20 * 0.1 / 0.676], rtol=1e-6)
    np.testing.assert_allclose(each, [0, 20 * 0.576 / 0.676 / 64], rtol=1e-6)
    widths = np.array([0.0, 32.0, 33.0])
    np.testing.assert_array_equal(costs_of(device).packed(widths, "conv3x3", "input"), widths)


def test_what_weights_cost() -> None:
    """0.001 a multiplication on 10 x 10 pixels, 0.05 a channel moved; 0.3 a weight, which takes few pixels to show."""
    # On 10 x 10 pixels weights cost nothing, so that all is known
    plain = {width: 1.152 * width + 0.05 * (128 + 2 * width) for width in (8, 16, 24, 32, 40, 48, 56, 64)}
    first = document(plain)["sweeps"][0]

    def many(layer: str, elements: int, weight: float) -> dict[str, Any]:
        widths = [128, 512]
        weights = {width: 2 * 512 * width * elements for width in widths}
        per_pixel = {width: (0.001 * weights[width] + 0.05 * 2 * (512 + width)) / 100 for width in widths}
        cost = [4 * per_pixel[width] + weight * weights[width] / 100 for width in widths]
        return {**first, "layer": layer, "around": 512, "pixels": 2, "widths": widths, "cost": cost}

    known = costs_of(Device.model_validate(document({}, sweeps=[first, many("conv3x3", 9, 0.3)])))
    assert known.weight("conv3x3") == pytest.approx(0.3)
    assert known.weight("conv1x1") == pytest.approx(0.3)  # which was not asked
    of_both = [first, many("conv3x3", 9, 0.3), many("conv1x1", 1, 0.4)]
    assert costs_of(Device.model_validate(document({}, sweeps=of_both))).weight("conv1x1") == pytest.approx(0.4)
    cheaper = costs_of(Device.model_validate(document({}, sweeps=[first, many("conv3x3", 9, -0.0001)])))
    assert cheaper.weight("conv3x3") == 0
    assert costs_of(Device.model_validate(document(plain))).weight("conv3x3") == 0
    # and what is told of widths is the same
    assert known.device.staircase("fp32") == pytest.approx(plain)
    assert known.each("conv3x3") == pytest.approx(0.001)
    assert known.surcharge_growth == costs_of(Device.model_validate(document(plain))).surcharge_growth


@pytest.mark.parametrize("growth", [0.0, 1.0])
def test_what_an_unkind_width_costs_more_behind_the_widths_that_were_asked(growth: float) -> None:
    """33 channels cost 4 more than the line says; 65 and 97 as much more as grows so far, or no more."""
    more = {width: 4 * (1 + growth * (width - 33) / 33) for width in (33, 65, 97, 161)}
    costs = {width: width + more.get(width, 0.0) for width in (32, 33, 40, 64, 65, 66, 96, 97, 104, 128)}
    device = Device.model_validate(document(costs))
    assert costs_of(device).surcharge_growth == pytest.approx(growth)
    fixed, each = costs_of(device).surcharge(np.array([33.0, 160.0, 161.0]), "conv3x3", beside_offered=True)
    np.testing.assert_allclose(fixed + 64 * each, [more[33], 0, more[161]], atol=1e-9)


def odd(width: int) -> bool:
    return width % 16 > 0


@pytest.mark.parametrize(
    ("besides", "of_one", "of_both"),
    [
        # A kernel that either width makes leave, at a price of its own: a layer that reads 33 pays, and the one before
        (lambda given, made: 7.0 * (odd(given) or odd(made)), (14.0, 0.0), (7.0, 0.0)),
        # A price for each output, of what is read alone
        (lambda given, made: 0.5 * made * odd(given), (0.0, 0.5), (0.0, 0.5)),
        # Packs of 16 on both sides, one multiplication 0.01: 48 are read and written for 33
        (
            lambda given, made: 0.01 * (-(-given // 16) * -(-made // 16) * 256 - given * made),
            (0.0, 2 * 0.01 * 15),
            (0.0, 2 * 0.01 * 15),
        ),
    ],
)
def test_what_an_unkind_width_costs_beside_others(
    besides: Callable[[int, int], float], of_one: tuple[float, float], of_both: tuple[float, float]
) -> None:
    """Four sweeps of layers of which all costs are known: 0.01 a multiplication, 0.1 a channel moved, and `besides`."""
    widths = (*range(1, 67), 80, 96, 112, 128)

    def layer(given: int, made: int) -> float:
        return 0.01 * given * made + 0.1 * (given + made) + besides(given, made)

    sweeps = [
        {
            **document({})["sweeps"][0],
            "around": around,
            "widths": widths,
            "cost": [layer(around, width) + layer(width, around) for width in widths],
        }
        for around in (64, 16, 63, 15)
    ]
    device = Device.model_validate(document({}, sweeps=sweeps))
    assert device.offered("fp32") == (16, 32, 48, 64, 80, 96, 112, 128)
    for around, (in_any_case, for_each) in ((64, of_one), (16, of_one), (63, of_both), (15, of_both)):
        (fixed, none), (each, nothing) = costs_of(device).surcharge(np.array([33.0, 0.0]), "conv3x3", not odd(around))
        assert none == nothing == 0
        # of 15 outputs 16 are packed
        assert fixed + around * each == pytest.approx(in_any_case + around * for_each, rel=0.07), around


def test_a_device_to_which_all_widths_are_alike() -> None:
    device = Device.model_validate(document({8: 5.0, 16: 5.0, 32: 5.0, 64: 5.0}))
    assert costs_of(device).each("conv1x1") > 0
    found = costs_of(device).packed(np.array([0.0, 8.0, 20.0, 64.0, 100.0]), "conv1x1", "input")
    np.testing.assert_array_equal(found, [0, 8, 20, 64, 100])


def test_widths_beyond_the_widest_one_repeat_its_last_64() -> None:
    device = Device.model_validate(document({16: 1, 32: 2, 64: 4, 80: 5, 96: 6, 112: 9, 128: 8}))
    chosen = Chosen(device, "fp32")
    assert [width for width in range(1, 130) if chosen.offers(width)] == [16, 32, 64, 80, 96, 128]
    assert [width for width in range(130, 330) if chosen.offers(width)] == [144, 160, 192, 208, 224, 256, 272, 288, 320]


def test_a_precision_that_was_not_asked() -> None:
    assert devices.choose("rk3588", "int8").precision == "int8"
    assert devices.choose("rk3588", "bf16").precision == "fp16"
    assert devices.choose("ethos-u55-128").precision == "int8"


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(document({16: 1, 32: 2})))
    assert devices.choose(str(path)).described() == {
        "name": "mine",
        "precision": "fp32",
        "source": "measured, a clock 1",
        "widths": [16, 32],
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema": 2}, "schema: Input should be 1"),
        ({"extra": 1}, "extra: Extra inputs are not permitted"),
        ({"sweeps": []}, "sweeps"),
        ({"name": "Mine/../x"}, "name"),
        ({"title": "\x1b[31m"}, "title"),
    ],
)
def test_a_file_that_is_none(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(document({16: 1, 32: 2}, **changes)))
    with pytest.raises(ContentError, match=f"(?s)mine.json: .*{words}"):
        devices.load(str(path))


@pytest.mark.parametrize(
    ("costs", "words"),
    [
        ({32: 1, 16: 2}, "do not ascend"),
        ({16: 1, 32: -2}, "greater than 0"),
        ({16: 1}, "at least 2 items"),
    ],
)
def test_sweeps_that_are_none(costs: dict[int, float], words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(document(costs)))
    with pytest.raises(ContentError, match=words):
        devices.load(str(path))


def test_costs_that_cannot_be_compared(tmp_path: Path) -> None:
    whole = document({16: 1, 32: 2})
    (sweep,) = whole["sweeps"]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(whole | {"sweeps": [sweep, {**sweep, "layer": "conv1x1", "pixels": 7}]}))
    with pytest.raises(ContentError, match="maps of 7 and 10 pixels a side in fp32"):
        devices.load(str(path))
    path.write_text(json.dumps(whole | {"sweeps": [{**sweep, "layer": "conv1x1"}]}))
    with pytest.raises(ContentError, match="no costs of 3 x 3 convolutions in fp32"):
        devices.load(str(path))


def test_an_unknown_device() -> None:
    with pytest.raises(UsageError, match="unknown device 'etos-u55'") as caught:
        devices.load("etos-u55")
    assert "did you mean ethos-u" in caught.value.todo
    with pytest.raises(UsageError) as caught:
        devices.load("zzz")
    assert "choose one of them" in caught.value.todo
    with pytest.raises(UsageError, match="nowhere"):
        devices.load("nowhere.json")
