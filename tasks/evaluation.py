"""Scoring one model on suites: known cells are read, the others made in a child process."""

import shutil
from contextlib import ExitStack
from pathlib import Path

from mlflow import MlflowClient
from prefect import task

from schemas.base import BadInput, Contract
from schemas.curriculum import Suite
from schemas.digest import digest_json
from schemas.parcel import Parcel
from schemas.results import Cell, EvaluationSpec, SuiteSpec
from schemas.settings import EvaluationSettings, RuntimeSettings
from schemas.snapshot import Snapshot
from sdft.cells import CELL, ITEMS, read_cell
from sdft.files import placed
from sdft.modelfiles import all_files
from sdft.record import library_versions
from tasks.basemodel import ModelDir
from tasks.children import run_child
from tasks.console import console, say
from tasks.elsewhere import EVALUATE, Job, deployment, have_done
from tasks.failures import RunFailed
from tasks.home import Home
from tasks.leases import leased
from tasks.packages import evaluation_folder, suite_tag
from tasks.parcels import (
    bring_small,
    is_there,
    model_name,
    received,
    send,
    send_data,
    send_model,
)
from tasks.placement import placed_on


class ScoredCell(Contract):
    """A cell, where its per-item results lie, and where the items do."""

    cell: Cell
    items_file: str
    suite_file: str


def suite_spec(suite: Suite, snapshot: Snapshot) -> SuiteSpec:
    return SuiteSpec(
        name=suite.name,
        file=snapshot.file,
        suite_hash=snapshot.data_hash,
        scorer=suite.scorer,
    )


def evaluation_spec(
    model: ModelDir,
    suites: list[SuiteSpec],
    settings: EvaluationSettings,
    runtime: RuntimeSettings,
) -> EvaluationSpec:
    """The specification of an evaluation: everything that the evaluator is told."""
    return EvaluationSpec(
        model_dir=model.path,
        model_hash=model.model_hash,
        template_hash=model.template_hash,
        suites=tuple(suites),
        settings=settings,
        device=runtime.device,
        libraries=library_versions(),
    )


class EvaluateOrder(Contract):
    """An evaluation for a worker that shares no disk with us: no path in it counts, only hashes."""

    label: str
    spec: EvaluationSpec
    data: dict[str, str]
    """By suite, the parcel of its items."""
    stall_timeout_s: float

    @property
    def key(self) -> str:
        """What is held by who executes it."""
        return _key(self.spec)


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
    home, spec = Home(home_dir), evaluation_spec(model, suites, settings, runtime)
    cells = {one.name: cell for one in suites if (cell := _known_cell(home, spec, one))}
    known = f" ({len(cells)} known)" if cells else ""
    if len(cells) < len(suites):
        if name := deployment(EVALUATE):
            _evaluate_elsewhere(name, spec, home, label, runtime.stall_timeout_s)
        else:
            _evaluate(spec, home, label, runtime.stall_timeout_s)
        cells = {one.name: _cell(home, spec, one) for one in suites}
    scores = "  ".join(f"{name} {scored.cell.score:.2f}" for name, scored in cells.items())
    say("evaluate", label, f"{scores}{known}")
    return cells


def execute(order: EvaluateOrder, home: Home) -> None:
    """What a worker does for `evaluate_model`: the cells are made and sent; nothing stays here.

    Raises RunFailed where they would not be what the other side takes them for.
    """
    spec = order.spec
    ours, theirs = (
        {name: one.partition("+")[0] for name, one in versions.items()}  # 2.13.0+cpu is 2.13.0
        for versions in (library_versions(), spec.libraries)
    )
    if ours != theirs:
        raise RunFailed(
            f"this worker has {ours}, whoever asked has {theirs}: scores would not be comparable; "
            "install the same versions"
        )
    with leased(order.key, order.label, home), ExitStack() as held:
        there = {one.name for one in spec.suites if is_there(home, _parcel(spec, one))}
        model = held.enter_context(received(home, model_name(spec.model_hash)))
        suites: list[SuiteSpec] = []
        for one in spec.suites:
            if one.name not in there:
                folder = held.enter_context(received(home, order.data[one.name]))
                suites.append(one.model_copy(update={"file": str(folder / one.file)}))
        local = spec.model_copy(update={"model_dir": str(model), "suites": tuple(suites)})
        _evaluate(local, home, order.label, order.stall_timeout_s)
        for one in suites:
            directory = home.cells / spec.cell_key(one)
            send(home, Parcel(name=_parcel(spec, one), files=all_files(directory)), directory)
            shutil.rmtree(directory)
        shutil.rmtree(_work(home, local))


def _evaluate_elsewhere(
    name: str, spec: EvaluationSpec, home: Home, label: str, stall_timeout_s: float
) -> None:
    """Have a deployment make the cells that neither we nor the store have, and bring them."""
    suites = [one for one in spec.suites if not _fetch_cell(home, spec, one)]
    if not suites:
        return
    send_model(home, Path(spec.model_dir), spec.model_hash)
    bare = [one.model_copy(update={"file": Path(one.file).name}) for one in suites]
    order = EvaluateOrder(
        label=label,
        spec=spec.model_copy(update={"model_dir": "", "suites": tuple(bare)}),
        data={one.name: send_data(home, Path(one.file).parent) for one in suites},
        stall_timeout_s=stall_timeout_s,
    )
    job = Job(
        deployment=name,
        order=order.model_dump(mode="json"),
        key=order.key,
        step="evaluate",
        label=label,
    )
    have_done(job, home)
    for one in suites:
        if not _fetch_cell(home, spec, one):
            raise RunFailed(f"{label}: {name} has ended, and its score on {one.name} is not there")


def _fetch_cell(home: Home, spec: EvaluationSpec, suite: SuiteSpec) -> bool:
    """Whether a cell is here, or could be brought; what is there is checked where it is read."""
    target = home.cells / spec.cell_key(suite)
    if (target / CELL).is_file():
        return True
    if not is_there(home, _parcel(spec, suite)):
        return False
    home.cells.mkdir(exist_ok=True)
    with placed(target) as partial:
        bring_small(home, _parcel(spec, suite), partial)
    return True


def _parcel(spec: EvaluationSpec, suite: SuiteSpec) -> str:
    return f"cell-{spec.cell_key(suite)}"


def _key(spec: EvaluationSpec) -> str:
    return digest_json([spec.cell_key(suite) for suite in spec.suites])


def _work(home: Home, spec: EvaluationSpec) -> Path:
    return home.cells / f"spec-{spec.model_hash[:16]}-{_key(spec)[:16]}"


def _evaluate(spec: EvaluationSpec, home: Home, label: str, stall_timeout_s: float) -> None:
    home.cells.mkdir(exist_ok=True)
    work = _work(home, spec)
    work.mkdir(exist_ok=True)
    spec.write(work / "spec.json")
    log_file = work / "log.txt"
    with (
        placed_on(spec.device, 1, None, label),
        console.status(f"evaluating {label} on {len(spec.suites)} suites"),
    ):
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
    return ScoredCell(cell=cell, items_file=str(directory / ITEMS), suite_file=suite.file)


def log_scores(client: MlflowClient, run_id: str, cells: dict[str, ScoredCell]) -> None:
    """A stage's row in its MLflow run: of each suite a metric, its items and the answers to them.

    The items are kept here too: those of a skill can change after its own stage was learned.
    """
    tags = client.get_run(run_id).data.tags
    for suite, scored in cells.items():
        asked, known = suite_tag(suite), f"sdft.cell.{suite}"
        if tags.get(asked) != scored.cell.suite_hash:
            client.log_artifact(run_id, scored.suite_file, evaluation_folder(suite))
            client.set_tag(run_id, asked, scored.cell.suite_hash)
        if tags.get(known) != scored.cell.items_sha256:
            client.log_artifact(run_id, scored.items_file, evaluation_folder(suite))
            client.log_metric(run_id, f"eval/{suite}", scored.cell.score)
            client.set_tag(run_id, known, scored.cell.items_sha256)
