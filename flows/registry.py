"""The commands of release owners and auditors: promotion, rollback, ledger, lineage."""

import json
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from flows.options import DEFAULT_HOME, DISPROVED, ERROR, HomeOption, fail, open_home
from schemas.base import BadInput, Contract, write_atomically
from schemas.ledger import Entry
from tasks.console import console, shown_address

app = typer.Typer()

Name = Annotated[str, typer.Argument(help="The registered model, named after its curriculum.")]
Version = Annotated[str, typer.Argument(help="The version's number.")]
Reference = Annotated[str, typer.Argument(help="NAME (its champion), NAME@alias or NAME/version.")]
Expect = Annotated[
    str | None,
    typer.Option(help="Only if this version is champion now ('none' for no champion)."),
]
AsJson = Annotated[bool, typer.Option("--json", help="The document, for programs.")]


class Form(StrEnum):
    """What a lineage can be written as."""

    TREE = "tree"
    JSON = "json"
    PAGE = "page"
    CYCLONEDX = "cyclonedx"
    OPENLINEAGE = "openlineage"


@app.command()
def promote(
    name: Name,
    version: Version,
    expect: Expect = None,
    override: Annotated[
        str, typer.Option(help="Your reason to let in what the gate did not pass; it is kept.")
    ] = "",
    home: HomeOption = DEFAULT_HOME,
) -> None:
    """Make a version the champion; asking again for what is done changes nothing."""
    opened = open_home(home)
    from flows.changes import promote_version

    entry = promote_version(opened, name, version, expect, override, in_flow=False)
    console.print(
        f"champion: [bold]models:/{name}/{version}[/bold], {_signed(entry)}", soft_wrap=True
    )


@app.command()
def rollback(
    name: Name,
    to: Annotated[str | None, typer.Option(help="An earlier champion; default: the last.")] = None,
    expect: Expect = None,
    home: HomeOption = DEFAULT_HOME,
) -> None:
    """Put the champion before this one back; again goes one further back.

    With --expect it can be repeated safely: what is done already is not done again.
    """
    opened = open_home(home)
    from flows.changes import roll_back

    entry = roll_back(opened, name, to, expect, in_flow=False)
    console.print(
        f"champion: [bold]models:/{name}/{entry.version}[/bold], {_signed(entry)}", soft_wrap=True
    )


@app.command()
def reconcile(
    name: Annotated[str | None, typer.Argument(help="One model; default: all.")] = None,
    home: HomeOption = DEFAULT_HOME,
) -> None:
    """Tidy up after dead processes, make the aliases what the ledger says, send events owed."""
    opened = open_home(home)
    from flows.reconcile import reconcile_all

    done, problems = reconcile_all(opened, name, in_flow=False)
    for one, found in done.items():
        for line in found or ([f"{one}: registry and ledger agree"] if one else []):
            console.print(line, markup=False, soft_wrap=True)
    if problems:
        raise BadInput("\n".join(problems))


@app.command()
def ledger(name: Name, as_json: AsJson = False, home: HomeOption = DEFAULT_HOME) -> None:
    """Every registration, verdict, promotion and rollback of a model; checks the hash chain."""
    opened = open_home(home)
    from flows.show_lineage import show_ledger
    from sdft.chain import first_break
    from tasks.ledger import Ledger

    found = Ledger(opened)
    entries = found.entries(name)
    if not entries:
        raise BadInput(f"{name}: is not in the ledger of {opened.root}; see sdft status")
    if as_json:
        _print_json(entries)
    else:
        show_ledger(name, entries)
    if broken := first_break(found.entries()):
        fail(broken, DISPROVED)


@app.command()
def lineage(
    reference: Reference,
    form: Annotated[Form, typer.Option("--as", help="Form of the document.")] = Form.TREE,
    out: Annotated[
        str | None, typer.Option(help="A file, or for openlineage also an http address.")
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Make every hash again; exit 4 at the first thing that does not verify.",
        ),
    ] = False,
    home: HomeOption = DEFAULT_HOME,
) -> None:
    """What is in a version: base model, then every skill with data, settings, code and verdict."""
    if out is not None and form is Form.TREE:
        raise BadInput("--out needs --as: the form of the document")
    opened = open_home(home)
    from flows.show_lineage import show_lineage, show_proof
    from tasks.lineage import read_lineage
    from tasks.proof import Disproved, prove

    proof = None
    if verify:
        try:
            proof = prove(opened, reference)
        except Disproved as error:
            fail(str(error), DISPROVED)
    story = read_lineage(opened, reference)
    match form:
        case Form.TREE:
            show_lineage(story)
        case Form.JSON:
            _write(story.model_dump_json(indent=2), out)
        case Form.PAGE:
            from tasks.page import lineage_page

            _write(lineage_page(story), out)
        case Form.CYCLONEDX:
            from tasks.mlbom import ml_bom

            _write(ml_bom(story), out)
        case Form.OPENLINEAGE:
            from tasks.openlineage_events import send

            if out is None:
                raise BadInput("--as openlineage needs --out: a file or an http address")
            sent = send(story, out)
            console.print(f"{sent} events to {shown_address(out)}", markup=False, soft_wrap=True)
    if proof is not None and (form is Form.TREE or out is not None):
        show_proof(proof)


@app.command()
def trace(
    wanted: Annotated[
        str,
        typer.Argument(
            help="A skill, or the hash (8+ digits) of a data row, data set, model or base model."
        ),
    ],
    as_json: AsJson = False,
    home: HomeOption = DEFAULT_HOME,
) -> None:
    """Which versions hold a skill, or what a hash names; exit 1 where not all could be read."""
    opened = open_home(home)
    from flows.show_lineage import show_traces
    from tasks.tracing import trace as find

    traces = find(opened, wanted)
    if as_json:
        print(traces.model_dump_json(indent=2))
    else:
        show_traces(wanted, traces)
    if traces.unread:
        fail(f"incomplete: versions that could not be read: {len(traces.unread)}", ERROR)


@app.command()
def diff(
    before: Reference, after: Reference, as_json: AsJson = False, home: HomeOption = DEFAULT_HOME
) -> None:
    """What changed from one version to another: skills, data rows, settings, scores."""
    opened = open_home(home)
    from flows.show_lineage import show_diff
    from tasks.lineage import diff_versions

    found = diff_versions(opened, before, after)
    if as_json:
        print(found.model_dump_json(indent=2))
    else:
        show_diff(found)


@app.command()
def answers(
    reference: Reference,
    suite: Annotated[str, typer.Argument(help="A skill or a general suite.")],
    wrong: Annotated[bool, typer.Option("--wrong", help="Only those that are not right.")] = False,
    as_json: AsJson = False,
    home: HomeOption = DEFAULT_HOME,
) -> None:
    """What a version answered to a suite's items, and what the gate held that against."""
    opened = open_home(home)
    from flows.show_answers import show_answers
    from tasks.answers import read_answers

    found = read_answers(opened, reference, suite)
    if wrong:
        found = found.only_wrong()
    if as_json:
        print(found.model_dump_json(indent=2))
    else:
        show_answers(found)


@app.command()
def export(
    reference: Reference,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty one.")],
    home: HomeOption = DEFAULT_HOME,
) -> None:
    """Write a version as a plain Hugging Face model directory; exit 4 where its hash is another."""
    opened = open_home(home)
    from tasks.exporting import export as write
    from tasks.proof import Disproved

    try:
        done = write(opened, reference, directory)
    except Disproved as error:
        fail(str(error), DISPROVED)
    told = f"{directory}: {done.name}/{done.version}, {done.files} files"
    console.print(f"{told} ({done.size_bytes / 1e6:.1f} MB)", markup=False, soft_wrap=True)
    proven = f"[green]proven[/]: model {done.model_hash}, as ledger entry {done.entry} says"
    console.print(proven, soft_wrap=True)


def _signed(entry: Entry) -> str:
    return escape(f"ledger entry {entry.seq} by {entry.who}, {entry.time}")


def _write(text: str, out: str | None) -> None:
    if out is None:
        print(text)
    else:
        try:
            write_atomically(Path(out), text + "\n")
        except OSError as error:
            raise BadInput(f"{out}: cannot be written: {error.strerror}") from None


def _print_json(documents: Sequence[Contract]) -> None:
    print(json.dumps([one.model_dump(mode="json") for one in documents], indent=2))
