"""Paired statistics against published and hand-made values, and the coverage of the bounds."""

from itertools import product

import numpy as np
import pytest
from scipy.stats import multinomial

from sdft.paired import change_bounds, count_changes, p_value


def test_changes_are_counted_by_id_not_by_place() -> None:
    before = {"a": True, "b": True, "c": False, "d": False}
    after = {"d": True, "c": False, "b": False, "a": True}
    assert count_changes(before, after) == (1, 1)


@pytest.mark.parametrize(
    ("toward", "against", "expected"),
    [
        (0, 0, 1.0),
        (1, 0, 1 / 2),
        (5, 0, 1 / 32),
        (0, 5, 1.0),
        (4, 1, 6 / 32),  # 5 + 1 of the 32 ways
        (7, 1, 9 / 256),  # Bentur et al. 2009: two-sided 0.0703 in Fagerland et al. 2014
    ],
)
def test_the_exact_test_is_the_sign_test(toward: int, against: int, expected: float) -> None:
    assert p_value(toward, against) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("gained", "lost", "pairs", "confidence", "lower", "upper"),
    [
        # Fagerland, Lydersen and Laake, Statistics in Medicine 33 (2014): airway responsiveness
        (1, 7, 21, 0.975, -0.517, -0.026),
        # PropCIs::scoreci.mp, the R implementation of Tango's interval
        (28, 25, 618, 0.95, -0.0148, 0.0247),
        # nothing changed, in closed form: z^2 / (pairs + z^2) each way
        (0, 0, 36, 0.975, -3.8414588 / 39.8414588, 3.8414588 / 39.8414588),
    ],
)
def test_bounds_are_the_published_ones(
    gained: int, lost: int, pairs: int, confidence: float, lower: float, upper: float
) -> None:
    assert change_bounds(gained, lost, pairs, confidence) == pytest.approx((lower, upper), abs=6e-4)


@pytest.mark.parametrize("pairs", [1, 2, 7, 12])
@pytest.mark.parametrize("confidence", [0.5001, 0.8, 0.95, 0.9999])
def test_bounds_enclose_the_change_and_mirror(pairs: int, confidence: float) -> None:
    for gained, lost in tables(pairs):
        lower, upper = change_bounds(gained, lost, pairs, confidence)
        assert -1.0 <= lower <= (gained - lost) / pairs <= upper <= 1.0
        assert change_bounds(lost, gained, pairs, confidence) == pytest.approx((-upper, -lower))
        assert (lower == -1.0) == (lost == pairs)


@pytest.mark.parametrize("pairs", [10, 36])
def test_a_bound_covers_the_truth_about_as_often_as_it_says(pairs: int) -> None:
    """Exhaustive: every possible outcome, weighed by its probability under many truths."""
    outcomes = np.array(tables(pairs))
    lowers = np.array([change_bounds(gained, lost, pairs, 0.95)[0] for gained, lost in outcomes])
    counts = np.column_stack([outcomes, pairs - outcomes.sum(axis=1)])
    covered = [
        multinomial.pmf(counts, pairs, [gain, loss, 1 - gain - loss])[
            lowers <= gain - loss + 1e-9
        ].sum()
        for gain, loss in product(np.linspace(0.0, 0.5, 21), repeat=2)
    ]
    assert 0.95 <= np.mean(covered) < 0.98
    assert np.min(covered) > 0.90


def tables(pairs: int) -> list[tuple[int, int]]:
    """Every (gained, lost) that so many pairs can give."""
    return [(gained, lost) for gained in range(pairs + 1) for lost in range(pairs + 1 - gained)]
