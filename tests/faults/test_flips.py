"""Hundreds of random flips of one bit in every kind of file of a home: refused, or made good.

Most are read by the readers that a run uses; some are met by whole runs.
"""

import random
import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from learning import SKILLS, STEPS, Learning, Point

from schemas.base import BadInput
from schemas.digest import digest_json
from schemas.results import EvaluationSpec
from schemas.snapshot import SNAPSHOT
from schemas.stage import StageSpec
from sdft.cells import CELL, ITEMS, read_cell
from sdft.checkpoint import Checkpoints
from sdft.model import load_model
from sdft.record import RECORD, verified_record
from sdft.stagelog import METRICS, ROLLOUTS, read_metrics
from sdft.teacher import open_teacher
from tasks.fetching import fetch_stage
from tasks.home import Home
from tasks.proof import prove
from tasks.stagefiles import INPUTS, SPEC, StageInputs, finished_dir
from tasks.tracking import all_versions
from tasks.validation import verified_snapshot

pytestmark = [pytest.mark.slow, pytest.mark.faults]

FLIPS = 8
"""Of each file."""
Reader = Callable[[Path], Any]


@pytest.fixture(scope="module")
def killed(one_skill: Learning, tmp_path_factory: pytest.TempPathFactory) -> Learning:
    """A home whose trainer and flow were killed after two checkpoints."""
    place = Learning(tmp_path_factory.mktemp("killed"), skills=SKILLS[:1])
    place.prepare(one_skill)
    assert place.run(Point("sdft.train", "sdft.checkpoint:Checkpoints.save", 3, "both")) == -9
    [work] = place.home.stages.glob("*.*")
    assert len(list((work / "checkpoints").glob("step-*/COMPLETE"))) == 2
    return place


@contextmanager
def flipped(path: Path, rng: random.Random) -> Generator[None]:
    """One bit of a file is another for a while."""
    place, bit = rng.randrange(path.stat().st_size), 1 << rng.randrange(8)
    flip(path, place, bit)
    try:
        yield
    finally:
        if path.is_file():
            flip(path, place, bit)


def flip(path: Path, place: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        [byte] = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ bit]))


def flip_any(path: Path, rng: random.Random) -> None:
    flip(path, rng.randrange(path.stat().st_size), 1 << rng.randrange(8))


def cell_reader(done: Learning) -> Reader:
    """A reader of cells, told what a run tells it: models and suites."""
    wanted = {}
    for file in done.home.cells.glob("spec-*/spec.json"):
        spec = EvaluationSpec.read(file)
        wanted |= {spec.cell_key(suite): (spec, suite) for suite in spec.suites}
    return lambda path: read_cell(path, *wanted[path.name])


def readers(place: Learning, done: Learning) -> Iterator[tuple[Reader, Path, list[Path]]]:
    """What reads what: a reader, what it is given, and the files that are behind it."""
    read = cell_reader(done)
    for path in sorted(place.home.cells.glob(f"*/{CELL}")):
        yield read, path.parent, [path, path.with_name(ITEMS)]
    for path in sorted(place.home.data.glob(f"*/{SNAPSHOT}")):
        yield verified_snapshot, path.parent, sorted(path.parent.iterdir())
    for path in sorted(place.home.stages.glob(f"*/{INPUTS}")):
        yield StageInputs.read, path, [path]
    for path in sorted(place.home.stages.glob(f"*/{RECORD}")):
        stage = path.parent
        files = [path, stage / METRICS, *stage.glob(f"{ROLLOUTS}/*"), *stage.glob("model/*")]
        yield verified_record, stage, sorted(files)


@pytest.mark.parametrize("state", ["killed", "one_skill"])
def test_every_flipped_bit_is_refused_by_name(
    state: str, one_skill: Learning, request: pytest.FixtureRequest
) -> None:
    """Data, scores, inputs, records, curves, rollouts, trained weights."""
    place, rng, flips = request.getfixturevalue(state), random.Random(2), 0
    for read, path, files in readers(place, one_skill):
        whole = read(path)
        assert whole is not None
        for file in files * FLIPS:
            flips += 1
            with flipped(file, rng):
                try:
                    assert read(path) == whole, f"{file}: was believed"
                except BadInput as problem:
                    assert str(path) in str(problem)
        assert read(path) == whole
    assert flips >= 100


class Trainer:
    """What a trainer has loaded when it looks for a checkpoint."""

    def __init__(self, place: Learning) -> None:
        [self.work] = place.home.stages.glob("*.*")
        self.spec = StageSpec.read(self.work / SPEC)

    def load(self) -> tuple[int, str]:
        """The step that is gone on from, and a hash of all that was loaded."""
        lm = load_model(Path(self.spec.parent_dir), torch.device("cpu"))
        trained = dict(lm.model.named_parameters())
        optimizer = torch.optim.AdamW(trained.values())
        teacher = open_teacher(lm, None, self.spec)
        checkpoints = Checkpoints(
            self.work / "checkpoints",
            self.spec.key,
            self.spec.runtime,
            trained,
            optimizer,
            teacher,
        )
        step, metrics = checkpoints.load()
        states = [*optimizer.state_dict()["state"].values(), teacher.averages]
        tensors = [*lm.model.parameters(), *(one for state in states for one in state.values())]
        sums = [tensor.double().abs().sum().item() for tensor in tensors]
        return step, digest_json([step, metrics.decode(), *sums])


def test_every_flipped_bit_of_a_checkpoint_sets_it_aside(
    killed: Learning, capfd: pytest.CaptureFixture[str]
) -> None:
    trainer, rng = Trainer(killed), random.Random(3)
    newest = trainer.work / "checkpoints" / "step-000004"
    step, whole = trainer.load()
    assert step == 4
    bad = newest.with_name(f"bad-{newest.name}")
    newest.rename(bad)
    step, before = trainer.load()
    assert step == 2
    bad.rename(newest)
    for file in sorted(path for path in newest.iterdir() if path.stat().st_size) * FLIPS:
        with flipped(file, rng):
            found = trainer.load()
            if bad.exists():
                assert found == (2, before)
                assert f"checkpoint {newest.name} is set aside" in capfd.readouterr().out
                bad.rename(newest)
            else:  # a bit that means nothing
                assert file.suffix == ".json"
                assert found == (4, whole)
    assert trainer.load() == (4, whole)
    older = newest.with_name("step-000002")
    with flipped(newest / "model.safetensors", rng), flipped(older / "model.safetensors", rng):
        assert trainer.load()[0] == 0
        for path in (newest, older):
            path.with_name(f"bad-{path.name}").rename(path)
    assert trainer.load() == (4, whole)


def test_every_flipped_bit_of_what_the_registry_has_is_refused(
    one_skill: Learning, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A home that would fetch the stage does not."""
    rng, other = random.Random(4), Home(tmp_path)
    [record] = one_skill.records().values()
    [version] = all_versions(one_skill.client, "demo")
    run = one_skill.home.artifacts / "demo" / version.run_id / "artifacts"
    files = [run / RECORD, run / INPUTS, run / METRICS, *run.glob(f"{ROLLOUTS}/*")]
    files += [
        *run.glob("model-files/*"),
        *one_skill.home.artifacts.glob("demo/models/*/*/model/*.s*"),
    ]
    assert len(files) == 12
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", one_skill.home.tracking_uri)
        for file in files * 2:
            with flipped(file, rng):
                fetched = fetch_stage(other, record.spec, "demo")
            if fetched:  # a bit that means nothing
                assert file.suffix == ".json"
                assert verified_record(finished_dir(other, record.spec)) == record
                shutil.rmtree(finished_dir(other, record.spec))
            else:
                assert "what MLflow has of it cannot be used" in capfd.readouterr().out
            assert list(other.stages.iterdir()) == []
        assert fetch_stage(other, record.spec, "demo")


def test_a_killed_run_with_flips_all_over_ends_as_if_there_were_none(
    killed: Learning, one_skill: Learning, tmp_path: Path
) -> None:
    with as_it_was(killed.home.root, tmp_path) as rng:
        [work] = killed.home.stages.glob("*.*")
        for name in (SPEC, INPUTS, METRICS, f"{ROLLOUTS}/step-000002.parquet"):
            flip_any(work / name, rng)
        flip_any(work / "checkpoints" / "step-000004" / "optimizer.safetensors", rng)
        flip_any(min(killed.home.data.glob("*/rows.parquet")), rng)
        flip_any(min(killed.home.cells.glob(f"*/{ITEMS}")), rng)
        assert killed.run() == 0, killed.output
        assert " ".join(killed.output.split()).count("; made again") == 2, killed.output
        [stage] = killed.home.stages.iterdir()
        log = (stage / "log.txt").read_text()
        assert "checkpoint step-000004 is set aside: its files are not those" in log
        assert f"{ROLLOUTS}/step-000002.parquet is left out: it is not what was saved" in log
        assert "goes on after step 2" in log
        assert killed.hashes() == one_skill.hashes()
        check_curve(killed)


@pytest.mark.parametrize("name", [RECORD, INPUTS, METRICS, "model/model.safetensors"])
def test_a_finished_stage_with_a_flip_is_refused(
    one_skill: Learning, name: str, tmp_path: Path
) -> None:
    with as_it_was(one_skill.home.root, tmp_path) as rng:
        [stage] = one_skill.home.stages.iterdir()
        flip_any(stage / name, rng)
        assert one_skill.run() == 2, one_skill.output
        said = one_skill.output.rpartition("error: ")[2]
        assert str(stage) in said
        assert "Traceback" not in one_skill.output


def test_other_flips_of_a_finished_run_are_made_good(one_skill: Learning, tmp_path: Path) -> None:
    """Data, scores; and a stage that was removed for its flip is fetched from the registry."""
    hashes = one_skill.hashes()
    with as_it_was(one_skill.home.root, tmp_path) as rng:
        for file in (ITEMS, CELL):
            flip_any(min(one_skill.home.cells.glob(f"*/{file}")), rng)
        flip_any(min(one_skill.home.data.glob(f"*/{SNAPSHOT}")), rng)
        [stage] = one_skill.home.stages.iterdir()
        shutil.rmtree(stage)
        assert one_skill.run() == 0, one_skill.output
        assert "; made again" in one_skill.output
        assert "fetched from the registry and verified" in one_skill.output
        assert one_skill.hashes() == hashes
        check_curve(one_skill)


@contextmanager
def as_it_was(folder: Path, spare: Path) -> Generator[random.Random]:
    """Where damage is done that does not last. Open databases see what is put back."""
    shutil.copytree(folder, spare / "copy")
    try:
        yield random.Random(5)
    finally:
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
        shutil.copytree(spare / "copy", folder, dirs_exist_ok=True)


def check_curve(place: Learning) -> None:
    """One version, all of it proven, with the curve that the record vouches for."""
    [version] = all_versions(place.client, "demo")
    [curve] = place.home.stages.glob(f"*/{METRICS}")
    lines = read_metrics(curve)
    assert [line.step for line in lines] == list(range(1, STEPS + 1))
    history = place.client.get_metric_history(version.run_id, "train/divergence")
    points = {point.step: point.value for point in history}
    assert len(points) == len(history)
    assert points == {line.step: line.metrics["divergence"] for line in lines}
    assert prove(place.home, "demo").stages == 1
