"""Scoring one model on suites: known cells are read, the others made in a child process."""

import shutil

from mlflow import MlflowClient
from prefect import task

from schemas.base import BadInput, Contract
from schemas.curriculum import Suite
from schemas.results import Cell, EvaluationSpec, SuiteSpec
from schemas.settings import EvaluationSettings, RuntimeSettings
from schemas.snapshot import Snapshot
from sdft.cells import CELL, ITEMS, read_cell
from sdft.record import library_versions
from tasks.basemodel import ModelDir
from tasks.children import run_child
from tasks.console import console, say
from tasks.home import Home


class ScoredCell(Contract):
    """A cell and where its per-item results lie."""

    cell: Cell
    items_file: str


def suite_spec(suite: Suite, snapshot: Snapshot) -> SuiteSpec:
    return SuiteSpec(
        name=suite.name,
        file=snapshot.file,
        suite_hash=snapshot.data_hash,
        scorer=suite.scorer,
    )


@task(task_run_name="evaluate-{label}")
def evaluate_model(
    label: str,
    model: ModelDir,
    suites: list[SuiteSpec],
    settings: EvaluationSettings,
    runtime: RuntimeSettings,
    home_dir: str,
) -> dict[str, ScoredCell]:
    """The cells of one model on the given suites, by suite name."""
    home = Home(home_dir)
    spec = EvaluationSpec(
        model_dir=model.path,
        model_hash=model.model_hash,
        template_hash=model.template_hash,
        suites=tuple(suites),
        settings=settings,
        device=runtime.device,
        libraries=library_versions(),
    )
    cells = {one.name: cell for one in suites if (cell := _known_cell(home, spec, one))}
    known = f" ({len(cells)} known)" if cells else ""
    if len(cells) < len(suites):
        _evaluate(spec, home, label, runtime.stall_timeout_s)
        cells = {one.name: _cell(home, spec, one) for one in suites}
    scores = "  ".join(f"{name} {scored.cell.score:.2f}" for name, scored in cells.items())
    say("evaluate", label, f"{scores}{known}")
    return cells


def _evaluate(spec: EvaluationSpec, home: Home, label: str, stall_timeout_s: float) -> None:
    home.cells.mkdir(exist_ok=True)
    work = home.cells / f"spec-{spec.model_hash[:16]}"
    work.mkdir(exist_ok=True)
    spec.write(work / "spec.json")
    log_file = work / "log.txt"
    with console.status(f"evaluating {label} on {len(spec.suites)} suites"):
        run_child(
            "sdft.evaluate",
            work / "spec.json",
            home.cells,
            log_file,
            lambda: log_file.stat().st_size,
            stall_timeout_s,
        )


def _known_cell(home: Home, spec: EvaluationSpec, suite: SuiteSpec) -> ScoredCell | None:
    """The cell if it is there; one that was altered is removed, and made again."""
    directory = home.cells / spec.cell_key(suite)
    if not (directory / CELL).is_file():
        return None
    try:
        return _cell(home, spec, suite)
    except BadInput as error:
        say("evaluate", suite.name, f"{error}; made again", "yellow")
        shutil.rmtree(directory)
        return None


def _cell(home: Home, spec: EvaluationSpec, suite: SuiteSpec) -> ScoredCell:
    directory = home.cells / spec.cell_key(suite)
    cell = read_cell(directory, spec, suite)
    return ScoredCell(cell=cell, items_file=str(directory / ITEMS))


def log_scores(client: MlflowClient, run_id: str, cells: dict[str, ScoredCell]) -> None:
    """A stage's row in its MLflow run: one metric and one items file a suite."""
    tags = client.get_run(run_id).data.tags
    for suite, scored in cells.items():
        known = f"sdft.cell.{suite}"
        if tags.get(known) != scored.cell.fingerprint:
            client.log_artifact(run_id, scored.items_file, f"evaluation/{suite}")
            client.log_metric(run_id, f"eval/{suite}", scored.cell.score)
            client.set_tag(run_id, known, scored.cell.fingerprint)
