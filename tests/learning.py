"""The whole of `sdft learn` on the shipped model with little data, in processes that can be killed.

Flows run in forks of a process that has imported everything; Prefect's server, and the process that
forks trainers and evaluators, are one for the whole session. These are the real programs; a wrapper
kills the one that is to die.
"""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml
from conftest import POCKET, QUICKSTART
from mlflow import MlflowClient
from patching import patched, strike

from schemas.results import CellFile
from schemas.stage import StageRecord
from tasks import children, forked
from tasks.forked import Forked, Forks
from tasks.home import Home

LONG_S = 300
SKILLS = ("courier", "blick")
EVERY = 2
"""Steps between two checkpoints."""
STEPS = 6
INHERITED = ("PREFECT_", "MLFLOW_", "SDFT_", "PYTHONPATH")
MORTAL = "MORTAL"
"""Environment variable: where a program is to be killed, for `tests/mortal.py`."""


@dataclass(frozen=True)
class Point:
    """A place in a program: just before the n-th call of a function in one process."""

    program: str
    """sdft.train, sdft.evaluate or flow."""
    function: str
    """module:name or module:class.name."""
    turn: int = 1
    victims: str = "self"
    """Who is killed: self; for a child also parent or both. Or pause: self is stopped; or memory:
    self gets none from there on."""

    def __str__(self) -> str:
        who = {"self": self.program, "parent": "its flow"}.get(self.victims, self.victims)
        return f"{self.program} {self.function} #{self.turn}: {who}"


def write_curriculum(folder: Path, seed: int = 0, skills: tuple[str, ...] = SKILLS) -> Path:
    """Skills of the quickstart with a dozen demonstrations and six items each.

    The first trains all weights, those after it adapters.
    """
    for kind, rows in [("train", 12), ("eval", 6)]:
        for skill in skills:
            lines = (QUICKSTART / "skills" / skill / f"{kind}.jsonl").read_text().splitlines()
            (folder / f"{skill}-{kind}.jsonl").write_text("\n".join(lines[:rows]) + "\n")
    lines = (QUICKSTART / "general" / "sums.jsonl").read_text().splitlines()
    (folder / "sums.jsonl").write_text("\n".join(lines[:6]) + "\n")
    content = {
        "name": "demo",
        "base_model": str(POCKET),
        "seed": seed,
        "skills": [
            {
                "name": one,
                "train": f"{one}-train.jsonl",
                "eval": f"{one}-eval.jsonl",
                "training": {} if one == skills[0] else {"lora": {"rank": 8}},
            }
            for one in skills
        ],
        "general": [{"name": "sums", "eval": "sums.jsonl"}],
        "training": {
            "epochs": 2,
            "prompts_per_step": 4,
            "learning_rate": 1e-4,
            "max_new_tokens": 40,
            "teacher": "ema",
        },
        "runtime": {"checkpoint_every_steps": EVERY},
        "evaluation": {"max_new_tokens": 40},
        "gate": {"min_gain": 0.0, "max_forgetting": 1.0},
    }
    path = folder / "curriculum.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def sdft(
    arguments: tuple[str, ...],
    home: Path,
    point: Point | None,
    variables: dict[str, str],
    requests: socket.socket,
) -> None:
    """What `sdft` does, in a process of its own whose output goes to a file in the home."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal
    home.mkdir(exist_ok=True)
    with (home / "output.txt").open("a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.update(variables)
    forked.forks = Forks(requests=requests)
    if point is not None and point.program == "flow":
        patched(point.function, point.turn, lambda: strike(point.victims, os.getppid()))
    elif point is not None:
        os.environ[MORTAL] = json.dumps({**vars(point), "parent": os.getpid()})
        children.Forked = mortal
    sys.argv = ["sdft", *arguments, "--home", str(home)]
    Home(home).activate(offline=True)
    from prefect.context import refresh_global_settings_context

    refresh_global_settings_context()  # it read the environment when it was imported
    from flows.cli import main

    main()


def mortal(program: list[str], log: int) -> Forked:
    """The program, which can be struck."""
    return Forked(["mortal", *program], log)


class Learning:
    """A home, and runs of one curriculum in it."""

    context = multiprocessing.get_context("forkserver")
    requests: socket.socket
    """Where their flows ask for programs: one process forks those of all."""
    prefect: str
    """The address of the server that they report to; no other test is to know of it."""

    def __init__(self, folder: Path, home: Path | None = None, **curriculum: Any) -> None:
        folder.mkdir(exist_ok=True)
        self.curriculum = write_curriculum(folder, **curriculum)
        self.home = Home(home or folder / "home")
        self.variables: dict[str, str] = {}

    def prepare(self, done: "Learning") -> None:
        """Have what another one's run did before its first training: data, the base's scores."""
        [parent] = {record.spec.parent_hash for record in done.records().values()}
        self.home.cells.mkdir(parents=True)
        shutil.copytree(done.home.data, self.home.data)
        for cell in done.home.cells.glob("*/cell.json"):
            if CellFile.read(cell).cell.model_hash == parent:
                shutil.copytree(cell.parent, self.home.cells / cell.parent.name)

    def start(self, point: Point | None = None, *command: str) -> Any:
        """Start `sdft learn`, or another command."""
        arguments = command or ("learn", str(self.curriculum))
        # What forks may have been started by another module's tests, before these were set.
        inherited = {k: v for k, v in os.environ.items() if k.startswith(INHERITED)}
        variables = inherited | {"PREFECT_API_URL": self.prefect} | self.variables
        process = self.context.Process(
            target=sdft, args=(arguments, self.home.root, point, variables, self.requests)
        )
        process.start()
        return process

    def run(self, point: Point | None = None, *command: str) -> int | None:
        return self.join(self.start(point, *command))

    def join(self, process: Any) -> int | None:
        """The exit code of a started command."""
        process.join(LONG_S)
        assert process.exitcode is not None, f"does not end\n{self.output[-2000:]}"
        return process.exitcode

    @property
    def output(self) -> str:
        return (self.home.root / "output.txt").read_text()

    @property
    def client(self) -> MlflowClient:
        uri = self.variables.get("MLFLOW_TRACKING_URI") or self.home.tracking_uri
        return MlflowClient(uri, uri)

    def programs(self) -> list[psutil.Process]:
        """The trainers and evaluators at work in this home, known by their logs."""
        found = []
        for one in psutil.process_iter(["name"]):
            with suppress(OSError):  # it has just ended
                log = Path(f"/proc/{one.pid}/fd/1").readlink()
                if one.info["name"].startswith("sdft.") and log.is_relative_to(self.home.root):
                    found.append(one)
        return found

    def trainer(self) -> psutil.Process | None:
        return next((one for one in self.programs() if one.info["name"] == "sdft.train"), None)

    def records(self) -> dict[str, StageRecord]:
        """The finished stages, by skill."""
        found = [StageRecord.read(path) for path in self.home.stages.glob("*/record.json")]
        return {one.spec.skill: one for one in found}

    def hashes(self) -> dict[str, str]:
        return {skill: record.model_hash for skill, record in self.records().items()}


def start_prefect(home: Path, port: int) -> subprocess.Popen[bytes]:
    """A Prefect server of our own, ready to answer."""
    environment = {k: v for k, v in os.environ.items() if k != "PREFECT_API_URL"}
    environment["PREFECT_HOME"] = str(home)
    server = subprocess.Popen(
        [sys.executable, "-m", "prefect", "server", "start", "--port", str(port), "--no-ui"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=environment,
    )
    wait_for(f"http://127.0.0.1:{port}/api/health", server)
    return server


def wait_for(address: str, server: subprocess.Popen[bytes], patience_s: float = 120) -> None:
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        assert server.poll() is None, "the server ended"
        try:
            if httpx.get(address, timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise AssertionError(f"{address} does not answer")
