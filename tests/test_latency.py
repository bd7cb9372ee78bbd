"""latency-table.json: what it predicts, worked out by hand, and what is refused."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from polar_deploy import latency
from polar_deploy.errors import ContentError, UsageError
from polar_deploy.workspace import write_json


def site(name: str, kind: str, width: int, curve: dict[int, float], *within: str) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "width": width,
        "widths": list(curve),
        "ms": list(curve.values()),
        "within": list(within),
    }


def document(**changes: Any) -> dict[str, Any]:
    """A bottleneck in a block: three layers of 1, 6 and 3 ms, the middle one read and written by a gated width."""
    return {
        "schema": 1,
        "target": "ort-fp32",
        "batch": 1,
        "full_ms": 20.0,
        "sites": [
            site("first", "channel", 16, {8: 16.5, 16: 20.0}, "block"),  # half: 0.5 + 3 ms less
            site("second", "channel", 16, {4: 13.25, 8: 15.5, 16: 20.0}, "block"),  # half: 3 + 1.5 ms less
            site("block", "block", 32, {0: 10.0, 1: 20.0}),
            site("alone", "channel", 32, {8: 17.0, 16: 18.0, 24: 20.0, 32: 20.0}),
        ],
        "overlaps": [{"sites": ["first", "second"], "open": [8, 8], "ms": 13.5}],  # 0.5 + 1.5 + 1.5 instead of 10
    } | changes


def table(folder: Path, content: Any) -> latency.LatencyTable:
    write_json(folder / "table.json", content)
    return latency.read(folder / "table.json")


@pytest.mark.parametrize(
    ("first", "second", "block", "alone", "expected"),
    [
        (16, 16, 1, 32, 20.0),
        (8, 16, 1, 32, 16.5),
        (16, 4, 1, 32, 13.25),
        (16, 16, 0, 32, 10.0),
        (8, 8, 0, 32, 10.0),  # what is closed with its block saves nothing more
        (8, 8, 1, 32, 13.5),  # measured together
        (8, 4, 1, 32, 20 - 3.5 - 6.75 + 6 * 0.5 * 0.75),  # 6 ms x half x a quarter stays of the middle layer
        (12, 16, 1, 32, 18.25),  # straight between
        (4, 16, 1, 32, 16.5),  # below the least measured width nothing more is promised
        (16, 16, 1, 24, 20.0),
        (16, 16, 1, 20, 19.0),
        (16, 12, 0, 8, 7.0),
    ],
)
def test_prediction(tmp_path: Path, first: int, second: int, block: int, alone: int, expected: float) -> None:
    opened = {"first": first, "second": second, "block": block, "alone": alone}
    assert table(tmp_path, document()).predicted_ms(opened) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("stream", "inner", "block", "expected"),
    [
        (16, 16, 1, 20.0),
        (8, 16, 1, 16.0),
        (12, 16, 1, 18.0),  # a width between, as of channels
        (8, 8, 1, 20 - 4 - 3 + 1),  # a quarter, and not half, of the block's layers is left: 1 ms counts once
        (8, 16, 0, 20 - 4 - 8 + 3),  # what the stream saves in the block is gone with it
        (12, 8, 0, 20 - 2 - 8 + 1.5),
    ],
)
def test_a_stream_overlaps_with_what_it_runs_through(
    tmp_path: Path, stream: int, inner: int, block: int, expected: float
) -> None:
    content = document(
        sites=[
            site("stream", "stream", 16, {8: 16.0, 16: 20.0}),
            site("inner", "channel", 16, {8: 17.0, 16: 20.0}, "block"),
            site("block", "block", 1, {0: 12.0, 1: 20.0}),
        ],
        overlaps=[
            {"sites": ["stream", "inner"], "open": [8, 8], "ms": 14.0},
            {"sites": ["stream", "block"], "open": [8, 0], "ms": 11.0},
        ],
    )
    read = table(tmp_path, content)
    assert [each.kind for each in read.sites] == ["stream", "channel", "block"]
    assert read.predicted_ms({"stream": stream, "inner": inner, "block": block}) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 2.0, 3.0], [1, 2, 3]),
        ([3.0, 2.0, 1.0], [2, 2, 2]),
        ([1.0, 3.0, 2.0, 4.0], [1, 2.5, 2.5, 4]),
        ([2.0, 3.0, 1.0], [2, 2, 2]),
        ([], []),
    ],
)
def test_a_wider_layer_never_gets_cheaper(values: list[float], expected: list[float]) -> None:
    assert latency.ascending(values) == expected


def test_noise_is_cleaned_up(tmp_path: Path) -> None:
    """A width that seems slower than the full one, a block that saves less than what it holds, too large an overlap."""
    noisy = document(
        sites=[
            site("first", "channel", 16, {8: 16.0, 12: 20.5, 16: 20.0}, "block"),
            site("second", "channel", 16, {8: 15.0, 16: 20.0}, "block"),
            site("block", "block", 32, {0: 18.0, 1: 20.0}),
        ],
        overlaps=[{"sites": ["first", "second"], "open": [8, 8], "ms": 17.0}],
    )
    read = table(tmp_path, noisy)
    take = lambda *counts: read.predicted_ms(dict(zip(("first", "second", "block"), counts, strict=True)))  # noqa: E731
    assert take(12, 16, 1) == 20.0
    assert take(8, 8, 1) == pytest.approx(15.0)  # not more than with one of them cut
    assert take(8, 8, 0) == take(16, 16, 0) == pytest.approx(15.0)  # a closed block is never slower than an open one


def test_savings_that_noise_made_larger_than_the_whole_are_scaled_down(tmp_path: Path) -> None:
    """Three sites save 7 ms each of 20 ms: 5 % too much, as the sum of many measurements may come out."""
    sites = [site(name, "channel", 8, {4: 13.0, 8: 20.0}) for name in "abc"]
    read = table(tmp_path, document(sites=sites, overlaps=[]))
    assert read.predicted_ms({"a": 4, "b": 4, "c": 4}) == pytest.approx(0.2)
    assert read.predicted_ms({"a": 4, "b": 8, "c": 8}) == pytest.approx(20 - 19.8 / 3)


def _without(key: str) -> dict[str, Any]:
    return {name: value for name, value in document().items() if name != key}


def _with_site(**changes: Any) -> dict[str, Any]:
    content = copy.deepcopy(document())
    content["sites"][0] |= changes
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "TypeError"),
        (document(schema=2), "schema 2, this version reads 1"),
        (_without("overlaps"), "KeyError: 'overlaps'"),
        (document(full_ms=0), "full_ms is 0"),
        (document(sites=[], overlaps=[]), "or there is none"),
        (document(sites=[*document()["sites"], document()["sites"][0]]), "a site is listed twice"),
        (_with_site(widths=[16, 8]), "site 'first': widths must ascend to 16"),
        (_with_site(widths=[8, 12]), "site 'first': widths must ascend to 16"),
        (_with_site(ms=[16.5]), "a latency for each"),
        (_with_site(ms=[-1.0, 20.0]), "latencies must be positive"),
        (_with_site(within=["elsewhere"]), "KeyError: 'elsewhere'"),
        (_with_site(within=["second"]), "no block"),
        (_with_site(kind="block", width=16), "widths must ascend to 1"),
        (document(overlaps=[{"sites": ["first", "second"], "open": [8, 7], "ms": 13.5}]), "ValueError"),
        (
            document(sites=[site(name, "channel", 8, {4: 5.0, 8: 20.0}) for name in "abc"], overlaps=[]),
            "the sites save 45 ms, but the full network takes 20 ms",
        ),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ContentError, match=re.escape(message)) as caught:
        table(tmp_path, content)
    assert "table.json is no latency table" in caught.value.what


def test_another_target_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "table.json", document())
    with pytest.raises(ContentError, match="was measured on ort-fp32, the target is trt-fp16"):
        latency.read(tmp_path / "table.json", "trt-fp16")
    with pytest.raises(UsageError, match="cannot read"):
        latency.read(tmp_path / "nowhere.json")


def test_gates_of_another_network_are_refused(tmp_path: Path) -> None:
    opened = {"first": 16, "second": 16, "block": 1, "other": 32}
    with pytest.raises(ContentError, match="differ in the sites alone, other"):
        table(tmp_path, document()).predicted_ms(opened)


def test_all_savings_are_scaled_by_what_whole_networks_really_saved(tmp_path: Path) -> None:
    """Two checks save 3 and 1 of the 4 and 1 milliseconds that are predicted: four fifths."""
    content = document()
    full, plain = content["full_ms"], table(tmp_path, content)
    least = {entry.name: entry.widths[0] for entry in plain.sites}
    checks = [{"predicted_ms": full - 4, "ms": full - 3}, {"predicted_ms": full - 1, "ms": full - 1}]
    scaled = table(tmp_path, content | {"checks": checks})
    assert full - scaled.predicted_ms(least) == pytest.approx(0.8 * (full - plain.predicted_ms(least)))
    assert scaled.full_ms == full
    assert latency.correction({"checks": checks}) == pytest.approx(((full - 3) / (full - 4) - 1) / 2)
    assert latency.correction({}) == 0
