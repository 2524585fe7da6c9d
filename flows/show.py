"""Tables for people: the retention matrix, the verdicts, the plan, the registry."""

import os
import shlex
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from flows.options import DEFAULT_HOME
from schemas.results import Cell, RetentionMatrix, Verdict
from tasks.aliases import CHAMPION
from tasks.console import console, shown_address
from tasks.home import Home
from tasks.ledger import Ledger
from tasks.status import RegisteredName

if TYPE_CHECKING:  # showing a status must not cost the import of Prefect
    from flows.learn import Learned
    from flows.plan import Plan
    from tasks.garbage import Garbage

DECISIONS = {"pass": ("pass", "green"), "ask": ("ask", "yellow"), "refuse": ("refused", "red")}
ACTIONS = {
    "judged anew": "reused, but judged anew",
    "open": "reused or learned, as that verdict comes out",
}
MEASURES = {
    "average": "mean score of the learned skills now",
    "backward_transfer": "change of earlier skills since they were learned",
    "forward_transfer": "gain on skills before they were learned",
    "forgetting": "loss of earlier skills from their best",
    "general_forgetting": "loss on the general suites from the base model",
}


def show_learned(learned: "Learned", home: Home) -> None:
    """The matrix, the verdict of every stage, and where to look next."""
    show_matrix(learned.matrix)
    versions = {row.stage: row.version for row in learned.matrix.rows}
    for verdict in learned.verdicts:
        _show_verdict(verdict, learned.matrix.curriculum, versions[verdict.stage], home)
    if not learned.trained:
        console.print("nothing to learn: every stage was finished before", style="bold")
    name = learned.matrix.curriculum
    champion = Ledger(home).champion(name).version
    passed = [row for row in learned.matrix.rows if row.passed and row.skill]
    if champion is not None:
        kept = any(row.version == champion for row in passed)
        before = "run" if learned.unregistered else "curriculum"
        note = "" if kept else f", as it was before this {before}"
        console.print(f"champion: [bold]models:/{name}/{champion}[/bold]{note}")
    elif not passed:
        console.print(f"champion: none, no stage of {name} has passed")
    elif learned.unregistered:
        console.print("champion: none yet, what has passed waits to be registered")
    else:
        console.print(f"champion: none, what has passed is to be promoted; see sdft ledger {name}")
    if learned.report is not None:
        uri = home.tracking_uri
        pages = shown_address(uri) if uri.startswith("http") else f"sdft ui{_home_option(home)}"
        console.print(
            f"look next: [bold]{escape(pages)}[/bold], run {learned.report.run_id} "
            f"(retention/matrix.png, retention/curves.png)",
            soft_wrap=True,
        )


def show_garbage(found: list["Garbage"], removed: bool) -> None:
    """What can go or went, by kind, with its bytes."""
    for one in found:
        console.print(f"{one.size_bytes / 2**20:>9.1f} MiB  {one.what}: ", end="")
        console.print(one.path, markup=False, soft_wrap=True)
    size = sum(one.size_bytes for one in found)
    verdict = "removed" if removed else "can be removed: sdft gc --remove"
    console.print(f"{size / 2**20:>9.1f} MiB ({size} bytes) in {len(found)} places {verdict}")


def show_matrix(matrix: RetentionMatrix) -> None:
    """Rows are stages, columns suites; a stage's own skill is in brackets."""
    title = f"{matrix.curriculum}: score after each stage"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("stage", no_wrap=True)
    for suite in matrix.suites:
        table.add_column(suite, justify="right", style=None if suite in matrix.skills else "cyan")
    table.add_column("v.", justify="right")
    table.add_column("verdict", no_wrap=True)
    for row in matrix.rows:
        cells = [
            _cell(cell, own=suite == row.skill)
            for suite, cell in zip(matrix.suites, row.cells, strict=True)
        ]
        verdict = Text(*DECISIONS[row.decision]) if row.decision else ""
        table.add_row(f"{row.stage} {row.skill or 'base'}", *cells, row.version or "", verdict)
    console.print(table)
    for name, value in matrix.measures.model_dump().items():
        shown = "   n/a" if value is None else f"{value:+.3f}"
        console.print(f"  {name:<19} {shown}  [dim]{MEASURES[name]}[/dim]")


def show_plan(plan: "Plan") -> None:
    """What would be done, one line a stage."""
    table = Table(title=f"plan of {plan.curriculum}", title_justify="left")
    table.add_column("stage")
    for column in ("own rows", "again", "anchors", "items", "steps"):
        table.add_column(column, justify="right")
    table.add_column("would be")
    for number, stage in enumerate(plan.stages, 1):
        rows = (stage.demonstrations, stage.rehearsed, stage.anchors)
        numbers = [str(one) for one in (*rows, stage.items, stage.steps)]
        style = "green" if stage.action == "reused" else ""
        action = ACTIONS.get(stage.action, stage.action)
        action += {"new": " (new, watched)", "recorded": " (watched)"}.get(stage.watched or "", "")
        table.add_row(f"{number} {stage.skill}", *numbers, action, style=style)
    console.print(table)
    for remark in plan.remarks:
        told = f"{remark.name}: {remark.said}"
        console.print(told, style="yellow", markup=False, soft_wrap=True)
    console.print(
        f"base model {plan.base_path} ({plan.base_hash[:12]}); all data passed its checks",
        markup=False,
    )


def show_status(names: list[RegisteredName]) -> None:
    """Every registered name with its versions."""
    if not names:
        console.print("no model is registered yet")
    for one in names:
        table = Table(title=escape(one.name), title_justify="left")
        for column in ("version", "skill", "verdict", "aliases", "parent", "model", "run"):
            table.add_column(column)
        for version in one.versions:
            style = "bold" if CHAMPION in version.aliases else ""
            table.add_row(
                version.version,
                escape(version.skill),
                escape(version.verdict),
                ", ".join(version.aliases),
                version.parent,
                version.model_hash[:12],
                version.run_id[:8],
                style=style,
            )
        console.print(table)
        for line in one.drift:
            told = f"{line}; sdft reconcile puts it back"
            console.print(told, style="yellow", markup=False, soft_wrap=True)


def _show_verdict(verdict: Verdict, name: str, version: str | None, home: Home) -> None:
    word, style = DECISIONS[verdict.decision]
    note = ": needs a person" if verdict.decision == "ask" else ""
    console.print(f"[{style}]{word:<9}[/]{verdict.skill}{note}")
    for reason in verdict.reasons:
        console.print(f"         {reason}", markup=False)
    suites = [one.suite for one in verdict.judgements if one.decision != "pass"]
    if suites and version is not None:
        asked = f"sdft answers {name}/{version} {suites[0]} --wrong{_home_option(home)}"
        console.print(f"         look at the answers: {asked}", markup=False, soft_wrap=True)


def _home_option(home: Home) -> str:
    """What a command needs to look into this home."""
    default = Home(os.environ.get("SDFT_HOME") or DEFAULT_HOME)
    return "" if home.root == default.root else f" --home {shlex.quote(str(home.root))}"


def _cell(cell: Cell | None, own: bool) -> str:
    if cell is None:
        return "-"
    return f"[bold]\\[{cell.score:.2f}][/bold]" if own else f"{cell.score:.2f} "
