"""The commands of operators: is the installation well, and how is it put on a schedule."""

import json
import os
import re
import shlex
import sys
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

import infra
from flows.options import DEFAULT_HOME, ERROR, HomeOption
from schemas.base import BadInput
from schemas.curriculum import load_curriculum
from tasks.console import console
from tasks.home import Home

if TYPE_CHECKING:
    from tasks.deploying import Applied
    from tasks.findings import Finding

app = typer.Typer()
DEPLOYMENTS = Path(infra.__file__).with_name("prefect.yaml")
JOB_TEMPLATE = Path(infra.__file__).with_name("kubernetes") / "base-job-template.json"
NIGHTLY = "0 2 * * *"
SIGNS = {"well": ("well", "green"), "note": ("note", "yellow"), "mend": ("MEND", "bold red")}


class Profile(StrEnum):
    """Where a curriculum is learned on a schedule."""

    LOCAL = "local"
    SERVER = "server"
    KUBERNETES = "kubernetes"


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="The findings, for programs.")] = False,
    home: HomeOption = DEFAULT_HOME,
) -> None:
    """Check addresses, passwords, versions, pools, GPU, disk and clocks; exit 1: mend something."""
    opened = Home(home)
    opened.set_environment(offline=True)
    from tasks.doctor import examine

    findings = [*examine(opened)]
    if as_json:
        print(json.dumps([one.model_dump() for one in findings], indent=2))
    else:
        _show_findings(findings)
    if any(one.state == "mend" for one in findings):
        raise typer.Exit(ERROR)


@app.command()
def deploy(
    curriculum_file: Annotated[
        Path, typer.Argument(help="The curriculum, at its place on the workers.")
    ],
    profile: Annotated[Profile, typer.Option(help="Where it is to run.")] = Profile.LOCAL,
    cron: Annotated[
        str | None,
        typer.Option(help="When, in cron's five fields; default: '0 2 * * *'; on servers in UTC."),
    ] = None,
    home: HomeOption = DEFAULT_HOME,
) -> None:
    """Put a curriculum on a schedule; again, it changes only what is not as it should be.

    local: prints a line for cron. server, kubernetes: makes pools, deployments and automations on
    the Prefect server of PREFECT_API_URL; SDFT_NOTIFY_URL is told of refusals and failures.
    """
    opened = Home(home)
    if cron is not None:
        cron = _checked(cron)
    there = curriculum_file.exists()
    if there or profile is Profile.LOCAL:
        load_curriculum(curriculum_file)
    if profile is Profile.LOCAL:
        opened.activate(offline=True)
        _show_cron(cron or NIGHTLY, curriculum_file.resolve(), opened)
        return
    if not os.environ.get("PREFECT_API_URL"):
        raise BadInput("PREFECT_API_URL is not set; it says which Prefect server to deploy to")
    for path in (home, curriculum_file):
        if not path.is_absolute():
            raise BadInput(f"{path}: give the whole path, as the workers see it")
    opened.set_environment(offline=True)
    place = {"SDFT_HOME": str(home), "SDFT_CURRICULUM": str(curriculum_file)}
    with TemporaryDirectory() as folder:
        os.environ["PREFECT_HOME"] = folder  # the home is the workers', and need not be here
        from tasks.deploying import apply_all, at_another_time

        file = at_another_time(DEPLOYMENTS, cron, Path(folder)) if cron else DEPLOYMENTS
        pools = "kubernetes" if profile is Profile.KUBERNETES else "process"
        applied = apply_all(pools, file, JOB_TEMPLATE, place)
    if not there:
        console.print(f"{curriculum_file} is not on this machine: not checked", style="yellow")
    _show_applied(applied, pools)


def _checked(cron: str) -> str:
    """A time in the form that cron and Prefect both know; raises BadInput where it is none."""
    from cronsim import CronSim, CronSimError  # which no other command needs

    fields, known = cron.split(), re.compile(r"([\d*/,-]|[A-Za-z]{3})+")
    try:
        if len(fields) != 5 or not all(map(known.fullmatch, fields)):
            raise CronSimError("not five fields")
        CronSim(cron, datetime.now())
    except CronSimError as error:
        raise BadInput(
            f"--cron {cron!r}: is no time for cron ({error}); write minute, hour, day of month, "
            "month and day of week, such as '0 2 * * *' for every night at two"
        ) from None
    return " ".join(fields)


def _show_cron(cron: str, file: Path, home: Home) -> None:
    program = Path(sys.executable).with_name("sdft")
    words = [str(program), "learn", str(file), "--home", str(home.root)]
    log = shlex.quote(str(home.root / "nightly.log"))
    command = f"{shlex.join(words)} >> {log} 2>&1".replace("%", "\\%")  # to cron a line's end
    console.print("a line for `crontab -e`; a run that finds another one at work waits for it:")
    print(f"{cron} {command}")


def _show_applied(applied: list["Applied"], pools: str) -> None:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for one in applied:
        style = "green" if one.done == "as it was" else "bold"
        table.add_row(one.kind, one.name, one.detail, Text(one.done, style=style))
    console.print(table)
    if not os.environ.get("SDFT_NOTIFY_URL"):
        console.print("SDFT_NOTIFY_URL is not set: refusals and failures are told to nobody")
    console.print("workers: [bold]prefect worker start --pool cpu[/bold], and --pool gpu", end="")
    console.print(f" (type {pools}); then [bold]sdft doctor[/bold] says whether all is well")


def _show_findings(findings: list["Finding"]) -> None:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for one in findings:
        word, style = SIGNS[one.state]
        text = Text(one.found)
        if one.mend:
            text.append(f"\n-> {one.mend}", style=style)
        table.add_row(Text(word, style=style), one.what, text)
    console.print(table)
    bad = sum(one.state == "mend" for one in findings)
    console.print(f"to mend: {bad}" if bad else "all is well", style="bold red" if bad else "green")
