"""Retention measures against matrices worked out by hand."""

import math

import numpy as np
import pytest

from sdft import retention

# rows: base, after A, after B, after C; columns: A, B, C, general
SCORES = np.array(
    [
        [0.1, 0.0, 0.2, 0.9],
        [0.8, 0.1, 0.3, 0.9],
        [0.9, 0.7, 0.4, 0.8],
        [0.6, 0.5, 1.0, 0.7],
    ]
)
OWN = [0, 1, 2]


def test_measures_of_a_hand_computed_matrix() -> None:
    assert retention.average(SCORES, OWN) == pytest.approx((0.6 + 0.5 + 1.0) / 3)
    assert retention.backward_transfer(SCORES, OWN) == pytest.approx((-0.2 - 0.2) / 2)
    # B before it was learned: 0.1 against 0.0; C: 0.4 against 0.2
    assert retention.forward_transfer(SCORES, OWN) == pytest.approx((0.1 + 0.2) / 2)
    # the best of A before the end was 0.9, of B 0.7
    assert retention.forgetting(SCORES, OWN) == pytest.approx((0.3 + 0.2) / 2)
    assert retention.general_forgetting(SCORES, [3]) == pytest.approx(0.2)
    assert retention.intransigence(SCORES, OWN, [0.9, 0.9, 0.9]) == pytest.approx(0.2 / 3)


def test_order_of_columns_is_free() -> None:
    shuffled = SCORES[:, [2, 0, 3, 1]]
    own = [1, 3, 0]
    assert retention.forgetting(shuffled, own) == pytest.approx(retention.forgetting(SCORES, OWN))
    assert retention.forward_transfer(shuffled, own) == pytest.approx(0.15)


def test_what_is_not_there_is_nan_not_zero() -> None:
    one_stage = SCORES[:2]
    assert math.isnan(retention.backward_transfer(one_stage, [0]))
    assert math.isnan(retention.forward_transfer(one_stage, [0]))
    assert math.isnan(retention.forgetting(one_stage, [0]))
    assert retention.average(one_stage, [0]) == 0.8
    assert math.isnan(retention.average(SCORES[:1], []))
    holes = SCORES.copy()
    holes[3, 0] = np.nan
    assert math.isnan(retention.backward_transfer(holes, OWN))
    assert math.isnan(retention.general_forgetting(SCORES, []))


def test_a_matrix_of_the_wrong_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[stages \+ 1, suites\]"):
        retention.average(SCORES, [0, 1])
