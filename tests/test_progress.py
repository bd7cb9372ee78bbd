"""The display: plain lines where there is no terminal, one bar where there is one."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from polar_deploy import progress as module
from polar_deploy.progress import Progress


class Clock:
    """A monotonic clock that only moves when told to."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def run(progress: Progress, clock: Clock) -> None:
    with progress:
        progress.plan({"full": 6, "gates": 2})
        progress.stage("full", total_epochs=6, done=3)
        progress.step(0.5)
        clock.seconds += 90
        progress.epoch(epoch=4, loss=1.23456, score="val 98.8%")
        clock.seconds += 3600 * 2
        progress.epoch(epoch=5, loss=float("nan"), score=None)
        progress.stage("export")
        progress.note("[exact] to 1e-7")
        clock.seconds += 4
        progress.stage("gates", total_epochs=2)
        clock.seconds += 60
        progress.epoch(epoch=1, loss=0.5, score="val 50.0%", cost=0.734, budget=0.5, undecided=0.123)


def test_plain_lines_one_an_epoch(clock: Clock) -> None:
    out = io.StringIO()
    run(Progress(Console(file=out, width=40)), clock)
    assert out.getvalue().splitlines() == [
        "full: goes on after epoch 3 of 6",
        "full 4/6 ETA 3:00 (run 6:00) val 98.8% loss 1.235",
        "full 5/6 ETA 1:00:45 (run 3:02:15) loss nan",
        "full 5/6: 2:01:30",
        "export",
        "[exact] to 1e-7",
        "export: 0:04",
        "gates",
        "gates 1/2 ETA 1:00 val 50.0% cost 0.73/0.50 loss 0.500 undecided 12%",
        "gates 1/2: 1:00",
    ]


def test_on_a_terminal_there_is_a_bar_and_each_stage_leaves_one_line(clock: Clock) -> None:
    out = io.StringIO()
    run(Progress(Console(file=out, force_terminal=True, width=80)), clock)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert "━" in text
    lines = [line for line in re.split(r"[\r\n]+", text) if line and "━" not in line]
    assert lines == [
        "full 5/6: 2:01:30 loss nan",
        "[exact] to 1e-7",
        "export: 0:04",
        "gates 1/2: 1:00 val 50.0% cost 0.73/0.50 loss 0.500 undecided 12%",
    ]


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (60, "gates 1/100 ETA 3:01:30 val 81.3% cost 1.00/0.60"),
        (80, "gates 1/100 ETA 3:01:30 val 81.3% cost 1.00/0.60 loss 0.634"),
        (120, "gates 1/100 ETA 3:01:30 val 81.3% cost 1.00/0.60 loss 0.634 undecided 66%"),
    ],
)
def test_the_line_beside_the_bar_is_one_line(width: int, shown: str, clock: Clock) -> None:
    """On a narrow terminal what matters least is left out; the bar takes nine columns."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width)
    with Progress(console) as progress:
        progress.stage("gates", total_epochs=100)
        clock.seconds += 110
        progress.epoch(epoch=1, loss=0.634, score="val 81.3%", cost=1.0, budget=0.6, undecided=0.66)
        assert progress.__rich__().plain == shown


def test_what_a_stage_is_at_leaves_no_line_on_a_terminal(clock: Clock) -> None:
    out = io.StringIO()
    with Progress(Console(file=out, force_terminal=True, width=80)) as progress:
        progress.stage("latency table")
        progress.detail("12 engines timed")
        clock.seconds += 65
        assert progress.__rich__().plain == "latency table 1:05 12 engines timed"
        progress.up_to_date("full")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    lines = [line for line in re.split(r"[\r\n]+", text) if line and "━" not in line]
    assert lines == ["latency table: 1:05", "full: up to date"]  # in this order


def test_the_estimate_counts_parts_of_an_epoch(clock: Clock) -> None:
    progress = Progress(Console(file=io.StringIO()))
    with progress:
        progress.stage("full", total_epochs=2)
        assert progress._line() == "full 0/2 ETA -:--"
        clock.seconds += 30
        progress.step(0.5)
        assert progress._line() == "full 0/2 ETA 1:30"


def test_everything_goes_to_stderr(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    run(Progress(), clock)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("full: goes on")


def test_quiet_is_quiet(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    run(Progress(quiet=True), clock)
    assert capsys.readouterr() == ("", "")


def test_what_is_up_to_date_is_told_and_not_waited_for(clock: Clock) -> None:
    out = io.StringIO()
    with Progress(Console(file=out)) as progress:
        progress.plan({"full": 10, "gates": 2})
        progress.up_to_date("full")
        progress.stage("gates", total_epochs=2)
        clock.seconds += 5
        progress.epoch(epoch=1, loss=1.0, score=None)
    assert out.getvalue().splitlines() == [
        "full: up to date",
        "gates",
        "gates 1/2 ETA 0:05 loss 1.000",
        "gates 1/2: 0:05",
    ]


def test_no_color_takes_the_colours_away(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the name of the stage beside the bar; cursor movements stay, they are no colours."""
    coloured = {}
    for value in ("", "1"):
        monkeypatch.setenv("NO_COLOR", value)
        out = io.StringIO()
        with Progress(Console(file=out, force_terminal=True, color_system="standard", width=80)) as progress:
            progress.stage("export")
            progress._bar.refresh()  # type: ignore[union-attr]
        coloured[value] = re.findall(r"\x1b\[[0-9;]*(?:3[0-7]|9[0-7])[0-9;]*m", out.getvalue())
    assert coloured[""]
    assert coloured["1"] == []
