"""Events out: promotions, rollbacks and refusals, sent from the ledger at least once, in order.

Each consumer has its cursor in the ledger's database: what was not taken is sent again by the next
`learn`, `promote`, `rollback` or `reconcile`. An event's id is its entry's hash, so that whoever
gets it twice can tell.
"""

import hashlib
import hmac
import os
import uuid
from collections.abc import Callable

import httpx

from schemas.base import BadInput
from schemas.digest import canonical_json, digest_text
from schemas.ledger import Entry
from tasks.console import say
from tasks.failures import RunFailed
from tasks.home import WEBHOOK_SECRET, WEBHOOK_URL, Home
from tasks.ledger import Ledger

SENT_KINDS = ("promoted", "rolled back", "refused")
TIMEOUT_S = 10.0


def deliver(home: Home, name: str, in_flow: bool = False) -> None:
    """Send a name's entries to every consumer there is, from its cursor on.

    The webhook is used where SDFT_WEBHOOK_URL is set, Prefect's events inside a flow or where
    PREFECT_API_URL is set. A consumer that does not answer is said and keeps its place; nothing
    else is held up by it.
    """
    ledger = Ledger(home)
    if url := os.environ.get(WEBHOOK_URL):
        _send(ledger, name, f"webhook {digest_text(url)[:16]}", lambda entry: _post(url, entry))
    if in_flow or os.environ.get("PREFECT_API_URL"):
        _send(ledger, name, "prefect", _emit)


def _send(ledger: Ledger, name: str, consumer: str, send: Callable[[Entry], object]) -> None:
    """Send from a consumer's cursor on; a webhook is told by the hash of its address."""
    place = ledger.cursor(consumer, name)
    for entry in ledger.entries(name):
        if entry.seq <= place:
            continue
        if entry.kind in SENT_KINDS:
            try:
                send(entry)
            except (httpx.HTTPError, httpx.InvalidURL, BadInput, RunFailed) as error:
                said = f"{consumer} did not take entry {entry.seq} ({_why(error)})"
                say("events", name, f"{said}; sdft reconcile sends it again", "yellow")
                return
        ledger.advance(consumer, name, entry.seq)


def _why(error: Exception) -> str:
    """What went wrong, without the address: it may hold a secret."""
    if isinstance(error, httpx.HTTPStatusError):
        return f"it answered {error.response.status_code}"
    if isinstance(error, BadInput | RunFailed):
        return str(error)
    return type(error).__name__


def event_name(entry: Entry) -> str:
    """Such as sdft.promoted or sdft.rolled-back."""
    return f"sdft.{entry.kind.replace(' ', '-')}"


def _post(url: str, entry: Entry) -> None:
    body = canonical_json({"event": event_name(entry), "entry": entry.model_dump()}).encode()
    headers = {
        "Content-Type": "application/json",
        "X-Sdft-Event": event_name(entry),
        "X-Sdft-Delivery": entry.hash,
        "X-Sdft-Signature": f"sha256={signature(os.environ[WEBHOOK_SECRET], body)}",
    }
    httpx.post(url, content=body, headers=headers, timeout=TIMEOUT_S).raise_for_status()


def signature(secret: str, body: bytes) -> str:
    """HMAC-SHA256 of an event's body, as 64 hex digits."""
    return hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


def _emit(entry: Entry) -> None:
    """Over the REST interface, which says whether the event was taken; `emit_event` does not."""
    from prefect.client.orchestration import get_client
    from prefect.events import Event, Resource

    from tasks.orchestration import reaching_prefect

    event = Event(
        id=uuid.uuid5(uuid.NAMESPACE_OID, entry.hash),
        event=event_name(entry),
        resource=Resource(
            {
                "prefect.resource.id": f"sdft.model.{entry.name}",
                "prefect.resource.name": entry.name,
                "sdft.version": entry.version or "",
            }
        ),
        payload=entry.model_dump(),
    )
    with reaching_prefect(), get_client(sync_client=True) as client:
        client.request("POST", "/events", json=[event.model_dump(mode="json")])
