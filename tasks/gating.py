"""The gate as a step of the flow: judge, say it; and write the verdict down."""

import tempfile
from pathlib import Path

import pyarrow.parquet as pq
from prefect import task

from schemas.base import BadInput
from schemas.digest import digest_file
from schemas.results import Cell, ItemResult, MatrixRow, Verdict, cell_key
from schemas.settings import GateSettings
from sdft.cells import ITEMS
from sdft.pairing import pairings
from tasks.console import say
from tasks.home import Home
from tasks.packages import VERDICTS, reference_folder, verdict_file
from tasks.tracking import open_client

LINES = {
    "pass": ("passed: {gain:+.2f} on the new skill", "green"),
    "ask": ("needs a person", "yellow"),
    "refuse": ("refused", "red"),
}


@task(task_run_name="gate-{candidate.stage}-{candidate.skill}")
def gate_stage(
    candidate: MatrixRow,
    kept: list[MatrixRow],
    settings: dict[str, GateSettings],
    general: list[str],
    home_dir: str,
) -> Verdict:
    """The verdict on a stage; `settings` by suite, in row order."""
    from sdft.gate import judge  # scipy costs a second

    home = Home(home_dir)
    needed = pairings(candidate, kept, list(settings), general)
    cells = [cell for one in needed for cell in (one.before, one.after) if cell is not None]
    items = {cell.key: read_item_results(home, cell) for cell in cells}
    verdict = judge(candidate, kept, settings, general, items)
    line, style = LINES[verdict.decision]
    say("gate", verdict.skill, line.format(gain=verdict.judgements[0].change), style)
    for reason in verdict.reasons:
        say("", "", reason, style)
    return verdict


def references_of(verdict: Verdict, kept: list[MatrixRow], home: Home) -> dict[str, str]:
    """The items file of each suite that a verdict compares with."""
    hashes = {row.stage: row.model_hash for row in kept}
    return {
        one.suite: str(_items(home, hashes[one.reference_stage], one.reference_cell.fingerprint))
        for one in verdict.judgements
        if one.reference_cell is not None
    }


def keep_verdict(verdict: Verdict, references: dict[str, str], run_id: str, home: Home) -> None:
    """Make a verdict an artifact of its stage's run, with the answers that it compares with.

    An earlier verdict stays beside it.
    """
    client = open_client(home)
    tags = client.get_run(run_id).data.tags
    for one in verdict.judgements:
        known = f"sdft.reference.{one.suite}"
        if one.reference_cell and tags.get(known) != one.reference_cell.items_sha256:
            client.log_artifact(run_id, references[one.suite], reference_folder(one.suite))
            client.set_tag(run_id, known, one.reference_cell.items_sha256)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / verdict_file(verdict.digest)
        path.parent.mkdir()
        verdict.write(path)
        client.log_artifact(run_id, str(path), VERDICTS)


def read_item_results(home: Home, cell: Cell) -> list[ItemResult]:
    """The items behind a cell; raises BadInput where the file is not the one it was made with."""
    path = _items(home, cell.model_hash, cell.fingerprint)
    if not path.is_file() or digest_file(path) != cell.items_sha256:
        raise BadInput(
            f"{path}: is missing or not what cell.json lists; delete {path.parent}, and the cell "
            "is made again"
        )
    columns = ["id", "status", "score"]
    return [ItemResult(**row) for row in pq.read_table(path, columns=columns).to_pylist()]


def _items(home: Home, model_hash: str, fingerprint: str) -> Path:
    return home.cells / cell_key(model_hash, fingerprint) / ITEMS
