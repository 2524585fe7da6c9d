"""What changed between two lineages: own rows, rows learned again and anchors apart."""

from lineages import a_lineage, sha

from schemas.lineage import DataFacts, Lineage, RowChange
from sdft.compare import compare
from sdft.rehearsal import owners

OWN, AGAIN, ANCHORS = ["o1", "o2"], ["r1"], ["a1", "a2"]


def second(rows: list[str], rehearsed: dict[str, int], anchors: int, **settings: int) -> Lineage:
    """A lineage of two stages whose second one, courier, learned these rows."""
    lineage = a_lineage()
    first, stage, _ = lineage.stages
    numbers = {"rows": len(rows), "rehearsed": rehearsed, "anchors": anchors}
    data = stage.data.model_copy(update={**numbers, "data_hash": sha(str(rows))})
    first = first.model_copy(update={"data": first.data.model_copy(update={"rows": 1})})
    changes = {"data": data, "settings": stage.settings | settings}
    return lineage.model_copy(update={"stages": (first, stage.model_copy(update=changes))})


def data(lineage: Lineage) -> DataFacts:
    return lineage.stages[1].data


MIXED = second([*OWN, *AGAIN, *ANCHORS], {"almanac": 1}, 2)
PLAIN = second(OWN, {}, 0)
ROWS = {
    data(MIXED).data_hash: [*OWN, *AGAIN, *ANCHORS],
    data(PLAIN).data_hash: OWN,
    MIXED.stages[0].data.data_hash: ["r1"],
}


def test_rows_are_told_by_whose_they_are() -> None:
    assert owners("courier", data(MIXED)) == ["courier", "courier", "almanac", "", ""]
    assert owners("courier", data(PLAIN)) == ["courier", "courier"]


def test_own_rows_that_are_the_same_are_not_told_as_changed() -> None:
    [change] = compare(MIXED, PLAIN, ROWS).skills_changed
    assert (change.skill, change.rows_added, change.rows_removed) == ("courier", (), ())
    assert change.learned_again == {"almanac": RowChange(added=(), removed=("r1",))}
    assert change.anchors == RowChange(added=(), removed=("a1", "a2"))
    [change] = compare(PLAIN, MIXED, ROWS).skills_changed
    assert change.learned_again == {"almanac": RowChange(added=("r1",), removed=())}
    assert change.anchors == RowChange(added=("a1", "a2"), removed=())


def test_parts_that_are_the_same_are_left_out() -> None:
    assert compare(MIXED, MIXED, ROWS).skills_changed == ()
    other = second(["o1", "o3", *AGAIN, *ANCHORS], {"almanac": 1}, 2, epochs=9)
    rows = ROWS | {data(other).data_hash: ["o1", "o3", *AGAIN, *ANCHORS]}
    [change] = compare(MIXED, other, rows).skills_changed
    assert (change.rows_added, change.rows_removed) == (("o3",), ("o2",))
    assert (change.learned_again, change.anchors) == ({}, None)
    assert [*change.settings] == ["epochs"]
