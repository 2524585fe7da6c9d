"""Ledger, lineage, traces and differences for people in a terminal."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from schemas.ledger import Entry
from schemas.lineage import BASE_MODEL, DataFacts, Lineage, LineageDiff, LineageStage, Trace, Traces
from schemas.snapshot import AnchorsOrigin
from tasks.console import console

if TYPE_CHECKING:  # showing a ledger must not cost the import of MLflow
    from tasks.proof import Proof

STYLES = {"promoted": "green", "rolled back": "yellow", "refused": "red", "overridden": "magenta"}


def show_lineage(lineage: Lineage) -> None:
    """A tree: the base model, and every stage in order with what it was made from."""
    aliases = f" ({', '.join(lineage.aliases)})" if lineage.aliases else ""
    tree = Tree(f"[bold]{lineage.name}/{lineage.version}[/bold]{aliases}")
    tree.add(f"base  {escape(lineage.base_path)}  [dim]{lineage.base_hash[:12]}[/dim]")
    for stage in lineage.stages:
        _add_stage(tree, stage)
    console.print(tree)


def _add_stage(tree: Tree, stage: LineageStage) -> None:
    data, made = stage.data, stage.environment
    node = tree.add(
        f"[bold]{stage.stage} {stage.skill}[/bold]  version {stage.version}, "
        f"model [dim]{stage.model_hash[:12]}[/dim], on {stage.parent_version or 'base'}"
    )
    node.add(f"data      {_validated(data.own, data.own_hash, data)}")
    for skill, count in data.rehearsed.items():
        origin = data.rehearsed_from.get(skill)
        source = f", from {escape(origin.source)}" if origin else ""
        node.add(f"again     {count} rows of {skill}{source}")
    if data.anchors:
        asked = data.anchors_from
        told = _validated(data.anchors, asked.data_hash, asked) if asked else f"{data.anchors} rows"
        node.add(f"anchors   {told}")
    if data.own != data.rows:
        node.add(f"together  {data.rows} rows [dim]{data.data_hash[:12]}[/dim]")
    chosen = ("method", "learning_rate", "epochs", "prompts_per_step", "teacher", "seed")
    settings = ", ".join(f"{name} {stage.settings[name]}" for name in chosen)
    node.add(f"settings  {settings}")
    libraries = f"torch {made.get('torch', '?')}, transformers {made.get('transformers', '?')}"
    node.add(f"made by   {stage.code_version}, {libraries} on {made.get('device', '?')}")
    node.add(f"training  {stage.steps} steps in {stage.train_seconds:.0f} s")
    node.add(f"run       {escape(stage.run_link)}")
    scores = "  ".join(f"{suite} {score:.2f}" for suite, score in stage.scores.items())
    node.add(f"scores    {scores}")
    for entry in stage.history:
        if entry.kind != "registered":
            node.add(_line(entry, stage.version))


def _validated(rows: int, data_hash: str, facts: DataFacts | AnchorsOrigin) -> str:
    left_out = f", {facts.quarantined} left out" if facts.quarantined else ""
    shown = f" [dim]{data_hash[:12]}[/dim]" if data_hash else ""
    return (
        f"{rows} rows{left_out}{shown}, {facts.rules_met} of {facts.rules} rules met, "
        f"from {escape(facts.source)}"
    )


def _line(entry: Entry, version: str) -> str:
    style = STYLES.get(entry.kind, "")
    word = f"verdict {entry.decision}" if entry.kind == "verdict" else entry.told_of(version)
    shown = f"[{style}]{word}[/]" if style else word
    reason = f": {escape(entry.reason)}" if entry.reason else ""
    return f"{shown} [dim]{entry.time[:19]} by {escape(entry.who)}[/dim]{reason}"


def show_proof(proof: "Proof") -> None:
    """What `--verify` has proven."""
    base = "" if proof.base_checked else "; the base model is not at hand here and was not hashed"
    console.print(
        f"[green]proven[/]: {proof.stages} stages, {proof.files} files "
        f"({proof.size_bytes / 1e6:.1f} MB), a chain of {proof.entries} ledger entries{base}"
    )


def show_ledger(name: str, entries: Sequence[Entry]) -> None:
    """One line an entry, oldest first."""
    table = Table(title=f"ledger of {name}", title_justify="left", box=None, padding=(0, 1, 0, 0))
    for column in ("entry", "time (UTC)", "what", "v.", "was", "skill", "who", "reason"):
        table.add_column(column, no_wrap=column != "reason")
    for entry in entries:
        what = f"verdict {entry.decision}" if entry.kind == "verdict" else entry.kind
        table.add_row(
            str(entry.seq),
            entry.time[:19],
            what,
            entry.version or "",
            (entry.expected or "none") if entry.epoch else "",
            entry.skill or "",
            escape(f"{entry.who}@{entry.host}"),
            escape(entry.reason),
            style=STYLES.get(entry.kind, ""),
        )
    console.print(table)


def show_traces(wanted: str, traces: Traces) -> None:
    """One line a version that holds what was looked for, and one a version that was not read."""
    if traces.found:
        console.print(f"versions that hold {wanted}", markup=False, soft_wrap=True)
        table = Table(box=None)
        for column in ("version", "aliases", "through", "found"):
            table.add_column(column)
        for one in traces.found:
            aliases = ", ".join(one.aliases)
            style = "bold" if one.aliases else ""
            table.add_row(
                f"{one.name}/{one.version}", aliases, _through(one), one.found, style=style
            )
        console.print(table)
    else:
        could = " that could be read" if traces.unread else ""
        console.print(f"no version{could} holds {wanted}", markup=False, soft_wrap=True)
    for one in traces.unread:
        line = f"not read: {one.name}/{one.version}, with all that is built on it: {one.reason}"
        console.print(line, style="yellow", markup=False, soft_wrap=True)


def _through(one: Trace) -> str:
    by = f"by version {one.came_with}"
    if one.found == BASE_MODEL:
        return f"below {one.skill}, learned {by}"
    if not one.skill:
        return f"an anchor, learned with {one.learned_with} {by}"
    again = f" again with {one.learned_with}" if one.skill != one.learned_with else ""
    return f"{one.skill}, learned{again} {by}"


def show_diff(found: LineageDiff) -> None:
    """What changed, a line a change."""
    console.print(f"[bold]{found.before}[/bold] -> [bold]{found.after}[/bold]")
    if found.base_changed:
        console.print("base model changed", style="yellow")
    for skill in found.skills_added:
        console.print(f"+ skill {skill}", style="green")
    for skill in found.skills_removed:
        console.print(f"- skill {skill}", style="red")
    for change in found.skills_changed:
        console.print(
            f"~ skill {change.skill}: {len(change.rows_added)} data rows added, "
            f"{len(change.rows_removed)} removed"
        )
        _show_rows(change.rows_added, change.rows_removed)
        for what, rows in [
            *((f"{skill}, learned again", rows) for skill, rows in change.learned_again.items()),
            *([("anchors", change.anchors)] if change.anchors else []),
        ]:
            console.print(f"    {what}: {len(rows.added)} rows added, {len(rows.removed)} removed")
            _show_rows(rows.added, rows.removed)
        for name, setting in change.settings.items():
            shown = f"    {name}: {setting.before} -> {setting.after}"
            console.print(shown, markup=False)
    for suite, change in found.scores.items():
        console.print(f"  {suite:<20} {change:+.3f}", style="" if change >= 0 else "red")


def _show_rows(added: Sequence[str], removed: Sequence[str]) -> None:
    for sign, rows in (("+", added), ("-", removed)):
        for row in rows:
            console.print(f"    {sign} row {row[:16]}")
