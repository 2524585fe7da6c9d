"""Lineages of stages that learn rows again and anchors, and lineages whose runs lost something."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import save_tiny_model, train_rows
from mlflow.exceptions import MlflowException
from registry_home import RegistryHome
from typer.testing import CliRunner

from flows import cli
from schemas.base import BadInput
from schemas.curriculum import Curriculum, DataSource, Skill
from schemas.settings import TrainingSettings
from schemas.snapshot import SuiteData
from sdft.data import data_hash, train_table
from tasks import lineage
from tasks.artifacts import run_file
from tasks.basemodel import describe_model
from tasks.lineage import diff_versions, read_lineage
from tasks.proof import prove
from tasks.rehearsal import with_rehearsal
from tasks.tracing import trace
from tasks.tracking import Away

pytestmark = pytest.mark.slow
NOT_DOWNLOADED = (
    "The following failures occurred while downloading one or more artifacts from m:\n"
    "##### File record.json #####\n"
)
PROMPTS = [{"id": f"p{n}", "prompt": f"Name {n}"} for n in range(2)]


def mixed_into(place: RegistryHome, *earlier: str) -> Callable[[SuiteData], SuiteData]:
    """Rows of earlier skills, half as many as there are, and two anchors."""
    anchors = place.snapshot("anchors", "anchors", PROMPTS)
    source = DataSource(path="rows.jsonl")
    training = TrainingSettings(max_new_tokens=60)
    skill = Skill(name="b", train=source, eval=source, training=training)
    curriculum = Curriculum(name="demo", base_model="model", skills=(skill,), rehearsal=0.5)
    if not (tiny := place.home.models / "tiny").is_dir():
        save_tiny_model(tiny)
    model = describe_model(tiny)
    known = {one: place.data(one, 4) for one in earlier}
    return lambda data: with_rehearsal(skill, data, known, anchors, curriculum, model, place.home)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> RegistryHome:
    """Version 1: a with anchors; 2: b with anchors and two rows of a; 3: b alone, on 1 as well."""
    place = RegistryHome(tmp_path_factory.mktemp("lineage"))
    first = place.grow("a", rows=4, mix=mixed_into(place))
    assert place.register(first, None) == "1"
    assert place.register(place.grow("b", first, 4, mixed_into(place, "a")), "1") == "2"
    assert place.register(place.grow("b", first, 4), "1") == "3"
    return place


def test_each_part_of_the_data_is_told_with_its_source(demo: RegistryHome) -> None:
    a, b = (stage.data for stage in read_lineage(demo.home, "demo/2").stages)
    assert (a.own, a.rehearsed, a.anchors, a.rows) == (4, {}, 2, 6)
    assert (b.own, b.rehearsed, b.anchors, b.rows) == (4, {"a": 2}, 2, 8)
    assert (b.source, b.rehearsed_from["a"].source) == ("b.jsonl", "a.jsonl")
    assert (
        b.rehearsed_from["a"].data_hash == a.own_hash == data_hash(train_table(train_rows(4, "a")))
    )
    for origin in (a.anchors_from, b.anchors_from):
        assert origin is not None
        assert (origin.source, origin.rules, origin.rules_met) == ("anchors.jsonl", 2, 2)
        assert origin.data_hash == data_hash(train_table(PROMPTS))
    plain = read_lineage(demo.home, "demo/3").stages[1].data
    assert (plain.own_hash, plain.anchors_from) == (plain.data_hash, None)
    assert plain.own_hash == b.own_hash
    proof = prove(demo.home, "demo/2")
    assert proof.stages == 2


def test_what_the_anchors_passed_is_kept_with_the_stage(demo: RegistryHome) -> None:
    run = demo.client.get_run(demo.client.get_model_version("demo", "2").run_id)
    kept = {path.name for path in run_file(run, "validation/b/train").iterdir()}
    assert {"anchors-result.json", "anchors-docs.html"} < kept


def test_a_trace_tells_rows_learned_again_and_anchors(demo: RegistryHome) -> None:
    def found(wanted: str) -> list[tuple[str, str, str, str]]:
        traces = trace(demo.home, wanted)
        assert traces.unread == ()
        return [(one.version, one.skill, one.learned_with, one.found) for one in traces.found]

    rows = demo.rows(demo.client.get_model_version("demo", "2").run_id, "b")
    assert found(rows[1]) == [("2", "b", "b", "row 2"), ("3", "b", "b", "row 2")]
    again = [one for one in found(rows[5]) if one[0] == "2"]
    assert [one[:3] for one in again] == [("2", "a", "a"), ("2", "a", "b")]
    assert again[1][3] == "row 6"
    anchor = found(rows[7])
    assert anchor == [
        ("1", "", "a", "row 6"),
        ("2", "", "a", "row 6"),
        ("2", "", "b", "row 8"),
        ("3", "", "a", "row 6"),
    ]
    own = data_hash(train_table(train_rows(4, "b")))
    assert [one[0] for one in found(own)] == ["2", "3"], "alone, and with other rows"
    assert {one[1] for one in found(data_hash(train_table(PROMPTS)))} == {""}


def test_traces_and_differences_as_they_are_shown(
    demo: RegistryHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")

    def said(*arguments: str) -> str:
        place = ["--home", str(demo.home.root)]
        result = CliRunner().invoke(cli.app, [*arguments, *place])
        assert result.exit_code == 0, result.output
        return result.output

    rows = demo.rows(demo.client.get_model_version("demo", "2").run_id, "b")
    assert "a, learned again with b by version 2" in said("trace", rows[5])
    assert "an anchor, learned with b by version 2" in said("trace", rows[7])
    told = said("diff", "demo/2", "demo/3")
    assert "~ skill b: 0 data rows added, 0 removed" in told
    assert "a, learned again: 0 rows added, 2 removed" in told
    assert "anchors: 0 rows added, 2 removed" in told
    tree = said("lineage", "demo/2")
    for line in (
        "data      4 rows",
        "again     2 rows of a, from a.jsonl",
        "2 of 2 rules met, from anchors.jsonl",
        "together  8 rows",
    ):
        assert line in tree


def test_data_validated_under_another_name_are_told_under_the_own_one(tmp_path: Path) -> None:
    """The mixed snapshot was there, with the name that the skill had before."""
    place = RegistryHome(tmp_path)
    first = place.grow("a", rows=4)
    place.register(first, None)
    mix, before = mixed_into(place, "a"), place.data("b", 4)
    mix(before)

    def renamed(data: SuiteData) -> SuiteData:
        assert before.train is not None
        train = before.train.model_copy(update={"name": "c/train", "source": "c.jsonl"})
        return mix(data.model_copy(update={"train": train}))

    place.register(place.grow("c", first, 4, renamed), "1")
    last = read_lineage(place.home, "demo/2").stages[-1]
    assert (last.skill, last.data.source, last.data.rehearsed) == ("c", "c.jsonl", {"a": 2})


DAMAGE: dict[str, Callable[[Path], object]] = {
    "record.json": Path.unlink,
    "validation/b/train": lambda path: path.rename(path.with_name("elsewhere")),
    "validation/b/train/snapshot.json": lambda path: path.write_text("{"),
    "validation/b/train/result.json": lambda path: path.write_text("{"),
    "validation/b/train/docs.html": Path.unlink,
    "validation/b/train/rows.parquet": lambda path: path.write_bytes(b"PAR1"),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> RegistryHome:
    place = RegistryHome(tmp_path_factory.mktemp("pair"))
    place.line(["a", "b"])
    return place


@pytest.mark.parametrize("path", DAMAGE)
def test_what_a_run_lost_is_named_with_what_to_do(pair: RegistryHome, path: str) -> None:
    run_id = pair.client.get_model_version("demo", "2").run_id
    root = run_file(pair.client.get_run(run_id), "record.json").parent
    place = root / path
    before = {one: one.read_bytes() for one in root.rglob("*") if one.is_file()}
    DAMAGE[path](place)
    try:
        rows, page = path.endswith("rows.parquet"), path.endswith("docs.html")
        for ask in (
            *([] if rows or page else [lambda: read_lineage(pair.home, "demo/2")]),
            *([] if page else [lambda: diff_versions(pair.home, "demo/1", "demo/2")]),
        ):
            with pytest.raises(BadInput) as caught:
                ask()
            said = str(caught.value)
            assert (
                said.startswith("demo/2: ") and f"of its run {run_id} is gone or cannot be" in said
            )
            assert place.name in said
            assert said.endswith(
                "sdft lineage demo/2 --verify names what is not as it was registered"
            )
        if page:
            assert read_lineage(pair.home, "demo/2").version == "2", "it is not needed for that"
    finally:
        for file, content in before.items():
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(content)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "API request to http://m/x failed with exception HTTPConnectionPool(...)",
            "MLflow does not answer",
        ),
        (
            f"{NOT_DOWNLOADED}API request to http://m/x failed with exception Pool(...)",
            "MLflow does not answer",
        ),
        (
            f"{NOT_DOWNLOADED}503 Server Error: Slow Down for url: http://s/x",
            r"MLflow's store of artifacts \(sqlite.*\) does not give what it has: 503 Server",
        ),
    ],
)
def test_an_outage_is_not_told_as_damage(
    pair: RegistryHome, monkeypatch: pytest.MonkeyPatch, said: str, told: str
) -> None:
    def away(*_: object) -> Path:
        raise MlflowException(said)

    monkeypatch.setattr(lineage, "run_file", away)
    for ask in (
        lambda: read_lineage(pair.home, "demo"),
        lambda: diff_versions(pair.home, "demo/1", "demo"),
    ):
        with pytest.raises(Away, match=told):
            ask()
