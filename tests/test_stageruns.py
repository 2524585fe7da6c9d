"""What a run of MLflow has of a finished stage: of this training, until a version rests on it."""

from pathlib import Path

import pytest
from registry_home import RegistryHome

from schemas.digest import digest_file
from schemas.results import Cell
from schemas.stage import StageRecord
from sdft.record import RECORD, log_files
from sdft.stagelog import METRICS
from tasks.artifacts import run_file
from tasks.evaluation import ScoredCell, log_scores
from tasks.packages import evaluation_folder
from tasks.proof import prove
from tasks.stagefiles import INPUTS, StageInputs
from tasks.stageruns import is_logged, log_stage
from tasks.tracking import LOGGED
from tasks.training import TrainedStage

pytestmark = pytest.mark.slow


@pytest.fixture
def place(tmp_path: Path) -> RegistryHome:
    return RegistryHome(tmp_path)


def train_again(stage: TrainedStage) -> StageRecord:
    """The same stage with another clock, as one that was removed and trained again leaves it."""
    directory = Path(stage.directory)
    text = (directory / METRICS).read_text()
    (directory / METRICS).write_text(text.replace('"time_ms":0', '"time_ms":7'))
    record = StageRecord.read(directory / RECORD)
    record = record.model_copy(update={"logs": log_files(directory)}).seal()
    record.write(directory / RECORD)
    return record


def inputs_of(stage: TrainedStage) -> StageInputs:
    return StageInputs.read(Path(stage.directory) / INPUTS)


def curve(place: RegistryHome, stage: TrainedStage) -> str:
    return run_file(place.client.get_run(stage.run_id), METRICS).read_text()


def test_a_stage_trained_again_before_it_was_registered_is_logged_again(
    place: RegistryHome,
) -> None:
    stage = place.grow("a")
    record = train_again(stage)
    assert not is_logged(place.home, inputs_of(stage), record)
    assert log_stage(place.home, Path(stage.directory), inputs_of(stage)) == stage.run_id
    assert is_logged(place.home, inputs_of(stage), record)
    assert '"time_ms":7' in curve(place, stage)
    place.register(stage, None)
    prove(place.home, "demo")


def test_what_a_version_rests_on_is_not_replaced(place: RegistryHome) -> None:
    stage = place.grow("a")
    place.register(stage, None)
    assert is_logged(place.home, inputs_of(stage), train_again(stage))
    log_stage(place.home, Path(stage.directory), inputs_of(stage))
    assert '"time_ms":0' in curve(place, stage)
    prove(place.home, "demo")


def test_the_parts_of_a_sharded_checkpoint_are_kept(place: RegistryHome) -> None:
    stage = place.grow("a")
    checkpoints = Path(stage.directory) / "checkpoints"
    for path in ("step-000001/model.safetensors", "step-000002/model/part-1.safetensors"):
        file = checkpoints / path
        file.parent.mkdir(parents=True)
        file.write_bytes(b"weights")
    for folder in checkpoints.iterdir():
        (folder / "manifest.json").write_text("{}")
    place.client.delete_tag(stage.run_id, LOGGED)
    log_stage(place.home, Path(stage.directory), inputs_of(stage))
    kept = run_file(place.client.get_run(stage.run_id), "checkpoints")
    assert sorted(one.relative_to(kept).as_posix() for one in kept.rglob("*.*")) == [
        "step-000001/manifest.json",
        "step-000001/model.safetensors",
        "step-000002/manifest.json",
        "step-000002/model/part-1.safetensors",
    ]


def test_answers_made_again_take_the_place_of_those_before(
    place: RegistryHome, tmp_path: Path
) -> None:
    """By another machine, say: the same questions and settings, and other bytes."""
    stage = place.grow("a")
    suite, items = tmp_path / "rows.parquet", tmp_path / "items.parquet"
    suite.write_bytes(b"items")
    for answers, score in ((b"first", 0.5), (b"second", 0.75)):
        items.write_bytes(answers)
        cell = Cell(
            model_hash=stage.model.model_hash,
            suite_hash="s",
            fingerprint="the same",
            items=4,
            scored=4,
            errors=0,
            invalid=0,
            unrun=0,
            score=score,
            interval=(0.0, 1.0),
            items_sha256=digest_file(items),
            seconds=1.0,
        )
        scored = ScoredCell(cell=cell, items_file=str(items), suite_file=str(suite))
        log_scores(place.client, stage.run_id, {"a": scored})
        run = place.client.get_run(stage.run_id)
        kept = run_file(run, f"{evaluation_folder('a')}/items.parquet")
        assert (kept.read_bytes(), run.data.metrics["eval/a"]) == (answers, score)
