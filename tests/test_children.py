"""Child processes: how they end is told, written down, and never left to chance."""

import json
import time
from pathlib import Path

import pytest

from schemas.base import BadInput
from tasks import forked
from tasks.children import ATTEMPTS, ChildFailed, run_child
from tasks.forked import Forks

PROGRAMS = {
    "well": "print('fine')",
    "refused": "print('error: rows.jsonl: row 3 is empty', file=sys.stderr); sys.exit(2)",
    "explained": "print('error: the disk is full', file=sys.stderr); sys.exit(1)",
    "crashed": "print('\\n'.join(map(str, range(50)))); raise KeyError('lost')",
    "killed": "os.kill(os.getpid(), 9)",
    "asleep": "time.sleep(60)",
    "orphan": "from sdft.process import Stop; stop = Stop(); stop.listen()\n"
    "while not stop.requested: time.sleep(0.05)\nsys.exit(75)",
    "large": "kept = b'x' * (300 << 20); time.sleep(1)",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, body in PROGRAMS.items():
        (tmp_path / f"{name}_program.py").write_text(f"import os, sys, time\n{body}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(forked, "forks", Forks(preloaded=()))
    return tmp_path


def run(folder: Path, name: str, stall_timeout_s: float = 30) -> None:
    spec, log = folder / "spec.json", folder / "log.txt"
    run_child(f"{name}_program", spec, folder, log, lambda: 0, stall_timeout_s)


def last(folder: Path) -> dict[str, object]:
    return json.loads((folder / ATTEMPTS).read_text().splitlines()[-1])


@pytest.mark.parametrize(
    ("name", "error", "message", "outcome"),
    [
        ("refused", BadInput, r"^rows\.jsonl: row 3 is empty$", "refused"),
        ("explained", ChildFailed, r"failed: the disk is full \(its log: ", "failed"),
        ("crashed", ChildFailed, r"exit code 1 .*:\n(?!0\n)[\s\S]*KeyError: 'lost'", "failed"),
        ("killed", ChildFailed, r"was killed by SIGKILL \(out of memory\?\)", "killed"),
    ],
)
def test_how_a_child_ended_is_told_and_written_down(
    folder: Path, name: str, error: type[Exception], message: str, outcome: str
) -> None:
    with pytest.raises(error, match=message):
        run(folder, name)
    assert last(folder)["outcome"] == outcome
    run(folder, "well")
    assert last(folder)["outcome"] == "finished"
    assert len((folder / ATTEMPTS).read_text().splitlines()) == 2


def test_a_child_without_progress_is_ended(folder: Path) -> None:
    with pytest.raises(ChildFailed, match="made no progress for 1 s and was ended"):
        run(folder, "asleep", stall_timeout_s=1)
    assert last(folder)["outcome"] == "stalled"


def test_what_interrupts_the_caller_ends_the_child_after_it_saved(folder: Path) -> None:
    began = time.monotonic()

    def tick() -> int:
        if time.monotonic() - began > 2:
            raise KeyboardInterrupt
        return 0

    with pytest.raises(KeyboardInterrupt):
        run_child("orphan_program", folder / "s", folder, folder / "log.txt", tick, 30)
    assert last(folder)["outcome"] == "stopped"


def test_the_memory_that_a_child_took_is_written_down(folder: Path) -> None:
    run(folder, "large")
    assert 300 << 20 <= int(str(last(folder)["peak_memory_bytes"])) < 500 << 20
