"""The shared installation on one machine, natively: `infra/stack.py up`, `status`, `down`.

PostgreSQL, an S3-compatible store, Prefect's and MLflow's servers with passwords, and two workers.
For trying out and for CI: all listens on 127.0.0.1, and what it holds is gone with `down`.
"""

import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from subprocess import Popen
from typing import Annotated, Any

import typer

from infra import postgresql
from infra.credentials import (
    CLIENT_FILE,
    FILE,
    Credentials,
    keep_credentials,
    make_credentials,
    read_credentials,
)
from infra.first_start import make_databases, write_mlflow_logins
from infra.parts import (
    MLFLOW_LOGINS,
    POOLS,
    STATE,
    Part,
    cluster,
    mlflow_server,
    postgres,
    prefect_server,
    s3,
    worker,
)
from infra.processes import end, living, log_of, start
from schemas.base import BadInput
from sdft.process import exclusive
from tasks.console import console, error_console

START_S, STOP_S = 180, 20
ORDER = ("postgres", "s3", "prefect", "mlflow", *(f"{pool}-worker" for pool in POOLS))
"""In which the parts are started; they are ended the other way round."""
STOP_SIGNALS = {"postgres": signal.SIGINT}
"""PostgreSQL takes SIGTERM as: when everybody has left."""

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
Directory = Annotated[
    Path,
    typer.Option("--directory", help="Where its secrets, logs and homes lie."),
]
DEFAULT = Path(".sdft/stack")


@app.command("up")
def up_command(directory: Directory = DEFAULT) -> None:
    """Start what is not running, wait until all of it answers, say what is where."""
    up(directory.resolve())
    show(directory.resolve())
    file = directory / CLIENT_FILE
    console.print(f"to use it: [bold]set -a; . {file}; set +a[/bold]", soft_wrap=True)


@app.command("down")
def down_command(directory: Directory = DEFAULT) -> None:
    """End all of it, with all that it holds; the logs stay."""
    ended = down(directory.resolve())
    console.print(f"ended: {', '.join(ended)}" if ended else "nothing was running")


@app.command("status")
def status_command(directory: Directory = DEFAULT) -> None:
    """What lives and answers; exit code 1 where not all of it does."""
    if not show(directory.resolve()):
        raise typer.Exit(1)


def up(directory: Path) -> None:
    """Bring the stack up; what runs already is left alone.

    Where that fails or is interrupted, what was started is ended again. Raises BadInput with the
    log of a part that does not come to answer.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with exclusive(directory):
        made, running = read_credentials(directory), living(directory)
        started: dict[str, Popen[Any]] = {}
        begins = made is None or not running.keys() >= {"postgres", "s3"}
        try:
            if made is None or begins:  # these two hold what the others refer to
                if running:
                    error_console.print("what holds the data has ended: all begins anew")
                _end_all(directory)
                made = _begin(directory)
            _start(directory, made, started)
        except BaseException:
            if begins:
                _end_all(directory)
            else:
                _end(directory, list(started))
            raise


def down(directory: Path) -> list[str]:
    """End every part and remove what it held; returns the parts that were running."""
    if not directory.is_dir():
        return []
    with exclusive(directory):
        return _end_all(directory)


def show(directory: Path) -> bool:
    """Say of every part where it is and how it does; returns whether all do well."""
    made = read_credentials(directory)
    if made is None:
        console.print(f"{directory}: no stack is up", soft_wrap=True)
        return False
    well = True
    running = living(directory)
    for part in parts(made, directory):
        processes = running.get(part.name, [])
        state, style = "ended", "red"
        if processes:
            answers = part.is_well()
            state, style = ("up", "green") if answers else ("does not answer", "yellow")
        well &= state == "up"
        number = f"process {processes[0].pid}" if processes else ""
        console.print(f"{part.name:<11} [{style}]{state:<16}[/] {part.address}  [dim]{number}[/]")
    return well


def parts(made: Credentials, directory: Path) -> list[Part]:
    """All parts, in the order of their start."""
    state = directory / STATE
    stores = [postgres(made, cluster(directory)), s3(made)]
    servers = [prefect_server(made, state), mlflow_server(made, state)]
    return stores + servers + [worker(made, state, pool) for pool in POOLS]


def _begin(directory: Path) -> Credentials:
    """New credentials, and an empty cluster for them."""
    made = make_credentials()
    (directory / STATE).mkdir(0o700, exist_ok=True)
    folder = cluster(directory)
    try:
        folder.mkdir(0o700)
    except FileExistsError:
        raise BadInput(f"{folder}: is somebody else's, and in the way; remove it") from None
    postgresql.make_cluster(folder, made.POSTGRES_PASSWORD)
    write_mlflow_logins(directory / STATE / MLFLOW_LOGINS, made.database("mlflow"))
    keep_credentials(directory, made)
    return made


def _start(directory: Path, made: Credentials, started: dict[str, Popen[Any]]) -> None:
    """Start the parts that do not run, stores before servers before workers; adds to `started`."""
    stores, servers, workers = (parts(made, directory)[n : n + 2] for n in (0, 2, 4))
    for group in (stores, servers, workers):
        running = living(directory)
        for part in group:
            if part.name not in running:
                started[part.name] = start(
                    directory, part.name, part.command, part.environment, part.options
                )
        for part in group:
            _await(directory, part, started.get(part.name))
        if group is stores:
            make_databases(made.superuser, made.database_passwords)


def _await(directory: Path, part: Part, process: Popen[Any] | None) -> None:
    """Wait for a part; `process` is its own where it was started just now."""
    deadline = time.monotonic() + START_S
    while not part.is_well():
        if (process and process.poll() is not None) or time.monotonic() > deadline:
            log = log_of(directory, part.name)
            last = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
            raise BadInput(f"{part.name} does not come to answer; {log} ends with:\n{last}")
        time.sleep(0.3)


def _end(directory: Path, names: Sequence[str]) -> list[str]:
    """End parts, the last started first; returns those that were running."""
    running = living(directory)
    ended = [name for name in reversed(ORDER) if name in names and name in running]
    for name in ended:
        end(directory, name, STOP_SIGNALS.get(name, signal.SIGTERM), STOP_S)
    return ended


def _end_all(directory: Path) -> list[str]:
    ended = _end(directory, ORDER)
    for folder in (cluster(directory), directory / STATE):
        if folder.exists():
            shutil.rmtree(folder)
    for file in (FILE, CLIENT_FILE):
        (directory / file).unlink(missing_ok=True)
    return ended


def main() -> None:
    """Run the command line; exits 0 well, 1 not all well, 2 a mistake or a part that fails."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        app()
    except BadInput as error:
        error_console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
