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
        is_file = home.exists()
        said = "is no directory" if is_file else "there is no such home; sdft learn makes one"
        raise BadInput(f"{home}: {said}")
    opened = Home(home)
    opened.activate(offline)
    return opened


def open_curriculum(file: Path, home: Path) -> tuple[Curriculum, Home]:
    """A curriculum and the home to learn it in, made where it is not there, ready for use.

    Raises BadInput with all files of data that are not there.
    """
    curriculum = load_curriculum(file)
    data = [suite.eval.path for suite in curriculum.suites]
    data += [skill.train.path for skill in curriculum.skills]
    data += [curriculum.anchors.path] if curriculum.anchors else []
    gone = [
        one for one in dict.fromkeys(data) if not one.startswith(HUB) and not Path(one).exists()
    ]
    if gone:
        raise BadInput("\n".join(f"{one}: there is no such file" for one in gone))
    opened = Home(home)
    sources = [curriculum.base_model, *data]
    opened.activate(offline=not any(source.startswith(HUB) for source in sources))
    return curriculum, opened


def fail(message: str, code: int) -> NoReturn:
    error_console.print(f"error: {message}", style="red", markup=False, soft_wrap=True)
    sys.exit(code)
