"""Models, data and scores between two homes that share nothing but MLflow: verified, by hash."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import eval_rows, train_rows
from stages import BASIC

from schemas.base import BadInput
from schemas.results import EvaluationSpec, SuiteSpec
from schemas.settings import EvaluationSettings, LoraSettings, RuntimeSettings, TrainingSettings
from schemas.snapshot import Snapshot, SuiteData
from schemas.stage import StageRecord, StageSpec
from sdft.data import data_hash, eval_table, train_table, write_table
from sdft.modelfiles import all_files, model_files, model_hash
from sdft.record import library_versions
from tasks import evaluation, parcels, training
from tasks.basemodel import describe_model
from tasks.cache import Cache
from tasks.elsewhere import EVALUATE, TRAIN, Job
from tasks.evaluation import EvaluateOrder, evaluate_model
from tasks.failures import RunFailed
from tasks.fetching import fetch_stage
from tasks.home import Home
from tasks.leases import leased
from tasks.parcels import bring_small, is_there, model_name, received, send_model
from tasks.reconciling import tidy
from tasks.stagefiles import StageInputs, finished_dir
from tasks.training import TrainOrder, train_skill

FULL = BASIC.model_copy(update={"epochs": 1})
LORA = FULL.model_copy(update={"lora": LoraSettings(rank=4, alpha=8)})


@pytest.fixture
def homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Home, Home]:
    """Two homes with one MLflow and one ledger."""
    (tmp_path / "servers").mkdir()
    for variable, file in [("MLFLOW_TRACKING_URI", "mlflow"), ("SDFT_LEDGER_URL", "ledger")]:
        monkeypatch.setenv(variable, f"sqlite:///{tmp_path / 'servers' / file}.db")
    here, there = Home(tmp_path / "here"), Home(tmp_path / "there")
    for home in (here, there):
        home.root.mkdir()
    return here, there


@pytest.fixture
def store(homes: tuple[Home, Home]) -> Path:
    """The folder in which MLflow keeps the parcels."""
    return homes[0].artifacts / parcels.EXPERIMENT


def snapshot(home: Home, kind: str) -> Snapshot:
    directory = home.data / f"alpha-{kind}"
    directory.mkdir(parents=True)
    table = train_table(train_rows(8)) if kind == "train" else eval_table(eval_rows(3))
    write_table(table, directory / "rows.parquet")
    for name in ("result.json", "docs.html"):
        (directory / name).write_text("{}")
    made = Snapshot(
        name=f"alpha/{kind}",
        source=f"{kind}.jsonl",
        directory=str(directory),
        file=str(directory / "rows.parquet"),
        files=all_files(directory),
        data_hash=data_hash(table),
        rows=table.num_rows,
        quarantined=0,
    ).seal()
    made.write(directory / "snapshot.json")
    return made


def a_stage(home: Home, parent: Path, settings: TrainingSettings) -> tuple[StageSpec, StageInputs]:
    data = SuiteData(eval=snapshot(home, "eval"), train=snapshot(home, "train"))
    assert data.train is not None
    spec = StageSpec(
        skill="alpha",
        parent_dir=str(parent),
        parent_hash=describe_model(parent).model_hash,
        train_file=data.train.file,
        data_hash=data.train.data_hash,
        seed=0,
        training=settings,
        runtime=RuntimeSettings(device="cpu"),
    )
    return spec, StageInputs(curriculum="demo", stage=1, data=data)


def flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_a_model_arrives_once_and_is_the_same(
    homes: tuple[Home, Home], store: Path, tiny_dir: Path, tmp_path: Path
) -> None:
    here, there = homes
    shutil.copytree(tiny_dir, tmp_path / "model")
    (tmp_path / "model" / "LICENSE").write_text("yours")
    known = describe_model(tmp_path / "model").model_hash
    name = model_name(known)
    assert not is_there(there, name)
    with pytest.raises(RunFailed, match=f"{name} is not in MLflow's store"):
        received(there, name).__enter__()
    for _ in range(2):
        assert send_model(here, tmp_path / "model", known) == name
    with received(there, name) as model:
        assert model_hash(model_files(model)) == known
        assert (model / "LICENSE").read_text() == "yours"
    shutil.rmtree(store)
    with received(there, name) as again:
        assert again == model


@pytest.mark.parametrize("damage", ["file", "list", "name"])
def test_what_was_altered_in_the_store_is_not_believed(
    homes: tuple[Home, Home], store: Path, tiny_dir: Path, damage: str
) -> None:
    here, there = homes
    known = describe_model(tiny_dir).model_hash
    name = send_model(here, tiny_dir, known)
    weights = store / name / "files" / "model.safetensors"
    problem = "model.safetensors is not what it should be"
    if damage == "file":
        flip(weights)
    else:  # somebody has made the list fit
        flip(weights)
        altered = all_files(store / name / "files")
        listing = store / name / parcels.LIST
        made = parcels.Parcel(name=name, files=altered)
        if damage == "name":
            made = made.model_copy(update={"name": model_name(model_hash(altered))})
        made.write(listing)
        problem = "its list of files is not the one that it is named by"
    with pytest.raises(BadInput, match=problem):
        received(there, name).__enter__()


@pytest.mark.parametrize("path", ["../../LICENSE", "{out}/.mine", "a/./README.md", "a\0/.b"])
def test_a_list_that_leads_out_of_its_folder_is_refused(
    homes: tuple[Home, Home], store: Path, tiny_dir: Path, tmp_path: Path, path: str
) -> None:
    """Such names are in no hash, so the list still gives the one that it is named by."""
    here, there = homes
    name = send_model(here, tiny_dir, describe_model(tiny_dir).model_hash)
    content = json.loads((store / name / parcels.LIST).read_text())
    named = path.format(out=tmp_path)
    content["files"].append({"path": named, "size_bytes": 1, "sha256": "0" * 64})
    (store / name / parcels.LIST).write_text(json.dumps(content))
    with pytest.raises(BadInput, match="is no path of a file inside its directory"):
        received(there, name).__enter__()
    with pytest.raises(BadInput, match="is no path of a file inside its directory"):
        bring_small(there, name, tmp_path / "target")


KILLED = """
import os, sys
from tasks.home import Home
from tasks.parcels import _scratch
held = _scratch(Home(sys.argv[1]))
held.__enter__()
os._exit(0)
"""


def test_what_a_killed_download_left_is_removed(homes: tuple[Home, Home]) -> None:
    here, _ = homes
    subprocess.run([sys.executable, "-c", KILLED, str(here.root)], check=True)
    [left] = here.cache.iterdir()
    assert f"removed {left.relative_to(here.root)}, which was not finished" in tidy(here)
    assert not left.exists()


@pytest.mark.parametrize("settings", [FULL, LORA], ids=["full", "lora"])
def test_a_stage_is_trained_where_a_deployment_runs_to_the_same_weights(
    homes: tuple[Home, Home],
    store: Path,
    tiny_dir: Path,
    tmp_path: Path,
    settings: TrainingSettings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here, there = homes
    spec, inputs = a_stage(here, tiny_dir, settings)
    plain = Home(tmp_path / "plain")
    with monkeypatch.context() as alone:
        alone.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'alone.db'}")
        plain.root.mkdir()
        expected = train_skill.fn(spec, inputs, str(plain.root))

    def carried(job: Job, _home: Home) -> None:
        assert str(here.root) not in str(job.order["spec"]), "a path of ours means nothing there"
        training.execute(TrainOrder.model_validate(job.order), there)

    monkeypatch.setattr(training, "have_done", carried)
    monkeypatch.setenv(TRAIN, "train-skill/there")
    made = train_skill.fn(spec, inputs, str(here.root))
    assert made.trained_now and made.run_id
    assert (made.key, made.model) == (
        expected.key,
        expected.model.model_copy(update={"path": made.model.path}),
    )
    assert not [*there.stages.iterdir()], "the worker keeps its cache only"
    sent = {path.name for path in (store / model_name(made.model.model_hash)).rglob("*")}
    assert ("model.safetensors" in sent) == (settings.lora is None)
    assert ("adapter_model.safetensors" in sent) == (settings.lora is not None)

    monkeypatch.setattr(training, "have_done", lambda *_: pytest.fail("it is finished"))
    again = train_skill.fn(spec, inputs, str(here.root))
    assert (again.model, again.trained_now) == (made.model, False)
    shutil.rmtree(made.directory)
    shutil.rmtree(here.cache)
    assert fetch_stage(here, spec, "demo")
    assert describe_model(finished_dir(here, spec) / "model").model_hash == made.model.model_hash
    record = StageRecord.read(finished_dir(here, spec) / "record.json")
    with received(there, model_name(record.model_hash)) as kept:
        assert kept.parent == Cache(there.cache / "parcels").folder


def test_a_worker_that_dies_while_it_tidies_leaves_no_stage_without_a_model(
    homes: tuple[Home, Home], tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = homes
    spec, inputs = a_stage(here, tiny_dir, FULL)
    seen: list[bool] = []

    def carried(job: Job, _home: Home) -> None:
        training.execute(TrainOrder.model_validate(job.order), there)

    def keep(*_: object) -> None:  # where a SIGKILL would leave a part of the model
        seen.append(finished_dir(there, spec).exists())

    monkeypatch.setattr(training, "have_done", carried)
    monkeypatch.setattr(Cache, "keep", keep)
    monkeypatch.setenv(TRAIN, "train-skill/there")
    train_skill.fn(spec, inputs, str(here.root))
    assert seen == [False]
    assert not [*there.stages.iterdir()]


def test_an_evaluation_is_made_where_a_deployment_runs(
    homes: tuple[Home, Home], tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = homes
    items = snapshot(here, "eval")
    suite = SuiteSpec(name="alpha", file=items.file, suite_hash=items.data_hash, scorer="contains")
    model = describe_model(tiny_dir)
    how = (EvaluationSettings(max_new_tokens=8), RuntimeSettings(device="cpu"))
    expected = evaluate_model.fn("base", model, [suite], *how, str(here.root))
    shutil.rmtree(here.cells)

    given: list[EvaluateOrder] = []

    def carried(job: Job, _home: Home) -> None:
        given.append(EvaluateOrder.model_validate(job.order))
        assert given[-1].key == job.key
        evaluation.execute(given[-1], there)

    monkeypatch.setattr(evaluation, "have_done", carried)
    monkeypatch.setenv(EVALUATE, "evaluate-suites/there")
    made = evaluate_model.fn("base", model, [suite], *how, str(here.root))
    assert timeless(made) == timeless(expected)
    assert not [*there.cells.iterdir()]
    shutil.rmtree(here.cells)
    again = evaluate_model.fn("base", model, [suite], *how, str(here.root))
    assert (timeless(again), len(given)) == (timeless(expected), 1), "the store had it"

    old = {**library_versions(), "torch": "1.0+cpu"}
    other = given[0].spec.model_copy(update={"libraries": old})
    order = given[0].model_copy(update={"spec": EvaluationSpec.model_validate(other)})
    with pytest.raises(RunFailed, match="this worker has .* scores would not be comparable"):
        evaluation.execute(order, there)


def timeless(cells: dict[str, Any]) -> dict[str, Any]:
    return {suite: one.cell.model_copy(update={"seconds": 0.0}) for suite, one in cells.items()}


def test_whoever_trains_elsewhere_holds_the_stage_alone(
    homes: tuple[Home, Home], tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second worker that is given the same stage waits, and then finds it finished."""
    here, there = homes
    spec, inputs = a_stage(here, tiny_dir, FULL)
    orders: list[TrainOrder] = []
    monkeypatch.setenv(TRAIN, "train-skill/there")
    monkeypatch.setattr(
        training,
        "have_done",
        lambda job, _home: orders.append(TrainOrder.model_validate(job.order)),
    )
    with pytest.raises(RunFailed, match="has finished the stage, but it cannot be fetched"):
        train_skill.fn(spec, inputs, str(here.root))
    training.execute(orders[0], there)
    second = Home(there.root.parent / "second")
    second.root.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(training, "_train", lambda *_: pytest.fail("it is trained twice"))
        training.execute(orders[0], second)
        with leased(spec.key, "alpha", here) as fence:
            assert fence.token == 3, "each of both has held the stage"
