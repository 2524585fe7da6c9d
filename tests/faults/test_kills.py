"""The kill campaign: SIGKILL all over a run, and the same command again after each.

Every chain is one home. At each of its points, in the order in which a run passes them, the run is
killed; the next run goes on and is killed at the next point. What comes out in the end must be, to
the byte, what an undisturbed run makes.
"""

import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from learning import EVERY, SKILLS, STEPS, Learning, Point

from sdft.chain import first_break
from sdft.process import is_locked
from sdft.stagelog import METRICS, read_metrics
from tasks.aliases import alias_version, drift
from tasks.ledger import Ledger
from tasks.proof import prove
from tasks.tracking import all_versions

pytestmark = [pytest.mark.slow, pytest.mark.faults]


def trainer(function: str, turn: int = 1, victims: str = "self") -> Point:
    return Point("sdft.train", function, turn, victims)


def flow(function: str, turn: int = 1) -> Point:
    return Point("flow", function, turn)


TRAINER = [
    trainer("sdft.data:read_demonstrations"),
    trainer("sdft.rollout:generate", 1),
    trainer("sdft.scoring:completion_hidden", 3),
    trainer("sdft.stagelog:StageLog.step", 2),
    trainer("sdft.stagelog:StageLog.flush_rollouts"),
    trainer("sdft.checkpoint:Checkpoints.save"),
    trainer("sdft.tensorfiles:save_file", 1),
    trainer("sdft.tensorfiles:save_file", 3),
    trainer("sdft.checkpoint:all_files"),
    trainer("pathlib:Path.touch"),  # between a checkpoint's name and the mark that it is whole
    trainer("sdft.checkpoint:sync"),
    trainer("sdft.stagelog:StageLog.step", 1),  # from here on there is a checkpoint
    trainer("sdft.tensorfiles:save_file", 2),
    trainer("sdft.checkpoint:sync"),
    trainer("sdft.rollout:generate", 2),
    trainer("sdft.checkpoint:Checkpoints.save"),
    trainer("sdft.record:finish_stage"),
    trainer("sdft.record:model_files"),  # between model and record
    trainer("sdft.record:code_version"),
]
BOTH = [
    trainer("sdft.rollout:generate", 1, "both"),
    trainer("sdft.rollout:generate", 2, "parent"),  # its trainer saves and ends
    trainer("sdft.stagelog:StageLog.step", 2, "both"),
    trainer("sdft.tensorfiles:save_file", 2, "parent"),
    trainer("sdft.checkpoint:Checkpoints.save", 1, "both"),
    trainer("sdft.record:model_files", 1, "both"),
    trainer("sdft.record:code_version", 1, "parent"),  # it finishes; the record is found
    Point("sdft.evaluate", "sdft.rollout:generate", 1, "both"),
    Point("sdft.evaluate", "sdft.cells:cell_of", 2, "both"),
    Point("sdft.evaluate", "sdft.cells:cell_of", 1, "parent"),
]
FLOW = [
    flow("tasks.validation:run_expectations", 2),
    flow("tasks.evaluation:run_child"),
    Point("sdft.evaluate", "sdft.cells:cell_of", 2),
    flow("tasks.training:take_over"),
    flow("tasks.training:run_child"),
    flow("tasks.training:publish"),
    flow("tasks.stagefiles:known_record"),
    flow("tasks.training:log_stage"),
    flow("mlflow:MlflowClient.log_batch", 2),
    flow("tasks.stageruns:_log_files"),
    flow("mlflow:MlflowClient.set_terminated"),
    flow("tasks.evaluation:run_child", 1),
    flow("tasks.publishing:log_scores"),
    flow("tasks.publishing:keep_verdict"),
    flow("tasks.registration:ensure_model"),
    flow("mlflow:MlflowClient.log_model_artifacts"),
    flow("mlflow:MlflowClient.create_model_version"),
    flow("tasks.registration:log_manifest", 2),
    flow("tasks.ledger:Ledger.append"),
    flow("tasks.registration:mirror"),
    flow("mlflow:MlflowClient.set_registered_model_alias"),
    flow("tasks.ledger:Ledger.advance"),
    flow("tasks.reporting:write_report"),
    flow("tasks.reporting:_mark_latest"),
]
CHAINS = {"trainer": TRAINER, "both": BOTH, "flow": FLOW}


@pytest.fixture(scope="module")
def undisturbed(prefect_server: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The model hash of each stage of a run that nobody kills."""
    place = Learning(tmp_path_factory.mktemp("undisturbed"))
    assert place.run() == 0, place.output
    check(place)
    return place.hashes()


@pytest.mark.parametrize(
    "chain", ["flow", *(pytest.param(one, marks=pytest.mark.long) for one in ("both", "trainer"))]
)
def test_whatever_is_killed_the_same_command_goes_on(
    undisturbed: dict[str, str],
    tmp_path: Path,
    chain: str,
    record_property: Callable[[str, object], None],
) -> None:
    place, points = Learning(tmp_path), CHAINS[chain]
    table = [f"{'killed before':<72} steps done  lost"]
    for number, point in enumerate([*points, None]):
        left = progress(place)
        code = place.run(point)
        if number:
            lost = sum(done_again(place, key, *before) for key, before in left.items())
            assert lost <= EVERY, f"{points[number - 1]}: {lost} steps are done again"
            at = sum(steps for steps, _ in left.values())
            table.append(f"{points[number - 1]!s:<72} {at:>10}  {lost:>4}")
        if point is not None:
            dies = point.program == "flow" or point.victims != "self"
            assert code == (-signal.SIGKILL if dies else 1), f"{point}:\n{place.output[-3000:]}"
            wait_for_orphans(place)
    assert code == 0, place.output
    assert place.hashes() == undisturbed
    check(place)
    record_property("table", "\n".join(table))


def progress(place: Learning) -> dict[str, tuple[int, int]]:
    """Of each stage at work, by key: the steps in its curve, and how often it was started."""
    return {
        path.parent.name.partition(".")[0]: (len(read_metrics(path)), len(starts(path.parent)))
        for path in place.home.stages.glob(f"*.*/{METRICS}")
    }


def starts(directory: Path) -> list[int]:
    """The step after which each trainer of a stage went on, as its log says."""
    said = re.findall(r"goes on after step (\d+)", (directory / "log.txt").read_text())
    return [int(step) for step in said]


def done_again(place: Learning, key: str, steps: int, started: int) -> int:
    """How many of a stage's steps the next trainer did again, if there was one."""
    [directory] = place.home.stages.glob(f"{key}*")
    since = starts(directory)[started:]
    return max(0, steps - since[0]) if since else 0


def wait_for_orphans(place: Learning) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end and any(map(is_locked, place.home.stages.glob("*.*"))):
        time.sleep(0.1)


def check(place: Learning) -> None:
    """One version a stage, its curve whole, registry and ledger as one, all proven, no rubbish."""
    client = place.client
    versions = sorted(all_versions(client, "demo"), key=lambda one: int(one.version))
    assert [one.tags["sdft.skill"] for one in versions] == list(SKILLS)
    for version in versions:
        for metric in ("divergence", "tokens_per_s"):
            history = client.get_metric_history(version.run_id, f"train/{metric}")
            assert sorted(point.step for point in history) == list(range(1, STEPS + 1))
        assert client.get_run(version.run_id).info.status == "FINISHED"
    runs = client.search_runs([client.get_experiment_by_name("demo").experiment_id])
    assert sorted(one.info.run_name for one in runs) == sorted(
        ["demo-retention", *(f"stage-{n}-{skill}" for n, skill in enumerate(SKILLS, 1))]
    )
    entries = Ledger(place.home).entries("demo")
    assert [one.kind for one in entries] == ["registered", "verdict", "promoted"] * len(SKILLS)
    assert alias_version(client, "demo", "champion") == entries[-1].version
    assert drift(client, "demo", entries) == []
    assert first_break(entries) is None
    assert prove(place.home, "demo").stages == len(SKILLS)
    assert sorted(path.name for path in place.home.stages.iterdir()) == sorted(
        one.key[:32] for one in place.records().values()
    )
    assert not list(place.home.root.rglob(".partial-*"))
