"""Prefect's server: our own started, and one that is away or closed to us told plainly."""

import functools
import subprocess
import threading
from collections.abc import Generator
from concurrent.futures import Future
from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import httpx
from prefect import get_client, tags
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL

from schemas.base import BadInput
from sdft.process import exclusive
from tasks.console import shown_address
from tasks.failures import RunFailed
from tasks.home import Home
from tasks.tethered import tethered

LOG = "prefect/server.log"
"""In a home: what its own server says, which is nothing for the user of a command."""
_UNREACHED = ("Failed to reach API", "Timed out while attempting to connect")
"""How Prefect's client says so of a server that it has not reached yet, and of its own temporary
one."""


class PrefectAway(RunFailed):
    """Prefect's server cannot be reached."""


class PrefectNotLetIn(BadInput):
    """Prefect's server wants another name or password."""


@contextmanager
def reaching_prefect() -> Generator[None]:
    """Turn an outage of Prefect's server into PrefectAway, after its client's own retries, a wrong
    password into PrefectNotLetIn; other errors pass."""
    try:
        yield
    except (httpx.TransportError, httpx.HTTPStatusError, RuntimeError) as error:
        where = PREFECT_API_URL.value()
        said = f" ({shown_address(where)})" if where else ""
        if isinstance(error, httpx.HTTPStatusError) and error.response.status_code in (401, 403):
            raise PrefectNotLetIn(
                f"Prefect's server{said} does not let you in; set PREFECT_API_AUTH_STRING to "
                "user:password"
            ) from error
        if not _is_outage(error):
            raise
        raise PrefectAway(f"Prefect's server does not answer{said}") from error


@contextmanager
def own_prefect(home: Home) -> Generator[None]:
    """Start Prefect's temporary server for this process, where no other one is named.

    It starts beside what is done inside, and is there at the end of that. One process of a home at
    a time: two that make its tables at once break its migrations.
    """
    if PREFECT_API_URL.value():
        yield
        return
    from prefect.server.api import server

    started: Future[None] = Future()

    def start() -> None:
        try:
            with exclusive(home.root / "prefect"), (home.root / LOG).open("ab") as log:
                own = functools.partial(tethered, stdout=log, stderr=log)
                ours = SimpleNamespace(Popen=own, TimeoutExpired=subprocess.TimeoutExpired)
                with patch.object(server, "subprocess", ours):
                    get_client(sync_client=True)
            started.set_result(None)
        except BaseException as error:  # raised below
            started.set_exception(error)

    threading.Thread(target=start, daemon=True).start()
    yield
    started.result()


@contextmanager
def tagged(tag: str) -> Generator[None]:
    """Tag the flow run that this is in, which a schedule may have made, and what it starts."""
    there = list(flow_run.tags or [])
    if tag not in there:
        with get_client(sync_client=True) as client:
            client.update_flow_run(flow_run.id, tags=[*there, tag])
    with tags(tag):
        yield


def _is_outage(error: Exception) -> bool:
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code >= 500
    return isinstance(error, httpx.TransportError) or str(error).startswith(_UNREACHED)
