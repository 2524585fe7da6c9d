"""The retention matrix as a document, with its measures."""

import math
from collections.abc import Sequence

import numpy as np

from schemas.results import MatrixRow, Measures, RetentionMatrix
from sdft import retention


def build_matrix(
    curriculum: str, skills: Sequence[str], general: Sequence[str], rows: Sequence[MatrixRow]
) -> RetentionMatrix:
    """The matrix of all rows; its measures follow the model that is kept.

    A refused stage has a row, but the model that goes on is its parent, so the measures are taken
    over the base model and the stages that passed.
    """
    kept = [row for row in rows if row.passed]
    scores = np.array(
        [[math.nan if cell is None else cell.score for cell in row.cells] for row in kept]
    )
    own = [skills.index(row.skill) for row in kept if row.skill is not None]
    general_columns = range(len(skills), len(skills) + len(general))
    return RetentionMatrix(
        curriculum=curriculum,
        skills=tuple(skills),
        general=tuple(general),
        rows=tuple(rows),
        measures=Measures(
            average=_defined(retention.average(scores, own)),
            backward_transfer=_defined(retention.backward_transfer(scores, own)),
            forward_transfer=_defined(retention.forward_transfer(scores, own)),
            forgetting=_defined(retention.forgetting(scores, own)),
            general_forgetting=_defined(retention.general_forgetting(scores, general_columns)),
        ),
    )


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value
