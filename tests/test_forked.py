"""Programs as forks: each is as a new process would be, and what forks them is no weak point."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from schemas.stage import EXIT_STOPPED
from sdft.process import is_locked
from tasks import forked
from tasks.failures import RunFailed
from tasks.forked import Forked, Forks

LOOKS = """
import json, os, sys
print(json.dumps({
    "name": __name__,
    "arguments": sys.argv[1:],
    "variable": os.fsencode(os.environ["SEEN"]).hex(),
    "leads": os.getpgid(0) == os.getpid(),
}))
sys.exit(7)
"""
WAITS = """
import sys, time
from sdft.process import Stop
stop = Stop()
stop.listen()
print("waits", flush=True)
while not stop.requested:
    time.sleep(0.02)
sys.exit(75)
"""
SLOWED = """
import os, time
real = os.setpgid

def setpgid(process, group):
    real(process, group)
    while process == 0 and not os.path.exists("over"):
        time.sleep(0.02)

os.setpgid = setpgid
"""
SLOW = """
import os, time
open("begun", "w")
while not os.path.exists("over"):
    time.sleep(0.02)
"""
FLOW = """
import fcntl, os, sys, time
from pathlib import Path
from tasks import forked
forked.forks = forked.Forks(preloaded=tuple(sys.argv[1:]))
os.makedirs("held", exist_ok=True)
lock = os.open("held/.lock", os.O_RDWR | os.O_CREAT)
os.set_inheritable(lock, True)
fcntl.flock(lock, fcntl.LOCK_EX)
with Path("log.txt").open("ab") as log:
    running = forked.Forked(["waits"], log.fileno())
print(running.pid, flush=True)
time.sleep(99)
"""
TOUCHES_NO_GPU = """
from importlib import import_module
import torch
from pathlib import Path
from tasks.forked import PRELOADED

def touched(*_):
    raise AssertionError("CUDA is there before the fork")

for name in ("is_available", "device_count", "init", "_lazy_init", "current_device"):
    setattr(torch.cuda, name, touched)
assert PRELOADED
for module in PRELOADED:
    import_module(module)
maps = Path("/proc/self/maps")
assert not maps.exists() or "libcuda.so" not in maps.read_text()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, body in {"looks": LOOKS, "waits": WAITS, "broken": "import nothing_like_it"}.items():
        (tmp_path / f"{name}.py").write_text(body)
    (tmp_path / "library.py").write_text("print('imported')\nopen('imported', 'a').write('once')\n")
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "slowed.py").write_text(SLOWED)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(forked, "forks", Forks(preloaded=()))
    return tmp_path


def start(*program: str) -> Forked:
    with Path("log.txt").open("ab") as log:
        return Forked([*program], log.fileno())


def server_of(program: Forked) -> psutil.Process:
    """What forked a program: the parent of the process that waits for it."""
    waiting = psutil.Process(program.pid).parent()
    assert waiting is not None
    server = waiting.parent()
    assert server is not None
    return server


def await_running(programs: int) -> None:
    """So many have said that they wait."""
    end = time.monotonic() + 30
    while Path("log.txt").read_text().count("waits") < programs:
        assert time.monotonic() < end, Path("log.txt").read_text()
        time.sleep(0.02)


def await_end(process: psutil.Process) -> None:
    """It is gone, or is waited for by nobody."""
    end = time.monotonic() + 30
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end, f"lives on: {process}"
        time.sleep(0.02)


def test_a_program_finds_all_as_a_new_process_would(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start("looks").wait()  # an earlier one, with another environment
    Path("log.txt").unlink()
    monkeypatch.setitem(os.environ, "SEEN", os.fsdecode(b"\xff\n of today"))
    assert start("looks", "one", "two words").wait() == 7
    assert json.loads(Path("log.txt").read_text()) == {
        "name": "__main__",
        "arguments": ["one", "two words"],
        "variable": b"\xff\n of today".hex(),
        "leads": True,
    }


def test_libraries_are_imported_once_and_a_program_among_them_runs_each_time(
    folder: Path,
) -> None:
    (folder / "program.py").write_text("import library\nprint('runs', __name__)\n")
    forked.forks = Forks(preloaded=("library", "program"))
    assert [start("program").wait() for _ in range(2)] == [0, 0]
    assert Path("log.txt").read_text() == "runs __main__\n" * 2
    assert Path("imported").read_text() == "once"


def test_several_run_at_once_and_each_tells_its_own_end(folder: Path) -> None:
    first, second, third = (start("waits") for _ in range(3))
    await_running(3)
    assert [one.poll() for one in (first, second, third)] == [None] * 3
    os.kill(second.pid, signal.SIGKILL)
    assert second.wait() == -signal.SIGKILL
    os.killpg(third.pid, signal.SIGTERM)
    assert third.wait() == EXIT_STOPPED
    assert first.wait(0.1) is None
    first.close()
    await_end(psutil.Process(first.pid))


def test_what_forks_is_not_missed(folder: Path) -> None:
    """Who runs already ends and is told of as before; the next one has another."""
    running = start("waits")
    await_running(1)
    server = server_of(running)
    server.kill()
    await_end(server)
    following = start("waits")
    await_running(2)
    assert server_of(following).pid != server.pid
    for one in (running, following):
        os.killpg(one.pid, signal.SIGTERM)
        assert one.wait() == EXIT_STOPPED


def test_a_signal_for_our_group_or_terminal_is_not_for_what_forks(folder: Path) -> None:
    running = start("waits")
    assert os.getsid(running.pid) == server_of(running).pid != os.getsid(0)
    os.killpg(running.pid, signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    assert server_of(start("waits")).is_running()


def test_a_signal_that_all_get_does_not_hide_how_a_program_ends(folder: Path) -> None:
    """As systemd sends it to everybody in a group of its own."""
    running = start("waits")
    await_running(1)
    program = psutil.Process(running.pid)
    for one in (*program.parents()[:2], program):
        one.terminate()
    assert running.wait() == EXIT_STOPPED


def test_a_signal_that_comes_before_a_program_can_take_it_is_not_lost(folder: Path) -> None:
    forked.forks = Forks(preloaded=("slowed",))
    running = start("waits")
    os.kill(running.pid, signal.SIGTERM)
    Path("over").touch()
    assert running.wait(30) == -signal.SIGTERM


def test_libraries_that_cannot_be_imported_are_told_by_who_needs_them(folder: Path) -> None:
    forked.forks = Forks(preloaded=("broken",))
    assert start("broken").wait() == 1
    assert "No module named 'nothing_like_it'" in Path("log.txt").read_text()
    assert start("waits").poll() is None


def test_that_nothing_can_be_forked_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RunFailed, match="^waits cannot be started: what is to fork it has died$"):
        start("waits")


def test_libraries_that_never_arrive_are_not_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forked, "START_S", 1.0)
    forked.forks = Forks(preloaded=("slow",))
    with pytest.raises(RunFailed, match="^waits has not started in 1 s"):
        start("waits")
    monkeypatch.setattr(forked, "START_S", 30.0)
    Path("over").touch()
    assert start("waits").poll() is None, "another one forks it"


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
def test_what_interrupts_us_while_libraries_are_imported_starts_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, end: type[BaseException]
) -> None:
    monkeypatch.setenv("SEEN", "")
    forked.forks = Forks(preloaded=("slow",))

    def interrupt(*_: object) -> None:
        raise end

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 1)
    try:
        with pytest.raises(end) as kept:  # with all that it holds
            start("waits")
    finally:
        signal.signal(signal.SIGALRM, before)
    Path("over").touch()
    assert start("looks").wait() == 7, "after the one before would have begun"
    assert "waits" not in Path("log.txt").read_text(), kept


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_who_is_killed_while_libraries_are_imported_leaves_nothing(
    folder: Path, sent: signal.Signals
) -> None:
    """Its output ends with it, and, after the import, its lock; no program begins."""
    flow = subprocess.Popen(
        [sys.executable, "-c", FLOW, "slow"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while not (Path("begun").exists() and Path("log.txt").exists()):
        time.sleep(0.02)
    time.sleep(0.2)  # it waits for the program by now
    flow.send_signal(sent)
    flow.communicate(timeout=30)  # while the import goes on: else its output is held
    assert is_locked(Path("held"))
    Path("over").touch()
    end = time.monotonic() + 30
    while is_locked(Path("held")):
        assert time.monotonic() < end, "who is gone still has its lock"
        time.sleep(0.02)
    assert Path("log.txt").read_text() == ""


def test_when_the_flow_is_killed_its_program_stops_and_nothing_is_left(folder: Path) -> None:
    flow = subprocess.Popen(
        [sys.executable, "-c", FLOW], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert flow.stdout is not None
    program = psutil.Process(int(flow.stdout.readline()))
    await_running(1)
    family = [program, *program.parents()[:2]]
    flow.kill()
    assert flow.stdout.read() == "", "nobody keeps its output open"
    for one in family:
        await_end(one)


@pytest.mark.slow
def test_nothing_that_is_imported_before_a_fork_touches_a_gpu() -> None:
    subprocess.run([sys.executable, "-c", TOUCHES_NO_GPU], check=True)
