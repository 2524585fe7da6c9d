"""What a run shows to who watches many: metrics for Prometheus, tables on its page in Prefect."""

import os
import time
from pathlib import Path

import httpx
from prefect import task
from prefect.artifacts import create_markdown_artifact
from prometheus_client import CollectorRegistry, Gauge, generate_latest

from schemas.base import write_atomically
from schemas.curriculum import Curriculum
from schemas.results import RetentionMatrix, Verdict
from schemas.stage import StageRecord
from sdft.record import RECORD
from sdft.stagelog import METRICS, read_metrics
from tasks.console import say, shown_address
from tasks.home import Home
from tasks.publishing import JudgedStage
from tasks.reporting import Report
from tasks.tracking import open_client, run_page

PUSHGATEWAY = "SDFT_PUSHGATEWAY_URL"
DECISIONS = {"pass": 1, "ask": 0, "refuse": -1}
TIMEOUT_S = 10.0


@task(task_run_name="export-{curriculum.name}")
def export_metrics(curriculum: Curriculum, judged: list[JudgedStage], home_dir: str) -> None:
    """Write where a run is to the home's metrics/NAME.prom, which node_exporter can collect.

    A Prometheus Pushgateway at SDFT_PUSHGATEWAY_URL gets the same; one that does not answer is said
    and holds nothing up.
    """
    text = exposition(curriculum, judged)
    folder = Home(home_dir).metrics
    folder.mkdir(exist_ok=True)
    write_atomically(folder / f"{curriculum.name}.prom", text)
    if not (address := os.environ.get(PUSHGATEWAY)):
        return
    place = f"{address.rstrip('/')}/metrics/job/sdft/curriculum/{curriculum.name}"
    try:
        httpx.put(place, content=text, timeout=TIMEOUT_S).raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        said = f"the Pushgateway {shown_address(address)} did not take it ({type(error).__name__})"
        say("metrics", curriculum.name, said, "yellow")


def exposition(curriculum: Curriculum, judged: list[JudgedStage]) -> str:
    """The metrics in Prometheus' text form: of the run, and of the stage that was judged last."""
    registry, name = CollectorRegistry(), curriculum.name

    def gauge(metric: str, help_text: str, value: float, **labels: str) -> None:
        whole = {"curriculum": name, **labels}
        made = Gauge(f"sdft_{metric}", help_text, [*whole], registry=registry)
        made.labels(**whole).set(value)

    left = len(curriculum.skills) - len(judged)
    gauge("skills_waiting", "Skills of the curriculum that this run has not judged yet.", left)
    gauge("skills", "Skills of the curriculum.", len(curriculum.skills))
    gauge("seen_timestamp_seconds", "When this run last judged a stage.", time.time())
    if judged:
        last = judged[-1]
        directory, skill = Path(last.trained.directory), last.trained.skill
        seconds = StageRecord.read(directory / RECORD).train_seconds
        speeds = [line.metrics["tokens_per_s"] for line in read_metrics(directory / METRICS)]
        verdict = DECISIONS[last.verdict.decision]
        gauge("stage_seconds", "Training time of the last stage.", seconds, skill=skill)
        speed = sum(speeds) / len(speeds)
        gauge("tokens_per_second", "Sampled, mean over its steps.", speed, skill=skill)
        gauge("verdict", "1 passed, 0 needs a person, -1 refused.", verdict, skill=skill)
    return generate_latest(registry).decode()


@task(task_run_name="show-{matrix.curriculum}")
def show_in_prefect(
    matrix: RetentionMatrix, verdicts: list[Verdict], report: Report | None, home_dir: str
) -> None:
    """The retention matrix and the gate's judgements as artifacts of the flow run."""
    name = matrix.curriculum
    key = name.replace("_", "-")
    text = retention_markdown(matrix)
    if report is not None:
        text += _links(Home(home_dir), report)
    create_markdown_artifact(text, f"retention-{key}", f"{name}: score after each stage")
    if verdicts:
        gate = gate_markdown(verdicts)
        create_markdown_artifact(gate, f"gate-{key}", f"{name}: what the gate found")


def retention_markdown(matrix: RetentionMatrix) -> str:
    """Rows are stages, columns suites; a stage's own skill is bold."""
    head = ["stage", *matrix.suites, "version", "verdict"]
    lines = [_row(head), _row(["---"] * len(head))]
    for row in matrix.rows:
        cells = [
            ""
            if cell is None
            else f"**{cell.score:.2f}**"
            if suite == row.skill
            else f"{cell.score:.2f}"
            for suite, cell in zip(matrix.suites, row.cells, strict=True)
        ]
        first = f"{row.stage} {row.skill or 'base'}"
        lines.append(_row([first, *cells, row.version or "", row.decision or ""]))
    measures = [
        f"{name.replace('_', ' ')} {value:+.3f}"
        for name, value in matrix.measures.model_dump().items()
        if value is not None
    ]
    return "\n".join([*lines, "", "; ".join(measures), ""])


def gate_markdown(verdicts: list[Verdict]) -> str:
    """One line a judgement, all stages; what did not pass comes with its reason."""
    head = ["stage", "suite", "role", "before", "after", "p", "decision", "reason"]
    lines = [_row(head), _row(["---"] * len(head))]
    for verdict in verdicts:
        for one in verdict.judgements:
            numbers = [_number(one.reference), _number(one.candidate), _number(one.p_value)]
            stage = f"{verdict.stage} {verdict.skill}"
            why = "" if one.decision == "pass" else one.reason
            lines.append(_row([stage, one.suite, one.role, *numbers, one.decision, why]))
    return "\n".join([*lines, ""])


def _links(home: Home, report: Report) -> str:
    """Where the pictures are; in an embedded home there is no page to link to."""
    page = run_page(home, open_client(home).get_run(report.run_id))
    if page is None:
        return f"\nretention/matrix.png and curves.png: `sdft ui`, run `{report.run_id}`\n"
    return f"\n[retention/matrix.png, curves.png and all else in MLflow]({page})\n"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
