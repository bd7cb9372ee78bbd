"""The schedule: its end points, and the curve between them."""

from __future__ import annotations

import pytest

from polar_deploy.gating.schedule import RAMP, Schedule

SCHEDULE = Schedule(0.1, 0.5, (2.0, 0.5))


def test_progress_runs_from_the_start_to_the_freeze() -> None:
    assert [SCHEDULE.progress(done) for done in (0.0, 0.1, 0.2, 0.5, 1.0)] == pytest.approx([0, 0, 0.25, 1, 1])


def test_the_target_falls_from_the_full_network_to_the_budget() -> None:
    assert SCHEDULE.target(0.0) == SCHEDULE.target(0.1) == 1
    ramp_end = 0.1 + RAMP * 0.4
    assert SCHEDULE.target(ramp_end) == pytest.approx(0, abs=1e-12)
    assert SCHEDULE.target(0.5) == SCHEDULE.target(1.0) == 0


@pytest.mark.parametrize("part", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_the_target_is_cubic(part: float) -> None:
    assert SCHEDULE.target(0.1 + part * RAMP * 0.4) == pytest.approx((1 - part) ** 3, abs=1e-12)


def test_the_temperature_falls_geometrically() -> None:
    temperatures = [SCHEDULE.temperature(done) for done in (0.0, 0.1, 0.3, 0.5, 1.0)]
    assert temperatures == pytest.approx([2, 2, 1, 0.5, 0.5])  # half way: the geometric mean
