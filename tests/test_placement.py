"""GPUs for programs: each has its own, none is left locked, and who wants too many is told."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows.plan import check_place
from schemas.base import BadInput
from schemas.settings import RuntimeSettings
from tasks import forked, placement
from tasks.children import run_child
from tasks.elsewhere import TRAIN
from tasks.forked import Forks
from tasks.placement import DEVICES, GIB, VISIBLE, Device, placed_on

HOLD = """
import os, sys, time
from tasks.placement import placed_on
with placed_on("cuda", int(sys.argv[1]), None, "other"):
    print(os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of two GPUs, by the setting; its folder of locks is the test's."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv(DEVICES, "0, 1")
    monkeypatch.delenv(VISIBLE, raising=False)
    monkeypatch.setattr(placement, "POLL_S", 0.05)


def other(count: int) -> tuple[subprocess.Popen[str], str]:
    """Another process that holds GPUs until its input is closed; and which it has."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_two_programs_get_two_gpus_and_a_third_waits_for_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, has = other(1)
    with placed_on("auto", 1, None, "second"):
        assert {has, os.environ[VISIBLE]} == {"0", "1"}
        looked: list[float] = []

        def sleep(seconds: float) -> None:
            looked.append(seconds)
            assert len(looked) < 200, "it is not seen that a GPU is free"
            if len(looked) == 3:
                first.kill()  # however it ends
                first.wait()

        monkeypatch.setattr(time, "sleep", sleep)
        with placed_on("cuda", 1, None, "third"):
            assert os.environ[VISIBLE] == has
        assert len(looked) == 3
        assert os.environ[VISIBLE] != has
    assert VISIBLE not in os.environ


def test_who_wants_both_gets_both_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = other(1)

    def sleep(_seconds: float) -> None:
        with placed_on("cuda", 1, None, "in between"):  # the free one is not kept while waiting
            first.kill()
            first.wait()

    monkeypatch.setattr(time, "sleep", sleep)
    with placed_on("cuda", 2, None, "both"):
        assert os.environ[VISIBLE] == "0,1"
    with pytest.raises(BadInput, match="asks for 3 GPUs .*; this machine has 2"):
        placed_on("cuda", 3, None, "many").__enter__()


def test_the_one_with_most_free_memory_is_taken_and_one_with_too_little_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there = [Device(name=name, free_bytes=size * GIB) for name, size in [("a", 8), ("b", 40)]]
    monkeypatch.setattr(placement, "devices", lambda: there)
    with placed_on("cuda", 1, None, "any"):
        assert os.environ[VISIBLE] == "b"
        freed = [Device(name="a", free_bytes=16 * GIB), there[1]]

        def sleep(_seconds: float) -> None:
            monkeypatch.setattr(placement, "devices", lambda: freed)

        monkeypatch.setattr(time, "sleep", sleep)
        with placed_on("cuda", 1, 12.0, "larger"):
            assert os.environ[VISIBLE] == "a"


def test_more_memory_than_any_has_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    there = [Device(name=name, free_bytes=GIB, total_bytes=80 * GIB) for name in "ab"]
    monkeypatch.setattr(placement, "devices", lambda: there)
    message = r"alpha: asks for 1 GPUs with 90.0 GiB each .*; 0 of .* the largest 80.0 GiB"
    with pytest.raises(BadInput, match=message):
        placed_on("cuda", 1, 90.0, "alpha").__enter__()


def test_a_comma_too_many_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEVICES, "0,")
    with pytest.raises(BadInput, match="asks for 2 GPUs .*; this machine has 1"):
        placed_on("cuda", 2, None, "both").__enter__()


def test_nothing_is_held_for_a_cpu_or_where_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with placed_on("cpu", 9, None, "stage"):
        assert VISIBLE not in os.environ
    monkeypatch.setattr(placement, "devices", list)
    with placed_on("auto", 1, None, "stage"):
        assert VISIBLE not in os.environ
    assert not (tmp_path / placement.FOLDER).exists()


def test_a_gpu_that_is_not_here_is_missed_only_by_who_trains_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_gpu = RuntimeSettings(device="cuda")
    check_place(on_gpu)
    monkeypatch.delenv(DEVICES)
    monkeypatch.setattr(placement, "_asked", list)
    with pytest.raises(BadInput, match="this machine has no CUDA device; use 'auto' or 'cpu'"):
        check_place(on_gpu)
    check_place(RuntimeSettings())
    monkeypatch.setenv(TRAIN, "train-skill/gpu")
    check_place(on_gpu)


def test_a_program_whose_flow_is_gone_still_has_its_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may still be saving its state."""
    (tmp_path / "last_program.py").write_text(
        "import os, pathlib, time\n"
        "pathlib.Path('seen').write_text(os.environ['CUDA_VISIBLE_DEVICES'])\n"
        "while not pathlib.Path('over').exists(): time.sleep(0.05)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parent.parent}")
    monkeypatch.setenv(DEVICES, "0")
    code = (
        "from pathlib import Path\nfrom tasks import forked\nfrom tasks.children import run_child\n"
        "from tasks.placement import placed_on\nhere = Path('.')\n"
        "forked.forks = forked.Forks(preloaded=())\n"
        "with placed_on('cuda', 1, None, 'flow'):\n"
        "    run_child('last_program', here / 's', here, here / 'log.txt', lambda: 0, 99)\n"
    )
    flow = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    while not (tmp_path / "seen").exists():
        assert flow.poll() is None
        os.sched_yield()
    flow.kill()
    flow.wait()
    assert (tmp_path / "seen").read_text() == "0"
    looked: list[float] = []

    def sleep(seconds: float) -> None:
        looked.append(seconds)
        if len(looked) == 2:
            (tmp_path / "over").touch()

    monkeypatch.setattr(placement.time, "sleep", sleep)
    with placed_on("cuda", 1, None, "next"):
        assert len(looked) >= 2, "the program lived, and had it"


def test_the_program_sees_what_is_held_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "look_program.py").write_text(
        "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(forked, "forks", Forks(preloaded=()))
    log = tmp_path / "log.txt"
    with placed_on("cuda", 2, None, "stage"):
        run_child("look_program", tmp_path / "s", tmp_path, log, lambda: 0, 99)
    assert log.read_text().strip() == "0,1"
