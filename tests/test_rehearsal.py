"""What a stage learns again: how many rows of whom, drawn how, and what its snapshot says."""

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import train_rows
from hypothesis import given
from hypothesis import strategies as st

from schemas.curriculum import Curriculum, DataSource, Skill
from schemas.data import TRAIN_SCHEMA
from schemas.settings import TrainingSettings
from schemas.snapshot import Origin, Snapshot, SuiteData
from sdft.data import data_hash, read_demonstrations, train_table, write_table
from sdft.modelfiles import all_files
from sdft.rehearsal import rehearsed
from tasks.basemodel import describe_model
from tasks.home import Home
from tasks.rehearsal import with_rehearsal
from tasks.validation import verified_snapshot

RESULT = '{"statistics": {"evaluated_expectations": 9, "successful_expectations": 8}}'
ALPHA, BETA = (train_table(train_rows(20, skill)) for skill in ("alpha", "beta"))


def ids(table: pa.Table) -> list[str]:
    return table.column("id").to_pylist()


def test_rows_are_as_they_were_learned_and_in_their_order() -> None:
    own = train_table(train_rows(12, "gamma"))
    parts = rehearsed(own, [ALPHA, BETA], share=0.5, seed=0)
    for part, source in zip(parts, (ALPHA, BETA), strict=True):
        places = [source.to_pylist().index(row) for row in part.to_pylist()]
        assert len(places) == 3
        assert places == sorted(set(places))


def test_which_rows_is_a_matter_of_the_seed() -> None:
    own = train_table(train_rows(12, "gamma"))
    drawn = {tuple(ids(rehearsed(own, [ALPHA], 0.5, seed)[0])) for seed in range(5)}
    assert len(drawn) == 5
    assert rehearsed(own, [ALPHA], 0.5, 3) == rehearsed(own, [ALPHA], 0.5, 3)


@given(
    there=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    own=st.integers(1, 20),
    share=st.floats(0.0, 1.0),
)
def test_as_many_of_each_skill_as_there_are(there: list[int], own: int, share: float) -> None:
    earlier = [train_table(train_rows(rows, f"skill{n}")) for n, rows in enumerate(there)]
    parts = rehearsed(train_table(train_rows(own, "own")), earlier, share, seed=1)
    counts = [len(part) for part in parts]
    assert sum(counts) == min(round(share * own), sum(there))
    short = max(counts) - 1  # who has fewer than the others, less one, has given all
    assert all(got >= short or got == rows for got, rows in zip(counts, there, strict=True))


@pytest.fixture
def home(tmp_path: Path, tiny_dir: Path) -> Home:
    """A home with a base model."""
    made = Home(tmp_path / "home")
    made.data.mkdir(parents=True)
    shutil.copytree(tiny_dir, made.models / "tiny")
    return made


def mixed_with(
    data: SuiteData,
    earlier: dict[str, SuiteData],
    anchors: Snapshot | None,
    share: float,
    home: Home,
    **limits: int,
) -> SuiteData:
    """The data of a skill's stage; limits are the skill's, which else fit all rows."""
    source = DataSource(path="rows.jsonl")
    training = TrainingSettings.model_validate({"max_new_tokens": 60} | limits)
    skill = Skill(name="beta", train=source, eval=source, training=training)
    curriculum = Curriculum(name="demo", base_model="model", skills=(skill,), rehearsal=share)
    model = describe_model(home.models / "tiny")
    return with_rehearsal(skill, data, earlier, anchors, curriculum, model, home)


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
    mixed = mixed_with(beta, {"alpha": alpha}, None, 0.5, home).train
    assert mixed is not None
    assert (mixed.rows, mixed.rehearsed, mixed.source) == (30, {"alpha": 10}, "beta.jsonl")
    assert mixed == verified_snapshot(Path(mixed.directory))
    assert {file.path for file in mixed.files} == {"rows.parquet", "result.json", "docs.html"}
    assert data_hash(pq.read_table(mixed.file)) == mixed.data_hash
    assert "learns 10 of alpha again" in capsys.readouterr().out

    assert mixed_with(beta, {"alpha": alpha}, None, 0.5, home).train == mixed
    assert not capsys.readouterr().out, "it was there"
    rows = Path(mixed.file)
    rows.write_bytes(rows.read_bytes()[:-1])
    again = mixed_with(beta, {"alpha": alpha}, None, 0.5, home).train
    assert again == mixed == verified_snapshot(Path(mixed.directory)), "what was altered, too"


def test_nothing_changes_where_there_is_nothing_to_rehearse(home: Home) -> None:
    alpha, beta = snapshot(home, "alpha", ALPHA), snapshot(home, "beta", BETA)
    assert mixed_with(beta, {"alpha": alpha}, None, 0.0, home) == beta
    assert mixed_with(alpha, {}, None, 0.5, home) == alpha
    assert beta.train is not None
    for field in ("rehearsed", "anchors", "own_hash"):
        assert field not in beta.train.text, "snapshots of before keep their hash"


def test_anchors_come_last_in_every_stage(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    alpha, beta = snapshot(home, "alpha", ALPHA), snapshot(home, "beta", BETA)
    prompts = [{"id": f"a{n}", "prompt": f"Name {n}"} for n in range(3)]
    anchors = snapshot(home, "anchors", train_table(prompts)).train
    first = mixed_with(alpha, {}, anchors, 0.5, home).train
    second = mixed_with(beta, {"alpha": alpha}, anchors, 0.5, home).train
    assert first is not None and second is not None
    assert (first.rows, first.rehearsed, first.anchors) == (23, {}, 3)
    assert (second.rows, second.rehearsed, second.anchors) == (33, {"alpha": 10}, 3)
    for mixed in (first, second):
        rows = read_demonstrations(Path(mixed.file))
        assert [one.id for one in rows if one.response is None] == ["a0", "a1", "a2"]
        assert rows[-3].messages == [{"role": "user", "content": "Name 0"}]
    said = capsys.readouterr().out
    assert "learns 3 anchors" in said and "learns 10 of alpha again, 3 anchors" in said
    without = mixed_with(beta, {"alpha": alpha}, anchors, 0.0, home).train
    assert without is not None and (without.rows, without.rehearsed) == (23, {})


def test_what_does_not_fit_a_later_skill_is_left_out_there(
    home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    """And changes nothing for the skill that it is of."""
    rows = train_rows(20, "alpha")
    for row in rows[::2]:
        row["response"] = "x" * 40
    alpha = snapshot(home, "alpha", train_table(rows))
    beta = snapshot(home, "beta", BETA)
    prompts = [{"id": f"a{n}", "prompt": "Name " + "x" * n} for n in (1, 100)]
    anchors = snapshot(home, "anchors", train_table(prompts)).train
    known = {"alpha": alpha}
    mixed = mixed_with(beta, known, anchors, 1.0, home, max_new_tokens=30, max_prompt_tokens=90)
    assert mixed.train is not None
    assert (mixed.train.rehearsed, mixed.train.anchors, mixed.train.rows) == ({"alpha": 10}, 1, 31)
    said = read_demonstrations(Path(mixed.train.file))
    assert max(len(one.response or "") for one in said) < 30
    assert "learns 10 of alpha again, 1 anchors; 11 rows do not fit" in capsys.readouterr().out
    none = mixed_with(beta, {}, anchors, 0.0, home, max_prompt_tokens=5).train
    assert none is not None and (none.rows, none.anchors, none.anchors_from) == (20, 0, None)
    longer = mixed_with(beta, known, anchors, 1.0, home)
    assert longer.train is not None and longer.train.rehearsed == {"alpha": 20}


def test_the_snapshot_says_where_all_its_rows_are_from(home: Home) -> None:
    alpha, beta = snapshot(home, "alpha", ALPHA), snapshot(home, "beta", BETA)
    anchors = snapshot(home, "anchors", train_table([{"id": "a", "prompt": "Name one"}])).train
    assert anchors is not None
    mixed = mixed_with(beta, {"alpha": alpha}, anchors, 0.5, home).train
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
    first = mixed_with(beta, {"alpha": alpha}, anchors, 0.5, home).train

    def moved(one: Snapshot, name: str) -> Snapshot:
        return one.model_copy(update={"name": name, "source": f"moved/{one.source}"})

    beta = beta.model_copy(update={"train": moved(beta.train, "renamed/train")})
    alpha = alpha.model_copy(update={"train": moved(alpha.train, "alpha/train")})
    asked = moved(anchors, "anchors")
    again = mixed_with(beta, {"alpha": alpha}, asked, 0.5, home).train
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
    mixed = mixed_with(beta, {}, anchors, 0.0, home).train
    assert mixed is not None and mixed.rows == 21


def test_the_order_of_the_skills_before_decides_who_gives_a_row_more(home: Home) -> None:
    alpha, beta = (
        snapshot(home, skill, table) for skill, table in (("alpha", ALPHA), ("beta", BETA))
    )
    gamma = snapshot(home, "gamma", train_table(train_rows(10, "gamma")))
    there = {"alpha": alpha, "beta": beta}
    first, turned = (
        mixed_with(gamma, earlier, None, 0.5, home).train
        for earlier in (there, dict(reversed(there.items())))
    )
    assert first is not None and turned is not None
    assert sorted(first.rehearsed.values()) == sorted(turned.rehearsed.values()) == [2, 3]
    assert first.rehearsed != turned.rehearsed
