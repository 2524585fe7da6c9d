"""A program on a tether: its parent's death ends it in order, what is meant for the parent not."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

CHILD = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(f"ended in order, after {sys.argv[1:]}"))
print("began", flush=True)
time.sleep(100)
"""
PARENT = """
import sys, time
from tasks.tethered import tethered
child = tethered([sys.executable, "-m", "child", "one", "two"])
print(child.pid, flush=True)
time.sleep(100)
"""


def test_a_tethered_program_ends_when_its_parent_is_killed_and_not_before(tmp_path: Path) -> None:
    (tmp_path / "child.py").write_text(CHILD)
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    assert parent.stdout.readline() == "began\n"
    assert os.getsid(child.pid) == child.pid

    os.killpg(parent.pid, signal.SIGKILL)
    parent.wait()
    assert parent.stdout.read() == "ended in order, after ['one', 'two']\n"
