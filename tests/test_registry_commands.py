"""The commands of release owners and auditors, as they are typed: output, exit codes, documents."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from mlflow.store.entities.paged_list import PagedList
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from registry_home import RegistryHome
from typer.testing import CliRunner, Result

from flows import cli
from flows.learn import Learned
from flows.reconcile import reconcile
from flows.show import show_learned
from schemas.base import BadInput
from schemas.curriculum import Curriculum, DataSource, Skill, load_curriculum
from schemas.results import MatrixRow
from schemas.stage import StageRecord
from sdft.matrix import build_matrix
from tasks.aliases import settle
from tasks.home import Home
from tasks.replay import curriculum_without
from tasks.reporting import CURRICULUM, LATEST
from tasks.status import RegisteredVersion, registry_status
from tasks.tracking import Away, all_pages, experiment
from tasks.verdicts import standing_verdict

pytestmark = pytest.mark.slow


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RegistryHome:
    """Two versions, the second champion; commands find it by SDFT_HOME."""
    place = RegistryHome(tmp_path)
    place.line(["a", "b"])
    monkeypatch.setenv("SDFT_HOME", str(place.home.root))
    monkeypatch.setenv("COLUMNS", "160")
    return place


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, arguments)


def said(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_promote_rollback_and_ledger(demo: RegistryHome) -> None:
    assert "champion: models:/demo/1, ledger entry 7 by" in said("rollback", "demo")
    assert "champion: models:/demo/2" in said("promote", "demo", "2", "--expect", "1")
    assert "ledger entry 8" in said("promote", "demo", "2"), "asked again, nothing new"
    table = said("ledger", "demo")
    assert ["rolled back" in table, "promoted" in table, "verdict pass" in table] == [True] * 3
    entries = json.loads(said("ledger", "demo", "--json"))
    assert [one["kind"] for one in entries][-2:] == ["rolled back", "promoted"]
    assert "registry and ledger agree" in said("reconcile")


def test_what_was_rolled_back_does_not_come_back_in_a_later_stage(tmp_path: Path) -> None:
    place = RegistryHome(tmp_path)
    home = ("--home", str(place.home.root))
    a = place.grow("a")
    b = place.grow("b", a)
    place.register(b, place.register(a, None))
    said("rollback", "demo", *home)
    c = place.grow("c", b)
    assert place.register(c, "2") == "3"
    champions = [one.version for one in versions_of(place) if "champion" in one.aliases]
    assert champions == ["1"], "version 3 rests on 2, which was taken away"
    assert "models:/demo/3" in said("promote", "demo", "3", *home)
    assert place.register(place.grow("d", c), "3") == "4"
    assert "models:/demo/4" in said("promote", "demo", "4", *home), "it is the champion already"


def versions_of(place: RegistryHome) -> tuple[RegisteredVersion, ...]:
    [registered] = registry_status(place.home)
    return registered.versions


def test_wrong_requests_raise_what_the_command_line_prints(demo: RegistryHome) -> None:
    for arguments, message in [
        (("promote", "demo", "7"), "demo/7: is no version in the ledger"),
        (("promote", "demo", "1", "--expect", "1"), "not 1 as expected"),
        (("ledger", "nobody"), "nobody: is not in the ledger"),
        (("lineage", "demo@latest"), "the aliases are champion and candidate; what another"),
        (("lineage", "demo", "--as", "openlineage"), "needs --out"),
        (("lineage", "demo", "--out", "tree.txt"), "--out needs --as"),
        (("lineage", "demo", "--as", "json", "--out", "/nowhere/x"), "/nowhere/x: cannot be"),
        (("reconcile", "nobody"), "nobody: is not in the ledger"),
        (("trace", "xyz"), "neither a skill that was learned nor"),
        (("diff", "demo/1", "demo/9"), "demo/9: is not in the ledger"),
        (("replay", "demo", "--without", "a"), "no curriculum named 'demo'"),
    ]:
        error = run(*arguments).exception
        assert isinstance(error, BadInput), arguments
        assert message in str(error)


def test_an_alias_that_was_moved_by_hand_is_said_by_status(demo: RegistryHome) -> None:
    assert "ledger" not in said("status")
    demo.client.set_registered_model_alias("demo", "champion", "1")
    moved = "demo: the alias champion is on version 1, the ledger says 2"
    assert f"{moved}; sdft reconcile puts it back\n" in said("status")
    assert f"{moved}: changed by hand, put back" in said("reconcile")
    assert "ledger" not in said("status")


def test_models_of_others_are_shown_and_left_alone(demo: RegistryHome) -> None:
    for name in ("bob's model", 'the "best" [bold]'):
        demo.client.create_registered_model(name)
        demo.client.create_model_version(name, "/their/model")
        demo.client.set_registered_model_alias(name, "champion", "1")
    shown = {one.name: one for one in registry_status(demo.home)}
    assert shown["bob's model"].versions[0].aliases == ("champion",)
    assert [one.drift for one in shown.values()] == [(), (), ()]
    assert "bob's model" in said("status") and 'the "best" [bold]' in said("status")


def test_a_name_that_follows_another_ledger_stops_no_other(demo: RegistryHome) -> None:
    other = RegistryHome(demo.home.root.parent, "other")
    other.line(["a"])
    demo.client.set_registered_model_tag("demo", "sdft.ledger_head", "7:another")
    demo.client.delete_registered_model_alias("other", "champion")
    result = run("reconcile")
    assert "the ledger says 1: changed by hand, put back" in result.output
    assert isinstance(result.exception, BadInput)
    assert "demo: the registry knows the ledger's entry 7:another" in str(result.exception)
    with pytest.raises(BadInput, match="demo: the registry knows the ledger's entry 7:another"):
        reconcile.fn(str(demo.home.root))


def test_what_people_are_named_and_give_as_reason_is_no_markup(
    demo: RegistryHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDFT_USER", "team[/x]")
    assert "by team[/x], " in said("rollback", "demo")
    demo.register(demo.grow("bad"), None, "refuse")
    error = run("promote", "demo", "3", "--override", os.fsdecode(b"gr\xfcn")).exception
    assert isinstance(error, BadInput)
    assert str(error) == "--override: is no UTF-8 text"


def test_an_experiment_that_was_deleted_is_said_before_and_after_training(
    demo: RegistryHome,
) -> None:
    stage = demo.grow("c")
    number = experiment(demo.client, demo.home, "demo")
    demo.client.delete_experiment(number)
    told = f"demo was deleted in MLflow; .* mlflow experiments restore --experiment-id {number}$"
    with pytest.raises(BadInput, match=told):
        settle(demo.home, "demo")
    with pytest.raises(BadInput, match=told):
        demo.register(stage, None)
    demo.client.restore_experiment(number)
    assert demo.register(stage, None) == "3"


def test_a_deleted_run_is_said_while_it_can_be_restored(demo: RegistryHome) -> None:
    run_id = demo.client.get_model_version("demo", "1").run_id
    demo.client.delete_run(run_id)
    line = "demo/1: its run was deleted, and mlflow gc would remove what proves it; to keep it: "
    assert f"{line}mlflow runs restore --run-id {run_id}\n" in said("reconcile")
    demo.client.restore_run(run_id)
    assert "demo: registry and ledger agree" in said("reconcile")


def test_a_run_that_is_gone_is_named_by_what_needs_it(demo: RegistryHome) -> None:
    run_id = demo.client.get_model_version("demo", "1").run_id
    row = demo.rows(run_id, "a")[0]
    assert f"versions that hold {row}\n" in said("trace", row), "on one line, to be copied"
    store = SqlAlchemyStore(demo.home.tracking_uri, demo.home.artifacts.as_uri())
    store._hard_delete_run(run_id)
    gone = f"demo/1: its run {run_id} is gone, and all that it kept of how it was made"
    assert f"{gone}\n" in said("reconcile")
    for arguments in (("lineage", "demo"), ("diff", "demo/1", "demo/2"), ("promote", "demo", "1")):
        error = run(*arguments).exception
        assert isinstance(error, BadInput)
        assert str(error) == gone


def test_lineage_in_every_form(demo: RegistryHome, tmp_path: Path) -> None:
    tree = said("lineage", "demo", "--verify")
    for fact in ("demo/2 (champion, candidate)", "1 a", "2 b", "3 rows", "promoted", "proven: 2"):
        assert fact in tree
    story = json.loads(said("lineage", "demo/2", "--as", "json", "--verify"))
    assert [stage["skill"] for stage in story["stages"]] == ["a", "b"]
    bom = json.loads(said("lineage", "demo", "--as", "cyclonedx"))
    assert bom["bomFormat"] == "CycloneDX"
    page = tmp_path / "page.html"
    said("lineage", "demo", "--as", "page", "--out", str(page))
    assert story["stages"][1]["model_hash"] in page.read_text()
    events = tmp_path / "events.jsonl"
    assert "4 events" in said("lineage", "demo", "--as", "openlineage", "--out", str(events))
    assert len(events.read_text().splitlines()) == 4


def test_a_version_that_was_rolled_back_says_so_in_every_form(
    demo: RegistryHome, tmp_path: Path
) -> None:
    said("rollback", "demo")
    below_1, _, below_2 = said("lineage", "demo/2").partition("2 b")
    assert ["rolled back" in below_1, "put back" in below_1] == [False, True]
    assert ["rolled back" in below_2, "put back" in below_2] == [True, False]
    last = json.loads(said("lineage", "demo/2", "--as", "json"))["stages"][1]["history"][-1]
    assert (last["kind"], last["version"], last["expected"]) == ("rolled back", "1", "2")
    page = tmp_path / "page.html"
    said("lineage", "demo/2", "--as", "page", "--out", str(page))
    overview = page.read_text().partition("<h3>Stages</h3>")[0]
    assert "<dt>Rolled back</dt>" in overview and "Put back" not in overview
    bom = json.loads(said("lineage", "demo/2", "--as", "cyclonedx"))
    told = {one["name"] for one in bom["metadata"]["component"]["properties"]}
    assert any(name.startswith("sdft:rolled-back:") for name in told)


def test_trace_and_diff(demo: RegistryHome) -> None:
    traces = json.loads(said("trace", "a", "--json"))
    assert [one["version"] for one in traces["found"]] == ["1", "2"]
    assert traces["unread"] == []
    assert "below a, learned by version 1" in said("trace", demo.base.model_hash[:8])
    assert "learned by version 2" in said("trace", "b")
    assert "no version holds" in said("trace", "0" * 16)
    assert "+ skill b" in said("diff", "demo/1", "demo")


def test_an_incomplete_trace_is_exit_code_1(demo: RegistryHome) -> None:
    row = demo.rows(demo.client.get_model_version("demo", "1").run_id, "a")[0]
    demo.client.delete_model_version("demo", "2")
    result = run("trace", row)
    assert result.exit_code == 1
    assert "row 1" in result.output
    assert "not read: demo/2, with all that is built on it: is gone from the" in result.output
    assert "error: incomplete: versions that could not be read: 1" in result.output
    assert "no version that could be read holds" in run("trace", "0" * 64).output
    as_json = run("trace", row, "--json")
    assert as_json.exit_code == 1
    traces = json.loads(as_json.stdout)
    assert [one["version"] for one in traces["found"]] == ["1", "2"]
    assert [one["version"] for one in traces["unread"]] == ["2"]
    assert run("trace", "b").exit_code == 0, "a skill is in the ledger"


def test_an_outage_is_told_as_one_and_as_nothing_else(
    demo: RegistryHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not as a matrix or curriculum that is not there, a lie, a verdict that is to be made anew."""
    key = next(demo.home.stages.glob("*/record.json"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    said = "MLflow does not answer (http://127.0.0.1:9)"
    for arguments in [("lineage", "demo", "--verify"), ("trace", "0" * 64)]:
        result = run(*arguments)
        assert (type(result.exception), str(result.exception)) == (Away, said), result.output
        assert result.output == ""
    with pytest.raises(Away):
        standing_verdict(demo.home, "demo", StageRecord.read(key).key)


@pytest.mark.parametrize(
    ("passed", "unregistered", "line"),
    [
        (False, ("a",), "champion: none, no stage of other has passed"),
        (True, ("a",), "champion: none yet, what has passed waits to be registered"),
        (True, (), "champion: none, what has passed is to be promoted; see sdft ledger other"),
    ],
)
def test_learn_says_why_there_is_no_champion(
    passed: bool, unregistered: tuple[str, ...], line: str, tmp_path: Path, capsys: Any
) -> None:
    rows = [
        MatrixRow(
            stage=stage,
            skill=skill,
            parent_stage=None,
            model_hash="0" * 64,
            passed=passed or skill is None,
            version=None,
            cells=(None,),
        )
        for stage, skill in enumerate((None, "a"))
    ]
    learned = Learned(
        matrix=build_matrix("other", ["a"], [], rows),
        verdicts=(),
        trained=("a",),
        unregistered=unregistered,
        report=None,
    )
    show_learned(learned, Home(tmp_path))
    assert line in capsys.readouterr().out.splitlines()


def test_replay_asked_again_learns_the_same_curriculum(demo: RegistryHome) -> None:
    """As long as the file is there, and what was learned last is what it says."""
    source = DataSource(path="/data/rows.jsonl")
    skills = tuple(Skill(name=name, train=source, eval=source) for name in ("a", "b", "c"))
    learned(demo, Curriculum(name="demo", base_model="/models/base", skills=skills))
    path = curriculum_without(demo.home, "demo", "b")
    learned(demo, load_curriculum(path))
    assert curriculum_without(demo.home, "demo", "b") == path
    assert [one.name for one in load_curriculum(path).skills] == ["a", "c"]
    with pytest.raises(BadInput, match="has no skill 'd'; it has a, c"):
        curriculum_without(demo.home, "demo", "d")
    path.write_text(path.read_text().replace("seed: 0", "seed: 1"))
    with pytest.raises(BadInput, match="has no skill 'b'; it has a, c"):
        curriculum_without(demo.home, "demo", "b")


def learned(place: RegistryHome, curriculum: Curriculum) -> None:
    """Make a curriculum the newest of its name, as the end of a run does."""
    experiment_id = experiment(place.client, place.home, place.name)
    run_id = place.client.create_run(experiment_id).info.run_id
    place.client.log_text(run_id, curriculum.text, f"retention/{CURRICULUM}")
    place.client.set_registered_model_tag(place.name, LATEST, run_id)


def test_status_shows_more_names_than_one_page_has(demo: RegistryHome) -> None:
    for number in range(100):
        demo.client.create_registered_model(f"name-{number:03}")
    names = [one.name for one in registry_status(demo.home)]
    assert names == ["demo", *(f"name-{number:03}" for number in range(100))]
    pages = {None: PagedList([1, 2], "a"), "a": PagedList([], "b"), "b": PagedList([3], None)}
    assert all_pages(lambda token: pages[token]) == [1, 2, 3]


def test_a_lie_is_exit_code_4_and_named(demo: RegistryHome) -> None:
    weights = next((demo.home.stages).glob("*/model/model.safetensors"))
    weights.write_text("other weights")
    result = run("lineage", "demo", "--verify")
    assert result.exit_code == 4
    assert str(weights.parent) in result.output.replace("\n", "")
