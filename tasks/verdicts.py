"""The verdict that stands on a stage, read back from ledger and run."""

from mlflow.exceptions import MlflowException

from schemas.base import BadInput, Contract
from schemas.results import Verdict
from sdft.chain import let_in, newest
from tasks.home import Home
from tasks.ledger import Ledger
from tasks.packages import open_registered, verdict_file
from tasks.tracking import open_client, pass_outage


class StandingVerdict(Contract):
    """The newest verdict on a registered stage."""

    verdict: Verdict
    let_in: bool
    """Whether the next stage started from this one."""


def standing_verdict(home: Home, name: str, stage_key: str) -> StandingVerdict | None:
    """The newest verdict on a stage; None where there is none, or it cannot be read.

    Raises Away where MLflow is away.
    """
    entries = Ledger(home).entries(name)
    of_stage = [one for one in entries if one.kind == "registered" and one.stage_key == stage_key]
    if not of_stage:
        return None
    registered = of_stage[-1]
    version = registered.version or ""
    judged = newest(entries, version, "verdict")
    assert judged is not None and judged.verdict_hash, "registered and judged at once"
    try:
        run = open_registered(open_client(home), registered)
        verdict = Verdict.read(run.file(verdict_file(judged.verdict_hash)))
    except (BadInput, MlflowException, OSError) as error:  # the next run makes it anew
        pass_outage(error, home)
        return None
    return StandingVerdict(verdict=verdict, let_in=let_in(entries, version))
