"""The gate as a step of the flow: judge, write the verdict down, say it."""

import tempfile
from pathlib import Path

from prefect import task

from schemas.results import MatrixRow, Verdict
from schemas.settings import GateSettings
from sdft.gate import judge
from tasks.console import say
from tasks.home import Home
from tasks.tracking import open_client


@task(task_run_name="gate-{candidate.stage}-{candidate.skill}")
def gate_stage(
    candidate: MatrixRow,
    kept: list[MatrixRow],
    suites: list[str],
    general: list[str],
    settings: GateSettings,
    run_id: str,
    home_dir: str,
) -> Verdict:
    """The verdict on a stage, kept as an artifact of its run."""
    verdict = judge(candidate, kept, suites, general, settings)
    client = open_client(Home(home_dir))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "verdict.json"
        verdict.write(path)
        client.log_artifact(run_id, str(path))
    if verdict.passed:
        gain = verdict.judgements[0].change
        say("gate", verdict.skill, f"passed: {gain:+.2f} on the new skill", "green")
    else:
        say("gate", verdict.skill, "refused", "red")
        for reason in verdict.reasons:
            say("", "", reason, "red")
    return verdict
