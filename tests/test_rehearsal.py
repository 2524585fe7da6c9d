"""What a stage learns again: how many rows of whom, drawn how, and what its snapshot says."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import train_rows
from hypothesis import given
from hypothesis import strategies as st

from schemas.curriculum import Curriculum, DataSource, Skill
from schemas.data import TRAIN_SCHEMA
from schemas.snapshot import Origin, Snapshot, SuiteData
from sdft.data import data_hash, read_demonstrations, train_table, write_table
from sdft.modelfiles import all_files
from sdft.rehearsal import rehearsed
from tasks.home import Home
from tasks.rehearsal import with_rehearsal
from tasks.validation import verified_snapshot

RESULT = '{"statistics": {"evaluated_expectations": 9, "successful_expectations": 8}}'
ALPHA, BETA = (train_table(train_rows(20, skill)) for skill in ("alpha", "beta"))


def ids(table: pa.Table) -> list[str]:
    return table.column("id").to_pylist()


def test_own_rows_come_first_and_the_others_are_as_they_were_learned() -> None:
    own = train_table(train_rows(12, "gamma"))
    table, counts = rehearsed(own, [ALPHA, BETA], share=0.5, seed=0)
    assert counts == [3, 3]
    assert table.slice(0, 12) == own
    for number, source in enumerate((ALPHA, BETA)):
        part = table.slice(12 + 3 * number, 3).to_pylist()
        places = [source.to_pylist().index(row) for row in part]
        assert places == sorted(set(places))


def test_which_rows_is_a_matter_of_the_seed() -> None:
    own = train_table(train_rows(12, "gamma"))
    drawn = {tuple(ids(rehearsed(own, [ALPHA], 0.5, seed)[0])[12:]) for seed in range(5)}
    assert len(drawn) == 5
    assert rehearsed(own, [ALPHA], 0.5, 3)[0] == rehearsed(own, [ALPHA], 0.5, 3)[0]


@given(
    there=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    own=st.integers(1, 20),
    share=st.floats(0.0, 1.0),
)
def test_as_many_of_each_skill_as_there_are(there: list[int], own: int, share: float) -> None:
    earlier = [train_table(train_rows(rows, f"skill{n}")) for n, rows in enumerate(there)]
    table, counts = rehearsed(train_table(train_rows(own, "own")), earlier, share, seed=1)
    assert sum(counts) == len(table) - own == min(round(share * own), sum(there))
    short = max(counts) - 1  # who has fewer than the others, less one, has given all
    assert all(got >= short or got == rows for got, rows in zip(counts, there, strict=True))


@pytest.fixture
def home(tmp_path: Path) -> Home:
    made = Home(tmp_path / "home")
    made.data.mkdir(parents=True)
    return made


def curriculum(share: float) -> Curriculum:
    skill = Skill(name="beta", train=DataSource(path="t.jsonl"), eval=DataSource(path="e.jsonl"))
    return Curriculum(name="demo", base_model="model", skills=(skill,), rehearsal=share)


def snapshot(home: Home, skill: str, table: pa.Table) -> SuiteData:
    """A validated skill, as far as matters here."""
    folder = home.data / skill
    folder.mkdir()
    write_table(table, folder / "rows.parquet")
    (folder / "result.json").write_text(RESULT)
    (folder / "docs.html").write_text(f"<p>{skill}</p>")
    made = Snapshot(
        name=f"{skill}/train",
        source=f"{skill}.jsonl",
        directory=str(folder),
        file=str(folder / "rows.parquet"),
        files=all_files(folder),
        data_hash=data_hash(table),
        rows=len(table),
        quarantined=0,
    ).seal()
    made.write(folder / "snapshot.json")
    return SuiteData(eval=made.model_copy(update={"name": f"{skill}/eval"}), train=made)


def test_a_snapshot_of_its_own_says_what_is_learned_again(
    home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    alpha, beta = snapshot(home, "alpha", ALPHA), snapshot(home, "beta", BETA)
    mixed = with_rehearsal(beta, {"alpha": alpha}, None, curriculum(0.5), home).train
    assert mixed is not None
    assert (mixed.rows, mixed.rehearsed, mixed.source) == (30, {"alpha": 10}, "beta.jsonl")
    assert mixed == verified_snapshot(Path(mixed.directory))
    assert {file.path for file in mixed.files} == {"rows.parquet", "result.json", "docs.html"}
    assert data_hash(pq.read_table(mixed.file)) == mixed.data_hash
    assert "learns 10 of alpha again" in capsys.readouterr().out

    assert with_rehearsal(beta, {"alpha": alpha}, None, curriculum(0.5), home).train == mixed
    assert not capsys.readouterr().out, "it was there"
    rows = Path(mixed.file)
    rows.write_bytes(rows.read_bytes()[:-1])
    again = with_rehearsal(beta, {"alpha": alpha}, None, curriculum(0.5), home).train
    assert again == mixed == verified_snapshot(Path(mixed.directory)), "what was altered, too"


def test_nothing_changes_where_there_is_nothing_to_rehearse(home: Home) -> None:
    alpha, beta = snapshot(home, "alpha", ALPHA), snapshot(home, "beta", BETA)
    assert with_rehearsal(beta, {"alpha": alpha}, None, curriculum(0.0), home) == beta
    assert with_rehearsal(alpha, {}, None, curriculum(0.5), home) == alpha
    assert beta.train is not None
    for field in ("rehearsed", "anchors", "own_hash"):
        assert field not in beta.train.text, "snapshots of before keep their hash"


def test_anchors_come_last_in_every_stage(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    alpha, beta = snapshot(home, "alpha", ALPHA), snapshot(home, "beta", BETA)
    prompts = [{"id": f"a{n}", "prompt": f"Name {n}"} for n in range(3)]
    anchors = snapshot(home, "anchors", train_table(prompts)).train
    first = with_rehearsal(alpha, {}, anchors, curriculum(0.5), home).train
    second = with_rehearsal(beta, {"alpha": alpha}, anchors, curriculum(0.5), home).train
    assert first is not None and second is not None
    assert (first.rows, first.rehearsed, first.anchors) == (23, {}, 3)
    assert (second.rows, second.rehearsed, second.anchors) == (33, {"alpha": 10}, 3)
    for mixed in (first, second):
        rows = read_demonstrations(Path(mixed.file))
        assert [one.id for one in rows if one.response is None] == ["a0", "a1", "a2"]
        assert rows[-3].messages == [{"role": "user", "content": "Name 0"}]
    said = capsys.readouterr().out
    assert "learns 3 anchors" in said and "learns 10 of alpha again, 3 anchors" in said
    without = with_rehearsal(beta, {"alpha": alpha}, anchors, curriculum(0.0), home).train
    assert without is not None and (without.rows, without.rehearsed) == (23, {})


def test_the_snapshot_says_where_all_its_rows_are_from(home: Home) -> None:
    alpha, beta = snapshot(home, "alpha", ALPHA), snapshot(home, "beta", BETA)
    anchors = snapshot(home, "anchors", train_table([{"id": "a", "prompt": "Name one"}])).train
    assert anchors is not None
    mixed = with_rehearsal(beta, {"alpha": alpha}, anchors, curriculum(0.5), home).train
    assert mixed is not None and mixed == Snapshot.read(Path(mixed.directory) / "snapshot.json")
    assert mixed.own_hash == data_hash(BETA)
    assert mixed.rehearsed_from == {
        "alpha": Origin(source="alpha.jsonl", data_hash=data_hash(ALPHA))
    }
    found = mixed.anchors_from
    assert found is not None
    assert (found.source, found.data_hash) == ("anchors.jsonl", anchors.data_hash)
    assert (found.rules, found.rules_met, found.quarantined) == (9, 8, 0)
    page = Path(mixed.directory) / "anchors-docs.html"
    assert page.read_text() == "<p>anchors</p>", "the evidence that they were validated goes along"
    assert (Path(mixed.directory) / "docs.html").read_text() == "<p>beta</p>"


def test_one_that_was_made_before_has_the_names_and_sources_of_now(home: Home) -> None:
    """Its identity is what is in it; a skill can be named anew and a file be moved."""
    alpha, beta = snapshot(home, "alpha", ALPHA), snapshot(home, "beta", BETA)
    anchors = snapshot(home, "anchors", train_table([{"id": "a", "prompt": "Name one"}])).train
    assert alpha.train and beta.train and anchors
    first = with_rehearsal(beta, {"alpha": alpha}, anchors, curriculum(0.5), home).train

    def moved(one: Snapshot, name: str) -> Snapshot:
        return one.model_copy(update={"name": name, "source": f"moved/{one.source}"})

    beta = beta.model_copy(update={"train": moved(beta.train, "renamed/train")})
    alpha = alpha.model_copy(update={"train": moved(alpha.train, "alpha/train")})
    asked = moved(anchors, "anchors")
    again = with_rehearsal(beta, {"alpha": alpha}, asked, curriculum(0.5), home).train
    assert first and again and again.anchors_from
    assert (again.directory, again.data_hash) == (first.directory, first.data_hash)
    assert (again.name, again.source) == ("renamed/train", "moved/beta.jsonl")
    assert again.rehearsed_from["alpha"].source == "moved/alpha.jsonl"
    assert again.anchors_from.source == "moved/anchors.jsonl"
    assert again.hash == again.sealed


def test_rows_of_homes_from_before_there_were_anchors(home: Home) -> None:
    """Their files say that every row has a response."""
    beta = snapshot(home, "beta", BETA)
    assert beta.train is not None
    place = TRAIN_SCHEMA.get_field_index("response")
    strict = TRAIN_SCHEMA.set(place, TRAIN_SCHEMA.field(place).with_nullable(False))
    pq.write_table(BETA.cast(strict), beta.train.file)
    anchors = snapshot(home, "anchors", train_table([{"id": "a", "prompt": "Name one"}])).train
    mixed = with_rehearsal(beta, {}, anchors, curriculum(0.0), home).train
    assert mixed is not None and mixed.rows == 21
