"""Which GPUs a program gets: as many as it asks for, that none of our other programs here has.

A GPU has one lock of the operating system, held by who was given it and by the program itself: it
is free again when both are gone, however they ended. All users of a machine share the locks;
containers do where they share the folder.
"""

import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from schemas.base import BadInput, Contract
from tasks.console import say
from tasks.failures import RunFailed

DEVICES = "SDFT_DEVICES"
"""Environment variable: the GPUs that may be used, as CUDA_VISIBLE_DEVICES names them, such as
`0,1`; all that torch sees where it is not set. Their memory is then not looked at."""
VISIBLE = "CUDA_VISIBLE_DEVICES"
FOLDER = "sdft-devices"
"""Of the locks, in the system's folder for temporary files."""
POLL_S = 2.0
GIB = 2**30
_ASK = """
import json, torch
print(json.dumps([
    {"name": f"GPU-{torch.cuda.get_device_properties(n).uuid}",
     "free_bytes": torch.cuda.mem_get_info(n)[0],
     "total_bytes": torch.cuda.mem_get_info(n)[1]}
    for n in range(torch.cuda.device_count())
]))
"""
"""In a program of its own, since whoever asks a GPU for its memory takes some of it."""


class Device(Contract):
    """One GPU."""

    name: str
    """As CUDA_VISIBLE_DEVICES has it."""
    free_bytes: int | None = None
    total_bytes: int | None = None
    """None where it is not known."""


@contextmanager
def placed_on(device: str, count: int, memory_gib: float | None, label: str) -> Generator[None]:
    """Hold `count` GPUs, and let what is started meanwhile see these and no others.

    Waits until so many are free, with `memory_gib` of free memory each; the one with most memory
    comes first. On a machine without GPUs, and with the device cpu, there is nothing to hold.
    Raises BadInput where the machine has fewer than that.
    """
    if device == "cpu" or not (there := devices()):
        yield
        return
    if len(there) < count:
        raise BadInput(f"{label}: asks for {count} GPUs (runtime); this machine has {len(there)}")
    needed = (memory_gib or 0) * GIB
    large = [one for one in there if one.total_bytes is None or one.total_bytes >= needed]
    if len(large) < count:
        most = max(one.total_bytes or 0 for one in there) / GIB
        raise BadInput(
            f"{label}: asks for {count} GPUs with {memory_gib} GiB each (runtime.gpu_memory_gib); "
            f"{len(large)} of this machine's have as much, the largest {most:.1f} GiB"
        )
    with ExitStack() as held:
        waits = False
        while len(names := _held(held, there, count, memory_gib)) < count:
            if not waits:
                with_memory = f" with {memory_gib} GiB of free memory" if memory_gib else ""
                say("place", label, f"waits for {count} free GPU(s){with_memory}", "yellow")
            waits = True
            time.sleep(POLL_S)
            there = devices()
        before = os.environ.get(VISIBLE)
        os.environ[VISIBLE] = ",".join(names)
        held.callback(_set, before)
        yield


def devices() -> list[Device]:
    """The GPUs that may be used."""
    if named := os.environ.get(DEVICES):
        return [Device(name=one.strip()) for one in named.split(",") if one.strip()]
    if not any(Path("/dev").glob("nvidia[0-9]*")):  # asking torch would cost seconds
        return []
    return _asked()


def has_gpu() -> bool:
    """Whether torch would find a GPU; it is asked where no file of the system tells of one."""
    return bool(devices() or _asked())


def _asked() -> list[Device]:
    asked = subprocess.run([sys.executable, "-c", _ASK], capture_output=True, text=True)
    if asked.returncode != 0:
        last = (asked.stderr.splitlines() or ["no word"])[-1]
        raise RunFailed(f"the GPUs of this machine cannot be asked: {last}")
    return [Device.model_validate(one) for one in json.loads(asked.stdout)]


def _held(held: ExitStack, there: list[Device], count: int, memory_gib: float | None) -> list[str]:
    """The names of `count` GPUs that are held from now on; none where there are not so many."""
    needed = (memory_gib or 0) * GIB
    fitting = [one for one in there if one.free_bytes is None or one.free_bytes >= needed]
    with ExitStack() as tried:
        names: list[str] = []
        for one in sorted(fitting, key=lambda one: -(one.free_bytes or 0)):
            if len(names) < count and tried.enter_context(_locked(one)):
                names.append(one.name)
        if len(names) < count:  # all or none: who holds a part of them would keep others waiting
            return []
        held.push(tried.pop_all())
    return names


@contextmanager
def _locked(device: Device) -> Generator[bool]:
    """Whether a GPU's lock could be had; it is held as long as this lasts."""
    folder = Path(tempfile.gettempdir()) / FOLDER
    if not folder.is_dir():
        folder.mkdir(exist_ok=True)
        folder.chmod(0o1777)
    path = folder / device.name.replace("/", "-")
    if not path.exists():
        path.touch()
        path.chmod(0o644)  # whoever may read it may lock it
    lock = os.open(path, os.O_RDONLY)
    try:
        os.set_inheritable(lock, True)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        yield False
        return
    try:
        yield True
    finally:
        os.close(lock)


def _set(value: str | None) -> None:
    if value is None:
        del os.environ[VISIBLE]
    else:
        os.environ[VISIBLE] = value
