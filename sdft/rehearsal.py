"""Rehearsal: a stage learns some demonstrations of earlier skills again, with those of its own.

The simplest remedy against forgetting there is (Robins 1995, 10.1080/09540099550039318; experience
replay in Rolnick et al., 1811.11682).
"""

from collections.abc import Sequence

import pyarrow as pa

from schemas.digest import digest_json
from schemas.lineage import DataFacts


def rehearsed(
    own: pa.Table, earlier: Sequence[pa.Table], share: float, seed: int
) -> list[pa.Table]:
    """Canonical demonstrations of each earlier skill, to be learned with `own`.

    Together they are `share` of the own rows, as equally many of each skill as there are. The rows,
    byte for byte those that the skill was learned from, are drawn by seed and own content alone.
    """
    wanted = round(share * len(own))
    counts = _dealt(wanted, [len(table) for table in earlier])
    return [_drawn(table, count, seed) for table, count in zip(earlier, counts, strict=True)]


def owners(skill: str, data: DataFacts) -> list[str]:
    """For each row of the stage that learned `skill`, whose it is; an empty text for an anchor."""
    again = [name for name, count in data.rehearsed.items() for _ in range(count)]
    return [skill] * data.own + again + [""] * data.anchors


def _dealt(wanted: int, there: list[int]) -> list[int]:
    """As equal numbers as there are rows for; what does not divide goes to the latest skills."""
    counts = [0] * len(there)
    while wanted and (open_ones := [i for i, rows in enumerate(there) if counts[i] < rows]):
        each = max(1, wanted // len(open_ones))
        for index in reversed(open_ones):
            more = min(each, there[index] - counts[index], wanted)
            counts[index] += more
            wanted -= more
    return counts


def _drawn(table: pa.Table, count: int, seed: int) -> pa.Table:
    """So many rows, in their order."""
    hashes = table.column("row_hash").to_pylist()
    by_chance = sorted(range(len(hashes)), key=lambda row: digest_json([seed, hashes[row], row]))
    return table.take(pa.array(sorted(by_chance[:count]), pa.int64()))
