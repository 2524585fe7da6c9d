"""Prefect's server: an outage that its client did not outlast, told without a traceback."""

from collections.abc import Generator
from contextlib import contextmanager

import httpx
from prefect.settings import PREFECT_API_URL

from tasks.console import shown_address
from tasks.failures import RunFailed

_UNREACHED = "Failed to reach API"
"""How Prefect's client says so where it has not reached its server yet."""


class PrefectAway(RunFailed):
    """Prefect's server cannot be reached."""


@contextmanager
def reaching_prefect() -> Generator[None]:
    """Turn an outage of Prefect's server into PrefectAway, after its client's own retries."""
    try:
        yield
    except (httpx.TransportError, httpx.HTTPStatusError, RuntimeError) as error:
        if not _is_outage(error):
            raise
        where = PREFECT_API_URL.value()
        said = f" ({shown_address(where)})" if where else ""
        raise PrefectAway(f"Prefect's server does not answer{said}") from error


def _is_outage(error: Exception) -> bool:
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code >= 500
    return isinstance(error, httpx.TransportError) or str(error).startswith(_UNREACHED)
