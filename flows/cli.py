"""The command line. Heavy libraries are imported inside the commands that need them."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from flows import registry
from flows.options import (
    DEFAULT_HOME,
    ERROR,
    INTERRUPTED,
    REFUSED,
    USER_ERROR,
    HomeOption,
    fail,
    open_home,
)
from schemas.base import BadInput
from schemas.curriculum import HUB, Curriculum, load_curriculum
from sdft.process import exclusive
from tasks.children import ChildFailed
from tasks.console import console, shown_address
from tasks.home import Home

app = typer.Typer(
    help="Continual learning for language models: learn skills one after the other, keep the old.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

CurriculumFile = Annotated[Path, typer.Argument(help="The curriculum, a YAML file.")]


def main() -> None:
    """Run the command line.

    Exits 0 all passed, 1 error, 2 user's error, 3 refused or undecided, 4 disproved, 130 Ctrl-C.
    """
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
        signal.signal(signal.SIGHUP, signal.default_int_handler)  # a closed terminal is a Ctrl-C
    try:
        app()
    except BadInput as error:
        fail(str(error), USER_ERROR)
    except ChildFailed as error:
        fail(str(error), ERROR)


def _open(curriculum_file: Path, home: Path) -> tuple[Curriculum, Home]:
    curriculum = load_curriculum(curriculum_file)
    sources = [curriculum.base_model, *(suite.eval.path for suite in curriculum.suites)]
    sources += [skill.train.path for skill in curriculum.skills]
    opened = Home(home)
    opened.activate(offline=not any(source.startswith(HUB) for source in sources))
    return curriculum, opened


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
    from tasks.replay import curriculum_without

    _learn(curriculum_without(open_home(home, offline=False), name, without), home)


def _learn(curriculum_file: Path, home: Path) -> None:
    _, opened = _open(curriculum_file, home)
    from flows.learn import learn as learn_flow
    from flows.show import show_learned

    try:
        with exclusive(opened.root):  # a second run waits, and then finds everything done
            learned = learn_flow(str(curriculum_file), str(opened.root))
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on from the last checkpoint", INTERRUPTED)
    show_learned(learned, opened)
    if not all(row.passed for row in learned.matrix.rows):
        raise typer.Exit(REFUSED)


@app.command()
def plan(curriculum_file: CurriculumFile, home: HomeOption = DEFAULT_HOME) -> None:
    """Check the data and say what would be learned and what is there already; learns nothing."""
    curriculum, opened = _open(curriculum_file, home)
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
    command = ["server", "--backend-store-uri", uri, "--artifacts-destination", artifacts]
    console.print(f"MLflow on http://127.0.0.1:{port}")
    sys.stdout.flush()
    os.execv(
        sys.executable,
        [sys.executable, "-m", "mlflow", *command, "--workers", "1", "--port", str(port)],
    )


app.add_typer(registry.app)
