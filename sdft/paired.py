"""Statistics of two models on the same items: what was gained and lost, and how sure that is."""

import math
from collections.abc import Mapping
from typing import Any

from scipy.optimize import brentq
from scipy.stats import binom, norm


def count_changes(before: Mapping[str, bool], after: Mapping[str, bool]) -> tuple[int, int]:
    """(gained, lost): items wrong before and right after, and the other way round, by id."""
    assert before.keys() == after.keys(), "items are paired by id"
    gained = sum(not before[item] and after[item] for item in before)
    lost = sum(before[item] and not after[item] for item in before)
    return gained, lost


def p_value(toward: int, against: int) -> float:
    """The exact one-sided McNemar test of a change toward one side.

    The chance that at least `toward` of the `toward + against` items that changed went that way if
    either way were as likely; 1 where none changed. McNemar, Psychometrika 12 (1947), in its exact
    form, the sign test. What stayed the same says nothing about the direction.
    """
    return float(binom.sf(toward - 1, toward + against, 0.5))


def change_bounds(gained: int, lost: int, pairs: int, confidence: float) -> tuple[float, float]:
    """One-sided confidence bounds, lower and upper, of the change in the share of right answers.

    Tango's score interval for paired proportions, Statistics in Medicine 17 (1998) 891-908: the
    changes that a score test at this confidence would not reject. It stays within -1 and 1, and
    where no item changed it is not 0 wide but z^2 / (pairs + z^2) each way. It is approximate: at
    0.95 and 10 to 60 pairs a bound holds with a probability of 0.95 or more on average over what
    may be true, 0.88 at worst (where nearly all items change the same way).
    """
    z = float(norm.ppf(confidence))
    return _lower(gained, lost, pairs, z), -_lower(lost, gained, pairs, z)


def _lower(gained: int, lost: int, pairs: int, z: float) -> float:
    change = (gained - lost) / pairs

    def excess(delta: float) -> float:
        """Tango's equations: above 0 where a true change of `delta` is rejected as too low."""
        b = (2 * pairs - gained + lost) * delta - gained - lost
        c = -lost * delta * (1.0 - delta)
        # the most likely share of lost items if the change is delta
        share = (math.sqrt(max(b * b - 8 * pairs * c, 0.0)) - b) / (4 * pairs)
        variance = pairs * (2.0 * share + delta * (1.0 - delta))
        return gained - lost - pairs * delta - z * math.sqrt(max(variance, 0.0))

    nearest = change - 1e-12  # not the change itself, which solves it where no item changed
    if excess(-1.0) <= 0.0:
        return -1.0
    if excess(nearest) >= 0.0:
        return change
    root: Any = brentq(excess, -1.0, nearest, xtol=1e-12)
    return float(root)
