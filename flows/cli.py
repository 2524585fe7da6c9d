"""The command line. Heavy libraries are imported inside the commands that need them."""

import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from flows import operate, registry
from flows.options import (
    DEFAULT_HOME,
    ERROR,
    INTERRUPTED,
    REFUSED,
    TERMINATED,
    USER_ERROR,
    HomeOption,
    fail,
    open_curriculum,
    open_home,
)
from flows.start import end_within_import, importing
from schemas.base import BadInput
from tasks.console import console, say, shown_address
from tasks.failures import RunFailed, Terminated, is_full, is_of_disk


class Commands(TyperGroup):
    """Says how a command was ended from outside; Typer alone would end it without a word."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Terminated:
            fail("terminated", TERMINATED)
        except KeyboardInterrupt:
            fail("interrupted", INTERRUPTED)


app = typer.Typer(
    cls=Commands,
    help="Continual learning for language models: learn skills one after the other, keep the old.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

GOES_ON = "the same command goes on from what is finished"

CurriculumFile = Annotated[Path, typer.Argument(help="The curriculum, a YAML file.")]


def main() -> None:
    """Run the command line.

    Exits 0 all passed, 1 error, 2 user's error, 3 refused or undecided, 4 disproved, 130 Ctrl-C,
    143 SIGTERM.
    """
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
        signal.signal(signal.SIGHUP, signal.default_int_handler)  # a closed terminal is a Ctrl-C
    try:
        app()
    except Terminated:  # before or after the command itself
        sys.exit(TERMINATED)
    except BadInput as error:
        fail(str(error), USER_ERROR)
    except RunFailed as error:
        fail(str(error), ERROR)
    except Exception as error:  # MLflow's types take seconds to import; what is not told goes on
        if is_of_disk(error):
            where = error.filename2 or error.filename or "a disk"
            fail(f"{where}: {error.strerror}; {GOES_ON}", ERROR)
        tracking = sys.modules.get("tasks.tracking")  # who asks MLflow for nothing lacks it
        uri = os.environ.get("MLFLOW_TRACKING_URI", "in this home")
        if tracking is None or (problem := tracking.as_outage(error, uri)) is None:
            raise
        fail(str(problem), USER_ERROR if isinstance(problem, BadInput) else ERROR)


def _terminate(_signal: int, frame: FrameType | None) -> None:
    end_within_import(frame, TERMINATED, "terminated")
    raise Terminated


@app.command()
def learn(curriculum_file: CurriculumFile, home: HomeOption = DEFAULT_HOME) -> None:
    """Learn the curriculum's skills in order; what is finished is not done again."""
    _learn(curriculum_file, home)


@app.command()
def replay(
    name: Annotated[str, typer.Argument(help="The curriculum's name.")],
    without: Annotated[str, typer.Option(help="The skill to take out.")],
    home: HomeOption = DEFAULT_HOME,
) -> None:
    """Learn the newest curriculum again without a skill; stages before it are reused.

    The result is a candidate with its own lineage: promote it to let it replace the champion.
    """
    opened = open_home(home, offline=False)
    from tasks.replay import curriculum_without

    _learn(curriculum_without(opened, name, without), home)


def _learn(curriculum_file: Path, home: Path) -> None:
    curriculum, opened = open_curriculum(curriculum_file, home)
    say("start", curriculum.name, f"home: {opened.root}")  # what follows takes seconds
    from prefect import tags

    from tasks.orchestration import PrefectAway, own_prefect, reaching_prefect

    try:
        with tags(opened.lease_key), reaching_prefect():
            with importing(), own_prefect(opened):
                from flows.learn import learn as learn_flow
                from flows.show import show_learned
                from tasks.tracking import Away
                from tasks.warmup import warm_up

                warm_up(opened)
            learned = learn_flow(str(curriculum_file), str(opened.root))
    except PrefectAway as away:
        why = f"the disk of {opened.root} is full" if is_full(opened.root) else str(away)
        fail(f"{why}; {GOES_ON}", ERROR)
    except Terminated:
        fail(f"terminated; {GOES_ON}", TERMINATED)
    except KeyboardInterrupt:
        fail(f"interrupted; {GOES_ON}", INTERRUPTED)
    show_learned(learned, opened)
    if learned.report is None:
        waiting = ", ".join(learned.unregistered) or "only the report is missing"
        raise Away(
            f"MLflow could not be reached; what waits to be registered: {waiting}. All of it is "
            f"kept in {opened.root}: run the same command again when MLflow is back"
        )
    if not all(row.passed for row in learned.matrix.rows):
        raise typer.Exit(REFUSED)


@app.command()
def plan(curriculum_file: CurriculumFile, home: HomeOption = DEFAULT_HOME) -> None:
    """Check the data and say what would be learned and what is there already; learns nothing."""
    curriculum, opened = open_curriculum(curriculum_file, home)
    from flows.plan import plan_curriculum
    from flows.show import show_plan

    show_plan(plan_curriculum(curriculum, opened))


@app.command()
def status(home: HomeOption = DEFAULT_HOME) -> None:
    """Every curriculum in the home: its stages, verdicts and aliases."""
    opened = open_home(home)
    from flows.show import show_status
    from tasks.status import registry_status

    show_status(registry_status(opened))


@app.command()
def matrix(
    name: Annotated[str, typer.Argument(help="The curriculum's name.")],
    as_json: Annotated[bool, typer.Option("--json", help="The document, for programs.")] = False,
    home: HomeOption = DEFAULT_HOME,
) -> None:
    """The newest retention matrix of a curriculum."""
    opened = open_home(home)
    from flows.show import show_matrix
    from tasks.reporting import latest_matrix

    found = latest_matrix(opened, name)
    if found is None:
        raise BadInput(f"{opened.root}: has no retention matrix of {name!r}; see sdft status")
    if as_json:
        print(json.dumps(found.model_dump(mode="json"), indent=2))
    else:
        show_matrix(found)


@app.command()
def sync(home: HomeOption = DEFAULT_HOME) -> None:
    """Bring to MLflow what it missed of finished stages while it was away."""
    opened = open_home(home)
    from tasks.stageruns import sync_stages

    for line in sync_stages(opened) or ["MLflow has all of every finished stage"]:
        console.print(line, markup=False, soft_wrap=True)


@app.command()
def gc(
    remove: Annotated[bool, typer.Option("--remove", help="Remove it; else only say it.")] = False,
    older_than: Annotated[
        float, typer.Option(min=0, help="Hours since it was last touched.")
    ] = 24.0,
    home: HomeOption = DEFAULT_HOME,
) -> None:
    """Say, or with --remove remove, what no alias, version, ledger entry or run reaches."""
    opened = open_home(home)
    from flows.show import show_garbage
    from tasks.garbage import collect_alone

    show_garbage(collect_alone(opened, older_than * 3600, remove), remove)


@app.command()
def ui(
    home: HomeOption = DEFAULT_HOME,
    port: Annotated[int, typer.Option(help="Port on this machine.")] = 5000,
) -> None:
    """MLflow's pages over the home: runs, curves, artifacts, versions. Ctrl-C ends it."""
    opened = open_home(home)
    uri, artifacts = opened.tracking_uri, opened.artifacts.as_uri()
    if uri.startswith("http"):
        console.print(f"MLFLOW_TRACKING_URI is set: MLflow's pages are on {shown_address(uri)}")
        return
    # By the environment: everybody on this machine can read a command, and a password in it.
    os.environ["MLFLOW_BACKEND_STORE_URI"] = uri
    os.environ["MLFLOW_ARTIFACTS_DESTINATION"] = artifacts
    console.print(f"MLflow on http://127.0.0.1:{port}")
    sys.stdout.flush()
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(port)]
    os.execv(sys.executable, command)


app.add_typer(registry.app)
app.add_typer(operate.app)
