"""Lineage, its proof, traces and differences on a real registry with small files."""

import errno
import json
import os
import shutil
import sqlite3
from pathlib import Path

import mlflow
import pyarrow.parquet as pq
import pytest
from botocore.exceptions import BotoCoreError
from mlflow.entities import FileInfo
from mlflow.exceptions import MlflowException
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from registry_home import RegistryHome, make_verdict

from schemas.base import BadInput
from schemas.digest import digest_file
from schemas.results import SuiteJudgement
from schemas.stage import StageRecord
from tasks import registration
from tasks.aliases import reconcile
from tasks.artifacts import local_copy, run_file
from tasks.failures import RunFailed, is_of_disk
from tasks.ledger import Ledger
from tasks.lineage import diff_versions, read_lineage
from tasks.packages import Manifest, package_uri
from tasks.promotion import rollback
from tasks.proof import Disproved, prove
from tasks.tracing import trace
from tasks.tracking import Away, as_outage

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> RegistryHome:
    """Three stages in a line, and a fourth beside them on the first with more data of skill b."""
    place = RegistryHome(tmp_path_factory.mktemp("proof"))
    first = place.grow("a")
    second = place.grow("b", first)
    one, two = place.register(first, None), None
    two = place.register(second, one)
    assert [one, two, place.register(place.grow("c", second), two)] == ["1", "2", "3"]
    assert place.register(place.grow("b", first, rows=5), "1") == "4"
    return place


def test_lineage_tells_every_stage_from_the_base_on(demo: RegistryHome) -> None:
    lineage = read_lineage(demo.home, "demo")
    assert (lineage.name, lineage.version, lineage.aliases) == ("demo", "3", ("champion",))
    assert lineage.base_hash == demo.base.model_hash
    assert [(one.version, one.skill) for one in lineage.stages] == [
        ("1", "a"),
        ("2", "b"),
        ("3", "c"),
    ]
    parents = [lineage.base_hash, *(one.model_hash for one in lineage.stages)]
    assert [one.parent_hash for one in lineage.stages] == parents[:-1]
    last = lineage.stages[-1]
    assert (last.data.rows, last.data.rules, last.data.rules_met) == (3, 2, 2)
    assert (last.settings["method"], last.settings["seed"]) == ("sdft", 0)
    assert (last.code_version, last.decision) == ("test", "pass")
    assert [entry.kind for entry in last.history] == ["registered", "verdict", "promoted"]
    assert last.scores == {"c": 0.5}


def test_references_to_versions(demo: RegistryHome) -> None:
    assert read_lineage(demo.home, "demo@candidate").version == "4"
    assert read_lineage(demo.home, "demo/2").version == "2"
    for wrong, message in [
        ("demo/9", "demo/9: is not in the ledger"),
        ("nobody", "nobody: is not in the ledger"),
        ("demo@latest", "the aliases are champion and candidate"),
        ("demo/x", "write NAME"),
    ]:
        with pytest.raises(BadInput, match=message):
            read_lineage(demo.home, wrong)


def test_trace_finds_skills_rows_data_and_models(demo: RegistryHome) -> None:
    def versions(wanted: str) -> list[str]:
        traces = trace(demo.home, wanted)
        assert traces.unread == ()
        return [one.version for one in traces.found]

    assert versions("a") == ["1", "2", "3", "4"]
    assert versions("c") == ["3"]
    lineage = read_lineage(demo.home, "demo/3")
    second = lineage.stages[1]
    hashes = demo.rows(second.run_id, "b")
    assert versions(hashes[1]) == ["2", "3", "4"], "the fourth version has that row as well"
    assert [one.found for one in trace(demo.home, hashes[1][:12]).found] == ["row 2"] * 3
    assert versions(second.data.data_hash) == ["2", "3"]
    assert versions(second.model_hash[:16]) == ["2", "3"]
    assert versions("0" * 64) == []
    with pytest.raises(BadInput, match="neither a skill that was learned nor 8 to 64 digits"):
        trace(demo.home, "abc")


def test_trace_finds_what_rests_on_a_base_model(tmp_path: Path) -> None:
    """Also where a model that was learned here is the base of another name."""
    place = RegistryHome(tmp_path)
    place.line(["a", "b"])
    place.register(place.grow("c"), None)
    first, *_ = trace(place.home, place.base.model_hash[:8]).found
    assert (first.found, first.skill, first.came_with) == ("base model", "a", "1")
    found = trace(place.home, place.base.model_hash).found
    assert [(one.version, one.came_with) for one in found] == [("1", "1"), ("2", "1"), ("3", "3")]

    learned = place.grow("a")
    other = RegistryHome(tmp_path, "other")
    other.base = learned.model
    other.line(["d", "e"])
    found = trace(place.home, learned.model.model_hash).found
    assert [(one.name, one.version, one.found) for one in found] == [
        ("demo", "1", "model hash"),
        ("demo", "2", "model hash"),
        ("other", "1", "base model"),
        ("other", "2", "base model"),
    ]


def test_trace_goes_on_without_what_is_gone_and_names_it(tmp_path: Path) -> None:
    """One name's run, another's registered model, a third's row are gone; the fourth is whole."""
    places = {name: RegistryHome(tmp_path, name) for name in ("run", "model", "row", "whole")}
    stages = {name: place.grow("a") for name, place in places.items()}
    for name, place in places.items():
        place.register(stages[name], None)
    home, client = places["whole"].home, places["whole"].client
    row, *_, last = places["whole"].rows(stages["whole"].run_id, "a")
    gone = stages["run"].run_id
    SqlAlchemyStore(home.tracking_uri, home.artifacts.as_uri())._hard_delete_run(gone)
    client.delete_registered_model("model")
    rows = run_file(client.get_run(stages["row"].run_id), "validation/a/train/rows.parquet")
    pq.write_table(pq.read_table(rows).slice(1), rows)

    for wanted in (row, last):
        traces = trace(home, wanted)
        assert [one.name for one in traces.found] == ["whole"]
        assert {one.name: one.reason for one in traces.unread} == {
            "run": f"its run {gone} is gone, and all that it kept of how it was made",
            "model": "is gone from the registry",
            "row": "its data rows are not those that were registered",
        }
    stage = stages["whole"]
    for wanted in ("a", stage.data_hash, stage.key, stage.model.model_hash, stage.parent_hash):
        traces = trace(home, wanted)
        assert (len(traces.found), traces.unread) == (4, ()), "the run is not needed"
    shutil.rmtree(home.stages)
    traces = trace(home, stage.parent_hash)
    assert [one.name for one in traces.found] == ["row", "whole"]
    assert [one.name for one in traces.unread] == ["run", "model"]


def test_diff_tells_skills_rows_and_settings(demo: RegistryHome) -> None:
    forward = diff_versions(demo.home, "demo/1", "demo/3")
    assert (forward.skills_added, forward.skills_removed) == (("b", "c"), ())
    other = diff_versions(demo.home, "demo/2", "demo/4")
    [change] = other.skills_changed
    assert (change.skill, len(change.rows_added), change.rows_removed) == ("b", 2, ())
    assert change.settings == {}
    assert other.scores == {"b": 0.0}
    assert diff_versions(demo.home, "demo/3", "demo/1").skills_removed == ("b", "c")
    assert diff_versions(demo.home, "demo/3", "demo/3").skills_changed == ()


def test_an_untouched_lineage_is_proven(demo: RegistryHome) -> None:
    proof = prove(demo.home, "demo")
    assert (proof.stages, proof.base_checked) == (3, True)
    assert proof.entries == len(Ledger(demo.home).entries())
    of_a_run = len(["record", "inputs", "curve", "rollouts", "config"]) + 2 * 4  # of validation
    assert proof.files == 3 * (of_a_run + 3), "and 3 of the package"


def test_a_stage_of_an_older_algorithm_is_still_proven(
    demo: RegistryHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("schemas.stage.ALGORITHM_VERSION", 99)
    assert prove(demo.home, "demo").stages == 3


def test_a_change_that_was_cut_short_is_no_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = RegistryHome(tmp_path)
    place.line(["a", "b"])
    with monkeypatch.context() as patch:
        patch.setattr("tasks.promotion.mirror", lambda *_: None)
        rollback(place.home, "demo")
    with pytest.raises(RunFailed, match="was cut short; run sdft reconcile demo, then ask again"):
        prove(place.home, "demo")
    reconcile(place.home, "demo")
    assert prove(place.home, "demo").stages == 1
    place.client.set_registered_model_alias("demo", "champion", "2")
    with pytest.raises(Disproved, match="the alias champion is on version 2, the ledger says 1"):
        prove(place.home, "demo")


def test_a_package_that_mlflow_handed_out_is_still_proven(
    demo: RegistryHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", demo.home.tracking_uri)
        mlflow.artifacts.download_artifacts("models:/demo@champion")
    assert prove(demo.home, "demo").stages == 3


def test_what_is_gone_is_a_lie_too(tmp_path: Path) -> None:
    place = RegistryHome(tmp_path)
    place.line(["a"])
    run_id = place.client.get_model_version("demo", "1").run_id
    run_file(place.client.get_run(run_id), "record.json").unlink()
    with pytest.raises(Disproved, match=r"record\.json"):
        prove(place.home, "demo")


@pytest.mark.parametrize(("there", "kind"), [("model", Away), ("another", Disproved)])
def test_a_store_that_does_not_give_what_it_has_is_no_lie(
    demo: RegistryHome, monkeypatch: pytest.MonkeyPatch, there: str, kind: type[Exception]
) -> None:
    """Whether it has it is another question, which it answers by its list."""
    said = "The following failures occurred while downloading one or more artifacts from s3://b:"

    def fails(*_: object, **__: object) -> None:
        raise MlflowException(f"{said}\n##### File model #####\n503 Server Error: Slow Down")

    monkeypatch.setattr("tasks.packages.package_uri", lambda *_: "s3://b/1/model")
    monkeypatch.setattr("mlflow.artifacts.download_artifacts", fails)
    listed = [FileInfo(f"1/{there}", is_dir=True, file_size=None)]
    monkeypatch.setattr("mlflow.artifacts.list_artifacts", lambda artifact_uri: listed)
    with pytest.raises(kind) as caught:
        prove(demo.home, "demo")
    expected = {
        Away: "does not give what it has: 503 Server Error: Slow Down",
        Disproved: "s3://b/1/model: is not in MLflow's store of artifacts",
    }
    assert str(caught.value).endswith(expected[kind])


def test_a_disk_that_does_not_give_what_it_has_is_no_lie(
    demo: RegistryHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(path: Path) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr("tasks.proof.digest_file", breaks)
    with pytest.raises(OSError, match=r"Input/output error: .*verdicts/") as caught:
        prove(demo.home, "demo")
    assert is_of_disk(caught.value), "so the command line says it"


def test_a_proof_has_one_versions_downloads_at_a_time(
    demo: RegistryHome, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    in_place, at_once = mlflow.artifacts.download_artifacts, []

    def download(uri: str, dst_path: str | None) -> str:
        if dst_path is None:
            return in_place(uri)
        copy = shutil.copytree(uri.removeprefix("s3:/"), Path(dst_path) / "model")
        at_once.append(len([*tmp_path.glob("*/*/model")]))
        return str(copy)

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(
        "tasks.packages.package_uri", lambda *of: f"s3:/{local_copy(package_uri(*of))}"
    )
    monkeypatch.setattr("mlflow.artifacts.download_artifacts", download)
    assert prove(demo.home, "demo").stages == 3
    assert at_once == [1, 1, 1]
    assert [*tmp_path.glob("*/*/model")] == []


def test_a_store_that_cannot_be_asked_is_no_lie(
    demo: RegistryHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is asked without a server between fails with errors of its own."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cret")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("tasks.packages.package_uri", lambda *_: "s3://b/1/model")
    with pytest.raises(BotoCoreError) as caught:
        prove(demo.home, "demo")
    said = as_outage(caught.value, demo.home.tracking_uri)
    assert isinstance(said, Away), "so the command line says it"
    assert "does not give what it has: Could not connect" in str(said)


def test_a_ledger_cut_short_is_found_by_the_registry(tmp_path: Path) -> None:
    """The chain alone cannot tell that its end is missing."""
    place = RegistryHome(tmp_path)
    place.line(["a", "b"])
    rollback(place.home, "demo")
    place.client.set_registered_model_alias("demo", "champion", "2")
    with sqlite3.connect(place.home.root / "ledger.db") as database:
        database.execute("DROP TRIGGER ledger_no_delete")
        database.execute("DELETE FROM ledger WHERE kind = 'rolled back'")
    with pytest.raises(Disproved, match="the registry knows the ledger's entry 7:"):
        prove(place.home, "demo")


def test_what_the_registry_hands_out_is_what_is_proven(tmp_path: Path) -> None:
    """MLflow serves from `storage_location`, whatever `source` says."""
    place = RegistryHome(tmp_path)
    place.line(["a"])
    evil = tmp_path / "evil"
    shutil.copytree(run_place(place), evil)
    (evil / "model" / "model.safetensors").write_text("other weights")
    with sqlite3.connect(place.home.root / "mlflow.db") as database:
        database.execute("UPDATE model_versions SET storage_location = ?", [str(evil)])
    with pytest.raises(Disproved, match=r"evil/model/model\.safetensors is not as it was"):
        prove(place.home, "demo")


def run_place(place: RegistryHome) -> Path:
    """The package of version 1."""
    version = place.client.get_model_version("demo", "1")
    return local_copy(package_uri(place.client, version))


def test_a_score_that_is_not_the_verdicts_is_a_lie(tmp_path: Path) -> None:
    place = RegistryHome(tmp_path)
    stage = place.grow("a")
    judgement = SuiteJudgement.model_validate(
        dict.fromkeys(SuiteJudgement.model_fields)
        | {"suite": "a", "role": "new skill", "decision": "pass", "reason": "", "limit": 0.1}
        | {"reference_stage": 0, "candidate": 0.5, "settings": {}}
    )
    verdict = make_verdict(stage, "pass").model_copy(update={"judgements": (judgement,)})
    place.register_judged(stage, verdict, None)
    assert prove(place.home, "demo").stages == 1
    place.client.log_metric(stage.run_id, "eval/a", 0.99, step=1)
    with pytest.raises(Disproved, match=r"the run says 0\.99 on a, its verdict 0\.5"):
        prove(place.home, "demo")


def test_the_answers_that_a_verdict_compares_with_are_proven(tmp_path: Path) -> None:
    place = RegistryHome(tmp_path)
    stage = place.grow("a")
    answers = tmp_path / "items.parquet"
    answers.write_bytes(b"what the base model said")
    counts = dict.fromkeys(("items", "scored", "errors", "invalid", "unrun"), 0)
    cell = counts | {"fingerprint": "f", "items_sha256": digest_file(answers)}
    judgement = SuiteJudgement.model_validate(
        dict.fromkeys(SuiteJudgement.model_fields)
        | {"suite": "general", "role": "general", "decision": "pass", "reason": "", "limit": 0.1}
        | {"reference_stage": 0, "settings": {}, "reference_cell": cell}
    )
    verdict = make_verdict(stage, "pass").model_copy(update={"judgements": (judgement,)})
    place.register_judged(stage, verdict, None, {"general": str(answers)})
    assert prove(place.home, "demo").stages == 1
    kept = run_file(place.client.get_run(stage.run_id), "references/general/items.parquet")
    kept.write_bytes(b"what it did not say")
    with pytest.raises(Disproved, match=r"general.items\.parquet is not what the verdict was"):
        prove(place.home, "demo")
    kept.unlink()
    with pytest.raises(Disproved, match="items.parquet"):
        prove(place.home, "demo")


def test_a_package_altered_before_it_was_registered_is_not_registered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = RegistryHome(tmp_path)
    stage = place.grow("a")
    real = registration.package_of

    def altered(uri: str) -> tuple[Path, Manifest]:
        weights = local_copy(uri) / "model" / "model.safetensors"
        weights.write_text("other weights")
        return real(uri)

    monkeypatch.setattr(registration, "package_of", altered)
    with pytest.raises(BadInput, match="does not hold the weights that were trained"):
        place.register(stage, None)
    assert Ledger(place.home).entries() == []


@pytest.mark.parametrize(
    "path", ["metrics.jsonl", "rollouts/step-000001.parquet", "model-files/config.json"]
)
def test_a_run_that_lost_what_the_trainer_wrote_is_not_registered(
    tmp_path: Path, path: str
) -> None:
    """Else the loss, or what came in its place, would be sealed as genuine."""
    place = RegistryHome(tmp_path)
    stage = place.grow("a")
    run_file(place.client.get_run(stage.run_id), path).unlink()
    with pytest.raises(BadInput, match=f"demo/1: {path} of its run is not what the trainer wrote"):
        place.register(stage, None)
    assert Ledger(place.home).entries() == []


def test_one_stage_under_two_skill_names_has_two_lineages(tmp_path: Path) -> None:
    """The name is not in the stage key, so both stand on one directory, recorded by the first."""
    place = RegistryHome(tmp_path)
    stage = place.grow("a")
    place.register(stage, None)
    other = RegistryHome(tmp_path, "other")
    again = other.grow("a").model_copy(update={"skill": "renamed"})
    run = other.client.get_run(again.run_id)
    folder = run_file(run, "validation")
    (folder / "a").rename(folder / "renamed")
    other.register(again, None)
    assert read_lineage(place.home, "other").stages[0].skill == "renamed"
    assert prove(place.home, "other").stages == 1


def test_a_second_verdict_stands_beside_the_first(tmp_path: Path) -> None:
    place = RegistryHome(tmp_path)
    stage = place.grow("a")
    version = place.register(stage, None, "ask")
    stricter = make_verdict(stage, "refuse")
    assert place.register_judged(stage, stricter, None) == version
    lineage = read_lineage(place.home, "demo@candidate")
    assert lineage.stages[0].decision == "refuse"
    decisions = [e.decision for e in lineage.stages[0].history if e.kind == "verdict"]
    assert decisions == ["ask", "refuse"]
    assert prove(place.home, "demo@candidate").stages == 1


def test_a_record_of_other_data_is_a_lie_even_with_a_fitting_manifest(tmp_path: Path) -> None:
    """Whoever rewrites a record and its manifest still has the ledger against him."""
    place = RegistryHome(tmp_path)
    stage = place.grow("a")
    place.register(stage, None)
    run = place.client.get_run(stage.run_id)
    path, manifest = run_file(run, "record.json"), run_file(run, "evidence.json")
    StageRecord.read(path).model_copy(update={"steps": 2}).write(path)
    content = json.loads(manifest.read_text())
    [listed] = [one for one in content["files"] if one["path"] == path.name]
    listed |= {"sha256": digest_file(path), "size_bytes": path.stat().st_size}
    manifest.write_text(json.dumps(content))
    with pytest.raises(Disproved, match=r"evidence\.json is not the one that was registered"):
        prove(place.home, "demo")
