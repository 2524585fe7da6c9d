"""What commands and flows share: the home option, opening a home, exit codes."""

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from schemas.base import BadInput
from schemas.curriculum import HUB, Curriculum, load_curriculum
from tasks.console import error_console
from tasks.home import Home

ERROR, USER_ERROR, REFUSED, DISPROVED, INTERRUPTED, TERMINATED = 1, 2, 3, 4, 130, 143

HomeOption = Annotated[
    Path,
    typer.Option(
        "--home",
        envvar="SDFT_HOME",
        help="Where runs, models and databases lie.",
        show_default=True,
    ),
]
DEFAULT_HOME = Path(".sdft")


def open_home(home: Path, offline: bool = True) -> Home:
    """A home that must be there already, ready for use (see `Home.activate`)."""
    if not home.is_dir():
        raise BadInput(f"{home}: there is no such home; sdft learn makes one")
    opened = Home(home)
    opened.activate(offline)
    return opened


def open_curriculum(file: Path, home: Path) -> tuple[Curriculum, Home]:
    """A curriculum and the home to learn it in, made where it is not there, ready for use."""
    curriculum = load_curriculum(file)
    sources = [curriculum.base_model, *(suite.eval.path for suite in curriculum.suites)]
    sources += [skill.train.path for skill in curriculum.skills]
    sources += [curriculum.anchors.path] if curriculum.anchors else []
    opened = Home(home)
    opened.activate(offline=not any(source.startswith(HUB) for source in sources))
    return curriculum, opened


def fail(message: str, code: int) -> NoReturn:
    error_console.print(f"error: {message}", style="red", markup=False, soft_wrap=True)
    sys.exit(code)
