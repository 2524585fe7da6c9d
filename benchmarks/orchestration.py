"""What orchestration costs: seconds a stage beside training, and a long queue through two workers.

    python benchmarks/orchestration.py --queued 500

On a stack of its own (infra/stack.py; needs PostgreSQL). The same three skills are learned in a
home alone, against the stack, and with its GPU worker doing stages and evaluations: what is left
of the time from one stage to the next when steps and answers are taken away. Then the queue: runs
that hold a stage's lease and train for no time, on two workers. The last line is JSON.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import yaml
from prefect import flow, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from sqlalchemy import create_engine, text

from infra.credentials import Credentials, read_credentials
from infra.parts import STATE, worker
from infra.postgresql import query
from infra.processes import end, living, start
from infra.stack import STOP_S, down, up
from schemas.results import CellFile
from schemas.stage import StageRecord
from tasks.elsewhere import EVALUATE, TRAIN
from tasks.home import Home
from tasks.leases import leased
from tasks.ledger import Ledger

ROOT = Path(__file__).parent.parent
SKILLS = ("courier", "blick", "almanac")
POOL, WORKERS = "queued", ("queued-1", "queued-2")
AT_ONCE = 3
"""Runs of one worker: what they do is nearly all starting, which two cores can share."""
POLL_S = 2.0


@flow(name="stub-skill")
def stub_skill(number: int) -> None:
    """A stage without its training: its lease, and a line in the database that it was done."""
    home = Home(os.environ["SDFT_HOME"])
    home.activate(offline=True)
    held = leased(f"stage {number}", f"skill-{number}", home)
    with held, Ledger(home).transaction() as connection:
        connection.execute(text("INSERT INTO done VALUES (:number)"), {"number": number})


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of orchestration.")
    parser.add_argument("--queued", type=int, default=500)
    arguments = parser.parse_args()
    if arguments.queued < 1:
        parser.error("--queued: at least one run")
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "stack"
        try:
            up(directory)
            made = read_credentials(directory)
            assert made is not None
            seconds = a_stage(made, Path(folder))
            found = queue(made, directory, arguments.queued)
        finally:
            for name in WORKERS:
                end(directory, name, signal.SIGTERM, STOP_S)
            down(directory)
    print(json.dumps({"overhead_s_a_stage": seconds, **found}))


def a_stage(made: Credentials, folder: Path) -> dict[str, float]:
    """Seconds a stage that are neither steps nor answers, by where the curriculum is learned."""
    sys.path.insert(0, str(ROOT / "tests"))
    from learning import write_curriculum
    from stacks import prefect, sdft

    file = write_curriculum(folder, skills=SKILLS)
    content = yaml.safe_load(file.read_text())
    content["skills"][-1]["allow_overlap"] = True
    prefect(made, folder, "deploy", "--all", "--prefect-file", "infra/prefect.yaml")
    workers = {TRAIN: "train-skill/gpu", EVALUATE: "evaluate-suites/gpu"}
    found: dict[str, float] = {}
    for where, environment in [
        ("embedded", {}),
        ("stack", made.client),
        ("workers", made.client | workers),
    ]:
        file.write_text(yaml.safe_dump(content | {"name": where}))  # by another's it is fetched
        home = Home(folder / where)
        began = time.monotonic()
        code, said = sdft(environment, home.root, "learn", str(file))
        whole = time.monotonic() - began
        assert code == 0, said
        records = [StageRecord.read(one) for one in home.stages.glob("*/record.json")]
        cells = [CellFile.read(one).cell for one in home.cells.glob("*/cell.json")]
        steps = sum(one.train_seconds for one in records)
        answers = sum(one.seconds for one in cells)
        ends = sorted(one.stat().st_mtime for one in home.stages.glob("*/record.json"))
        apart = (ends[-1] - ends[0]) / (len(SKILLS) - 1)
        found[where] = round(apart - steps / len(SKILLS) - answers / (len(SKILLS) + 1), 1)
        print(
            f"{where}: {whole:.1f} s, stages {apart:.1f} s apart; in all {steps:.1f} s steps and "
            f"{answers:.1f} answers: {found[where]} s a stage beside them, "
            f"{found[where] / found['embedded']:.2f} of embedded"
        )
    return found


def queue(made: Credentials, directory: Path, count: int) -> dict[str, float]:
    """Have two workers do so many runs; none may be lost, done twice, or cost more and more."""
    ledger, prefects = made.database("ledger"), made.database("prefect")
    with create_engine(ledger).begin() as connection:
        connection.execute(text("CREATE TABLE done (number int)"))
    give_out(made, count)
    for name in WORKERS:
        part = worker(made, directory / STATE, "gpu")
        command = [sys.executable, "-m", "prefect", "worker", "start", "--type", "process"]
        command += ["--pool", POOL, "--name", name, "--limit", str(AT_ONCE)]
        home = {"SDFT_HOME": str(directory / STATE / name), "PYTHONPATH": str(ROOT / "benchmarks")}
        start(directory, name, command, part.environment | home, {})
    began, seen, memory = time.monotonic(), 0, {}
    while seen < count:
        time.sleep(POLL_S)
        [seen] = query(ledger, "SELECT count(*) FROM done")
        if seen * 10 // count > len(memory):
            memory[seen] = memory_mib(directory)
            print(f"{seen} done after {time.monotonic() - began:.0f} s: {memory[seen]} MiB")
    time.sleep(10 * POLL_S)  # one that was given out twice would come now
    seconds = time.monotonic() - began
    done = Counter(query(ledger, "SELECT number FROM done"))
    states = Counter(
        query(
            prefects,
            "SELECT r.state_name FROM flow_run r JOIN flow f ON f.id = r.flow_id "
            "WHERE f.name = 'stub-skill'",
        )
    )
    print(f"states: {dict(states)}; done twice: {[one for one, n in done.items() if n > 1]}")
    assert done == Counter(range(count)) and states == {"Completed": count}
    first, last = [*memory.values()][0], [*memory.values()][-1]
    return {
        "queued": count,
        "s_a_run": round(seconds / count, 2),
        **{f"memory_growth {part}": round(last[part] / first[part], 2) for part in sorted(first)},
    }


def give_out(made: Credentials, count: int) -> None:
    """Queue the runs, before there is a worker."""
    server = {
        PREFECT_API_URL: made.client["PREFECT_API_URL"],
        PREFECT_API_AUTH_STRING: made.client["PREFECT_API_AUTH_STRING"],
    }
    with temporary_settings(server), get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
        flow_id = client.create_flow(stub_skill)
        deployment = client.create_deployment(
            flow_id,
            POOL,
            work_pool_name=POOL,
            entrypoint="orchestration.stub_skill",
            pull_steps=[{"prefect.deployments.steps.set_working_directory": {"directory": "/"}}],
        )
        for number in range(count):
            client.create_flow_run_from_deployment(deployment, parameters={"number": number})


def memory_mib(directory: Path) -> dict[str, int]:
    """What Prefect's server and the workers take, without the runs that these have started."""
    running = living(directory)
    parts = ("prefect", *WORKERS)
    return {part: running[part][0].memory_full_info().pss // 2**20 for part in parts}


if __name__ == "__main__":
    main()
