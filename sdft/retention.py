"""The measures of a retention matrix, as pure functions of arrays.

`scores` is [stages + 1, suites]: row 0 is the base model, row i the model after stage i; NaN where
a cell was not evaluated. `own[i - 1]` is the column of stage i's own suite. A measure that has
nothing to average over, or a NaN in what it averages, is NaN.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]


def average(scores: Scores, own: Sequence[int]) -> float:
    """Mean score of the learned skills after the last stage: mean_j R[n, j]."""
    _check(scores, own)
    return _mean(scores[-1, list(own)])


def backward_transfer(scores: Scores, own: Sequence[int]) -> float:
    """mean_{j<n} (R[n, j] - R[j, j]); below 0 is forgetting (GEM, arXiv 1706.08840)."""
    _check(scores, own)
    return _mean([scores[-1, column] - scores[stage, column] for stage, column in _earlier(own)])


def forward_transfer(scores: Scores, own: Sequence[int]) -> float:
    """mean_{j>=2} (R[j-1, j] - R[0, j]): what earlier stages gave to later skills (GEM)."""
    _check(scores, own)
    later = list(enumerate(own, 1))[1:]
    return _mean([scores[stage - 1, column] - scores[0, column] for stage, column in later])


def forgetting(scores: Scores, own: Sequence[int]) -> float:
    """mean_{j<n} (max_{j<=l<n} R[l, j] - R[n, j]): loss from the best since it was learned.

    RWalk (arXiv 1801.10112) takes the maximum over all l < n; before its own stage a skill cannot
    be forgotten, and those cells need not have been evaluated.
    """
    _check(scores, own)
    return _mean(
        [
            np.nanmax(scores[stage:-1, column]) - scores[-1, column]
            for stage, column in _earlier(own)
        ]
    )


def general_forgetting(scores: Scores, general: Sequence[int]) -> float:
    """mean_g (R[0, g] - R[n, g]) over the general suites' columns: prior capability lost."""
    return _mean(scores[0, list(general)] - scores[-1, list(general)])


def intransigence(scores: Scores, own: Sequence[int], reference: Sequence[float]) -> float:
    """mean_k (reference_k - R[k, k]), where the reference was trained jointly (RWalk)."""
    _check(scores, own)
    return _mean([best - scores[stage, own[stage - 1]] for stage, best in enumerate(reference, 1)])


def _earlier(own: Sequence[int]) -> list[tuple[int, int]]:
    return list(enumerate(own, 1))[:-1]


def _mean(values: Sequence[float] | Scores) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def _check(scores: Scores, own: Sequence[int]) -> None:
    if scores.ndim != 2 or len(scores) != len(own) + 1:
        raise ValueError(
            f"scores must be [stages + 1, suites] with a row for the base model: got shape "
            f"{scores.shape} for {len(own)} stages"
        )
