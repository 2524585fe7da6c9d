"""What a run can do while it waits for Prefect's own server to start."""

from contextlib import suppress
from importlib import import_module

from tasks.elsewhere import EVALUATE, TRAIN, deployment
from tasks.forked import forks
from tasks.home import Home
from tasks.tracking import Away, open_client, reaching


def warm_up(home: Home) -> None:
    """Do what a home's first run spends seconds on: imports for its programs and for validation,
    MLflow's tables."""
    is_new = not home.data.is_dir()
    if is_new and not (deployment(TRAIN) and deployment(EVALUATE)):
        forks.start()
    with suppress(Away), reaching(home):  # an outage is told where it is in the way
        open_client(home)
    if is_new:
        for library in ("great_expectations", "sdft.facts"):
            import_module(library)
