"""A disk that fills up or cannot be written, and memory that runs out, at exact places of a run.

A program stops itself at its place, the disk is filled, and the program goes on. After each fault
the same command goes on from what is finished, with room again, to the next one; what comes out in
the end is what an undisturbed run makes, to the byte.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from learning import SKILLS, STEPS, Learning, Point

from schemas.stage import FileDigest
from sdft.cells import CELL, ITEMS
from sdft.chain import first_break
from sdft.checkpoint import Manifest
from sdft.modelfiles import all_files
from sdft.record import verified_record
from sdft.stagelog import METRICS, ROLLOUTS
from tasks.ledger import Ledger
from tasks.proof import prove
from tasks.tracking import all_versions
from tasks.validation import verified_snapshot

pytestmark = [pytest.mark.slow, pytest.mark.faults]

DISK_MB, LITTLE = 160, 2**22
"""A checkpoint has 33 MB; its model, and the model of the stage, have 8 MB each."""
FULL = "No space left on device"


def pause(program: str, function: str, turn: int = 1) -> Point:
    return Point(program, function, turn, "pause")


# Where the disk fills up, how much room is left then, and what is said.
FILLED = [
    (pause("flow", "tasks.validation:run_expectations", 2), 0, f"result.json: {FULL}"),
    (pause("sdft.train", "sdft.data:read_demonstrations"), 0, "is full, so it could not say why"),
    (pause("sdft.train", "sdft.tensorfiles:save_file", 4), 0, f"step-000004: {FULL}"),
    (pause("sdft.train", "sdft.tensorfiles:save_file", 2), LITTLE, f"step-000004: {FULL}"),
    (pause("sdft.train", "sdft.record:finish_stage"), LITTLE, f"/model: {FULL}"),
    (pause("sdft.train", "sdft.record:code_version"), 0, f"record.json: {FULL}"),
    (pause("flow", "tasks.stageruns:_log_files"), LITTLE, FULL),
    (pause("sdft.evaluate", "sdft.data:write_table"), 0, f"items.parquet: {FULL}"),
    (
        pause("flow", "mlflow:MlflowClient.log_model_artifacts"),
        LITTLE,
        f"model.safetensors: {FULL}",
    ),
    (pause("flow", "mlflow:MlflowClient.create_model_version"), 0, "database or disk is full"),
    (pause("flow", "tasks.ledger:Ledger.append"), 0, "database or disk is full"),
]
GOES_ON = ("the same command goes on", "run the same command again", "is full, so it could not say")

STARVED = ["sdft.tensorfiles:load_file", "sdft.rollout:generate", "sdft.divergence:row_loss"]
"""Where a trainer that went on from a checkpoint needs memory that it has not had before."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_said_and_the_same_command_goes_on(
    one_skill: Learning, tmp_path: Path, disk: Path
) -> None:
    place = Learning(tmp_path / "files", disk, skills=SKILLS[:1])
    printed = tmp_path / "output.txt"  # what is said is not for the full disk
    (disk / "output.txt").symlink_to(printed)
    for point, room, message in FILLED:
        printed.write_text("")
        process = place.start(point)
        paused = wait_for_pause(place, process)
        try:
            before = good_checkpoints(place)
            fill(disk, room)
        finally:
            os.kill(paused, signal.SIGCONT)
        assert place.join(process) == 1, f"{point}: {place.output}"
        *_, last = place.output.split("error: ")
        said = place.output if "database" in message else last
        assert message in said.replace("\n", " "), f"{point}: {place.output}"
        assert any(text in last for text in GOES_ON), f"{point}: {place.output}"
        assert "Traceback" not in place.output, f"{point}: {place.output}"
        assert good_checkpoints(place) == before, point
        check_that_nothing_is_half_there(place)
        (disk / "ballast").unlink()
    assert place.run() == 0, place.output
    check(place, one_skill)


def test_a_disk_that_cannot_be_written_is_said_before_any_work(
    one_skill: Learning, tmp_path: Path, disk: Path
) -> None:
    place = Learning(tmp_path / "files", disk, skills=SKILLS[:1])
    program = [sys.executable, "-c", "from flows.cli import main; main()"]
    command = [*program, "learn", str(place.curriculum), "--home", str(disk)]
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    said = f"error: {disk}: cannot be used as home (Read-only file system); name a writable folder"
    assert " ".join(done.stderr.split()).startswith(said)
    assert done.stdout == ""
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert list(disk.iterdir()) == []


def test_a_trainer_without_memory_says_so_and_the_same_command_goes_on(
    one_skill: Learning, tmp_path: Path
) -> None:
    place = Learning(tmp_path, skills=SKILLS[:1])
    place.prepare(one_skill)
    assert place.run(Point("sdft.train", "sdft.checkpoint:Checkpoints.save", 2)) == 1
    before = good_checkpoints(place)
    assert list(before) == ["step-000002"]
    for function in STARVED:
        assert place.run(Point("sdft.train", function, 1, "memory")) == 1, place.output
        output = place.output.rpartition("evaluate  base")[2]
        explained = "failed: out of memory (" in output and "saved before is untouched" in output
        explained |= "failed: a single sequence does not fit into the device's memory" in output
        # Native code that asks for memory and does not look at the answer dies of it.
        assert explained or "error: sdft.train was killed by SIGSEGV (out of memory?)" in output
        assert "Traceback" not in output
        assert good_checkpoints(place) == before
    assert place.run() == 0, place.output
    check(place, one_skill)


def wait_for_pause(place: Learning, process: Any) -> int:
    """The process of a run that has stopped itself."""
    end = time.monotonic() + 120
    while time.monotonic() < end and process.is_alive():
        with suppress(psutil.Error):
            for one in (psutil.Process(process.pid), *place.programs()):
                if one.status() == psutil.STATUS_STOPPED:
                    return one.pid
        time.sleep(0.02)
    raise AssertionError("nothing has stopped itself")


def fill(disk: Path, room: int) -> None:
    """Leave so many bytes of room."""
    with (disk / "ballast").open("wb") as ballast:
        free = os.statvfs(disk)
        os.posix_fallocate(ballast.fileno(), 0, free.f_bavail * free.f_frsize - room)


def good_checkpoints(place: Learning) -> dict[str, tuple[FileDigest, ...]]:
    """The files of every checkpoint that verifies, by name."""
    found = {}
    for path in sorted(place.home.stages.glob("*/checkpoints/step-*")):
        files = all_files(path, lambda name: name.suffix in (".safetensors", ".jsonl"))
        assert (path / "COMPLETE").is_file()
        assert Manifest.read(path / "manifest.json").files == files
        found[path.name] = files
    return found


def check_that_nothing_is_half_there(place: Learning) -> None:
    """What lies under the name of a whole thing is whole, and nothing else takes room."""
    home = place.home
    assert not [path for path in home.root.rglob(".*") if path.name != ".lock"]
    for path in home.data.glob("*"):
        verified_snapshot(path)
    for path in home.cells.glob("*/"):
        assert path.name.startswith("spec-") or {CELL, ITEMS} == {
            one.name for one in path.iterdir()
        }
    for path in home.stages.glob("*/"):
        assert path.suffix or verified_record(path) is not None


def check(place: Learning, one_skill: Learning) -> None:
    """The undisturbed run's weights, one version with a whole curve, all of it proven."""
    assert place.hashes() == one_skill.hashes()
    [record], [undisturbed] = place.records().values(), one_skill.records().values()
    rollouts = [
        [file for file in one.logs if file.path.startswith(ROLLOUTS)]
        for one in (record, undisturbed)
    ]
    assert rollouts[0] == rollouts[1]
    [version] = all_versions(place.client, "demo")
    history = place.client.get_metric_history(version.run_id, "train/divergence")
    assert sorted(point.step for point in history) == list(range(1, STEPS + 1))
    artifacts = [one.path for one in place.client.list_artifacts(version.run_id)]
    assert {"record.json", METRICS, ROLLOUTS, "model-files", "validation"} <= {*artifacts}
    entries = Ledger(place.home).entries()
    assert [one.kind for one in entries] == ["registered", "verdict", "promoted"]
    assert first_break(entries) is None
    assert prove(place.home, "demo").stages == 1
