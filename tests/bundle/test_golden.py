from __future__ import annotations

import numpy as np
import pytest

from polar_deploy.bundle import golden

LOGITS = np.array([[3.0, 4.0], [0.0, 5.0]], np.float32)  # RMS: sqrt((9 + 16 + 25) / 4)


def test_the_difference_is_a_share_of_the_reference_s_rms() -> None:
    off = LOGITS + np.array([[0.0, 0.0], [1.0, -1.0]], np.float32)
    assert golden.difference(LOGITS, off) == pytest.approx((2 / 4) ** 0.5 / (50 / 4) ** 0.5)
    assert golden.difference(LOGITS, LOGITS) == 0.0
    assert golden.difference(np.zeros_like(LOGITS), LOGITS) == pytest.approx((50 / 4) ** 0.5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_never_passes(bad: float) -> None:
    given = LOGITS.copy()
    given[0, 0] = bad
    assert golden.difference(LOGITS, given) is None
    assert golden.check(LOGITS, given, "int8")["pass"] is False
    assert golden.check(LOGITS, LOGITS[:1], "int8")["pass"] is False  # one answer for two samples


@pytest.mark.parametrize(("precision", "share"), [("fp32", 0.001), ("fp16", 0.01), ("bf16", 0.05), ("int8", 0.25)])
def test_tolerances_are_those_of_the_format(precision: str, share: float) -> None:
    assert golden.check(LOGITS, LOGITS * (1 + 0.9 * share), precision)["pass"] is True
    assert golden.check(LOGITS, LOGITS * (1 + 1.1 * share), precision)["pass"] is False


def test_tf32_has_the_tolerance_of_fp16() -> None:
    given = LOGITS * 1.009
    assert not golden.check(LOGITS, given, "fp32")["pass"]
    assert golden.check(LOGITS, given, "fp32", tf32=True)["pass"]


def test_random_inputs_are_the_same_each_time_and_like_pictures() -> None:
    one = golden.random_inputs(32, (3, 32, 32), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    assert (one.shape, one.dtype) == ((32, 3, 32, 32), np.float32)
    np.testing.assert_array_equal(one, golden.random_inputs(32, (3, 32, 32), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)))
    assert -2.0 <= one.min() < -1.5  # black is (0 - 0.5) / 0.25
    assert 1.5 < one.max() <= 2.0
    assert len({picture.tobytes() for picture in one}) == 32
