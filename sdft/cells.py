"""Cells of the retention matrix as directories: what per-item results make, and checking it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.base import BadInput
from schemas.digest import digest_file
from schemas.results import Cell, CellFile, EvaluationSpec, SuiteSpec

CELL, ITEMS = "cell.json", "items.parquet"


def cell_of(
    spec: EvaluationSpec,
    suite: SuiteSpec,
    results: Sequence[Mapping[str, object]],
    items_sha256: str,
    seconds: float,
) -> Cell:
    """The cell that these per-item results (columns of ITEM_SCHEMA) make."""
    from scipy.stats import binomtest  # costs a second

    counts = Counter(result["status"] for result in results)
    correct = sum(result.get("score") == 1.0 for result in results)
    interval = binomtest(correct, len(results)).proportion_ci(method="wilson")
    return Cell(
        model_hash=spec.model_hash,
        suite_hash=suite.suite_hash,
        fingerprint=spec.fingerprint(suite),
        items=len(results),
        scored=counts["scored"],
        errors=counts["error"],
        invalid=counts["invalid"],
        unrun=counts["unrun"],
        score=correct / len(results),
        interval=(interval.low, interval.high),
        items_sha256=items_sha256,
        seconds=seconds,
    )


def read_cell(directory: Path, spec: EvaluationSpec, suite: SuiteSpec) -> Cell:
    """A cell that is there; raises BadInput where it is not what its items make."""
    cell = CellFile.read(directory / CELL).cell
    if not (directory / ITEMS).is_file() or digest_file(directory / ITEMS) != cell.items_sha256:
        raise BadInput(f"{directory / ITEMS}: is not what {CELL} lists")
    try:
        results = pq.read_table(directory / ITEMS).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise BadInput(f"{directory / ITEMS}: cannot be read: {error}") from None
    if cell != cell_of(spec, suite, results, cell.items_sha256, cell.seconds):
        raise BadInput(f"{directory}: was altered after it was made")
    return cell
