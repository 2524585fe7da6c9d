"""What gc may take, and what it must never touch."""

import shutil
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import train_rows
from registry_home import RegistryHome, make_verdict
from sqlalchemy import update

from schemas.snapshot import SNAPSHOT, AnchorsOrigin, Origin, SuiteData
from schemas.stage import StageRecord
from sdft.record import RECORD
from tasks import garbage
from tasks.garbage import collect
from tasks.home import Home
from tasks.leases import LEASE_S, holders, leased, myself
from tasks.ledger import Ledger
from tasks.ledger_tables import LEASES
from tasks.parcels import (
    EXPERIMENT,
    LIST,
    all_parcels,
    model_name,
    remove_parcel,
    send_data,
    send_stage,
)
from tasks.proof import prove
from tasks.publishing import JudgedStage, publish_stages
from tasks.stagefiles import WAITING
from tasks.tracking import LOGGED, Away


@pytest.fixture
def place(tmp_path: Path) -> RegistryHome:
    place = RegistryHome(tmp_path)
    place.line(["a", "b"])
    return place


def found(place: RegistryHome, remove: bool = False, age_s: float = 0.0) -> dict[str, str]:
    return {one.path: one.what for one in collect(place.home, age_s, remove)}


def test_nothing_that_a_version_rests_on_is_garbage(place: RegistryHome) -> None:
    assert found(place, remove=True) == {}
    assert prove(place.home, "demo").stages == 2


def test_data_that_a_stages_data_were_mixed_from_are_no_garbage(place: RegistryHome) -> None:
    """The skill's own rows, those that it learned again, and the anchors."""
    again, asked = (
        place.snapshot(name, f"{name}/train", train_rows(2, name)) for name in ("again", "asked")
    )

    def mixed(data: SuiteData) -> SuiteData:
        own = data.train
        assert own is not None
        made = place.snapshot("mixed", own.name, train_rows(7, "mixed"))
        asked_for = {"source": "", "quarantined": 0, "rules": 2, "rules_met": 2}
        parts = {
            "own_hash": own.data_hash,
            "rehearsed_from": {"again": Origin(source="", data_hash=again.data_hash)},
            "anchors_from": AnchorsOrigin.model_validate(
                asked_for | {"data_hash": asked.data_hash}
            ),
        }
        made = made.model_copy(update=parts).seal()
        made.write(Path(made.directory) / SNAPSHOT)
        return data.model_copy(update={"train": made})

    place.snapshot("other", "other/train", train_rows(3, "other"))
    place.register(place.grow("c", mix=mixed), None)
    assert found(place) == {"data/other": "data that no version rests on"}


def test_what_nothing_reaches_is_told_with_its_size_and_removed_on_demand(
    place: RegistryHome,
) -> None:
    home = place.home
    lost = place.grow("c")  # never registered
    stage = str(Path(lost.directory).relative_to(home.root))
    kept = next(path for path in home.stages.iterdir() if str(path) != lost.directory)
    (kept / "checkpoints" / "step-000001").mkdir(parents=True)
    (kept / "checkpoints" / "step-000001" / "model.safetensors").write_bytes(b"x" * 1000)
    shutil.copytree(kept, kept.with_name(f"{kept.name}.7"))
    (home.cells / ("0" * 64)).mkdir(parents=True)
    orphan = place.client.create_logged_model(
        place.client.get_experiment_by_name("demo").experiment_id,
        name="demo-c",
        tags={"sdft.stage_key": "k"},
    )
    foreign = place.client.create_logged_model("0", name="not-of-ours")
    expected = {
        stage: "a stage that is not registered",
        f"stages/{kept.name}/checkpoints": "checkpoints of a finished stage",
        f"stages/{kept.name}.7": "work on a stage that is finished",
        f"cells/{'0' * 64}": "a score of a model that is gone",
        orphan.artifact_location: "a package that became no version",
    }
    [data] = [p for p in home.data.iterdir() if p.name.startswith("c-")]
    expected[f"data/{data.name}"] = "data that no version rests on"
    assert found(place, age_s=3600) == {}, "it may be needed yet"
    assert found(place) == expected
    assert found(place) == expected, "nothing was removed by looking"
    sizes = {one.path: one.size_bytes for one in collect(home, 0, remove=False)}
    assert sizes[f"stages/{kept.name}/checkpoints"] == 1000
    assert found(place, remove=True) == expected
    assert found(place) == {}
    assert prove(home, "demo").stages == 2
    assert place.client.get_logged_model(foreign.model_id).model_id == foreign.model_id


def test_nothing_is_removed_where_mlflow_cannot_be_asked(
    place: RegistryHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.grow("c")
    before = sorted(place.home.root.rglob("*"))
    with monkeypatch.context() as away:
        mlflow_is_away(away)
        with pytest.raises(Away, match="MLflow does not answer"):
            found(place, remove=True)
    assert sorted(place.home.root.rglob("*")) == before
    assert found(place) != {}


def test_a_finished_stage_stays_until_mlflow_has_it(place: RegistryHome) -> None:
    """With its parent's scores and its data: all of it is brought there from the files."""
    lost = place.grow("c")
    logged = place.client.get_run(lost.run_id).data.tags[LOGGED]
    place.client.delete_tag(lost.run_id, LOGGED)  # as a run is left that MLflow went away from
    assert found(place, remove=True) == {}
    place.client.set_tag(lost.run_id, LOGGED, logged)
    assert set(found(place).values()) == {
        "a stage that is not registered",
        "data that no version rests on",
    }


def test_a_judged_stage_stays_until_it_is_registered(
    place: RegistryHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow had all of it, and went away before there was a version of it."""
    stage = place.grow("c")
    verdict = make_verdict(stage, "pass")
    judged = [JudgedStage(trained=stage, cells={}, verdict=verdict, references={}, parent_stage=0)]
    with leased("a run", "demo", place.home) as fence:
        with monkeypatch.context() as away:
            mlflow_is_away(away)
            assert publish_stages.fn("demo", judged, {}, fence, str(place.home.root)) == {}
        assert found(place, remove=True) == {}
        assert publish_stages.fn("demo", judged, {}, fence, str(place.home.root)) == {1: "3"}
    assert not (Path(stage.directory) / WAITING).exists()
    assert found(place) == {}


def test_a_parcel_goes_when_its_model_is_registered_and_nobody_is_at_work(
    place: RegistryHome,
) -> None:
    """Those of models that are not registered yet are the only ones there are."""
    home, lost = place.home, place.grow("c")
    names = {
        send_stage(home, path, StageRecord.read(path / RECORD)).name
        for path in home.stages.iterdir()
    }
    mine = {model_name(lost.model.model_hash)}
    data = send_data(home, home.data / "a-3")
    with leased("another run", "demo", home):
        assert not parcels(found(place, remove=True))
    sizes = {one.path: one.size_bytes for one in collect(home, 0, remove=False)}
    assert parcels(sizes) == names - mine | {data}
    assert min(sizes.values()) > 0
    assert parcels(found(place, remove=True)) == names - mine | {data}
    assert all_parcels(home).keys() == mine
    assert [path.name for path in (home.artifacts / EXPERIMENT).iterdir()] == [*mine]


def test_what_is_left_of_a_parcel_goes_too(place: RegistryHome) -> None:
    """A removal, or a sender, that was killed halfway."""
    name = send_data(place.home, place.home.data / "a-3")
    folder = place.home.artifacts / EXPERIMENT / name
    (folder / LIST).unlink()
    with leased("another run", "demo", place.home):
        assert not parcels(found(place, remove=True)), "it may be on its way"
    assert found(place, remove=True)[f"{EXPERIMENT}/{name}"] == "a part of a parcel"
    assert not folder.exists()


def test_a_machine_that_is_gone_keeps_no_parcel(
    place: RegistryHome, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(LEASE_S, "1")
    name = send_data(place.home, place.home.data / "a-3")
    with leased("a run of a pod", "demo", place.home):
        pass
    ledger, pod = Ledger(place.home), myself().model_copy(update={"machine": "a pod"})
    with ledger.transaction() as connection:
        connection.execute(update(LEASES).values(holder=pod.model_dump_json()))
    assert parcels(found(place, remove=True)) == {name}
    assert "released, process" in " ".join(capsys.readouterr().out.split())
    assert holders(ledger) == {}


def test_parcels_stay_from_the_moment_that_a_run_begins(
    place: RegistryHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = {send_data(place.home, place.home.data / name) for name in ("a-3", "b-3")}
    with ExitStack() as held:

        def and_a_run_begins(home: Home, name: str) -> None:
            remove_parcel(home, name)
            held.enter_context(leased("another run", "demo", home))

        monkeypatch.setattr(garbage, "remove_parcel", and_a_run_begins)
        removed = parcels(found(place, remove=True))
    assert len(removed) == 1
    assert all_parcels(place.home).keys() == sent - removed


def mlflow_is_away(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def parcels(found: Iterable[str]) -> set[str]:
    return {path.removeprefix(f"{EXPERIMENT}/") for path in found if path.startswith(EXPERIMENT)}
