from __future__ import annotations

import numpy as np
import pytest

from polar_deploy.bundle import golden
from polar_deploy.config import Normalize
from polar_deploy.documents.verified import GoldenCheck

LOGITS = np.array([[3.0, 4.0], [0.0, 5.0]], np.float32)  # RMS: sqrt((9 + 16 + 25) / 4)


def difference(reference: np.ndarray, given: np.ndarray) -> float | None:
    return golden.difference({"logits": reference}, {"logits": given})


def check(reference: np.ndarray, given: np.ndarray, precision: str, **how: bool) -> GoldenCheck:
    return golden.check({"logits": reference}, {"logits": given}, precision, **how)


def test_the_difference_is_a_share_of_the_reference_s_rms() -> None:
    off = LOGITS + np.array([[0.0, 0.0], [1.0, -1.0]], np.float32)
    assert difference(LOGITS, off) == pytest.approx((2 / 4) ** 0.5 / (50 / 4) ** 0.5)
    assert difference(LOGITS, LOGITS) == 0.0
    assert difference(np.zeros_like(LOGITS), LOGITS) == pytest.approx((50 / 4) ** 0.5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_never_passes(bad: float) -> None:
    given = LOGITS.copy()
    given[0, 0] = bad
    assert difference(LOGITS, given) is None
    assert check(LOGITS, given, "int8").passed is False
    assert check(LOGITS, LOGITS[:1], "int8").passed is False  # one answer for two samples


@pytest.mark.parametrize(("precision", "share"), [("fp32", 0.001), ("fp16", 0.01), ("bf16", 0.05), ("int8", 0.25)])
def test_tolerances_are_those_of_the_format(precision: str, share: float) -> None:
    assert check(LOGITS, LOGITS * (1 + 0.9 * share), precision).passed is True
    assert check(LOGITS, LOGITS * (1 + 1.1 * share), precision).passed is False


def test_tf32_has_the_tolerance_of_fp16() -> None:
    given = LOGITS * 1.009
    assert not check(LOGITS, given, "fp32").passed
    assert check(LOGITS, given, "fp32", tf32=True).passed


def test_random_pictures_are_the_same_each_time_and_like_pictures() -> None:
    normal = Normalize(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    one = golden.random_pictures(32, (3, 32, 32), normal)
    assert (one.shape, one.dtype) == ((32, 3, 32, 32), np.float32)
    np.testing.assert_array_equal(one, golden.random_pictures(32, (3, 32, 32), normal))
    assert -2.0 <= one.min() < -1.5  # black is (0 - 0.5) / 0.25
    assert 1.5 < one.max() <= 2.0
    assert len({picture.tobytes() for picture in one}) == 32


def test_random_inputs_are_like_those_that_were_seen_and_none_of_them() -> None:
    rng = np.random.default_rng(4)
    seen = {"level": rng.normal(3, 0.5, (20, 50)).astype(np.float32), "index": rng.integers(2, 6, 20)}
    one, again = (golden.random_inputs(400, seen) for _ in range(2))
    assert {name: (values.shape, values.dtype) for name, values in one.items()} == {
        "level": ((400, 50), np.dtype(np.float32)),
        "index": ((400,), np.dtype(np.int64)),
    }
    assert (one["level"].mean(), one["level"].std()) == pytest.approx((3, 0.5), abs=0.05)
    assert set(one["index"].tolist()) == {2, 3, 4, 5}
    assert all(np.array_equal(one[name], again[name]) for name in one)
    assert not {row.tobytes() for row in one["level"]} & {row.tobytes() for row in seen["level"]}


def test_of_several_outputs_the_worst_counts_and_integers_have_to_be_equal() -> None:
    exact = {"logits": LOGITS, "index": np.array([1, 2, 3, 4])}
    assert golden.difference(exact, exact) == 0
    assert golden.difference(exact, {**exact, "index": np.array([1, 2, 3, 5])}) == 0.25
    assert golden.difference(exact, {"logits": LOGITS * 1.1, "index": exact["index"]}) == pytest.approx(0.1)
    assert golden.difference(exact, {"logits": LOGITS}) is None
