"""Promotion and rollback: a compare-and-swap in the ledger, and the aliases after it."""

from mlflow import MlflowClient

from schemas.base import BadInput
from schemas.ledger import CHANGES, Champion, Draft, Entry, Kind
from sdft.chain import about, champion, champions, newest
from tasks.aliases import mirror, own_entries
from tasks.home import Home
from tasks.ledger import Ledger, check_text
from tasks.packages import check_package, open_registered
from tasks.tracking import open_client


def promote(
    home: Home, name: str, version: str, expect: str | None = None, override: str = ""
) -> Entry:
    """Make a version the champion; returns the ledger's entry of it.

    `expect` is the version that must be champion now (`none` for no champion); without it, the one
    that is. A version that the gate did not pass needs `override`, the reason of whoever lets it
    in. Asking again for what is done changes nothing. Raises BadInput for a version that may not
    serve or whose files are not as registered, and Raced when somebody else was faster.
    """
    check_text("--override", override)
    ledger, client = Ledger(home), open_client(home)
    entries = _entries(home, ledger, client, name)
    registered = _registered(entries, name, version)
    now = champion(entries)
    if now.version == version:
        mirror(home, name)
        done = newest(entries, version, *CHANGES)
        assert done is not None, f"{name}/{version} is champion without an entry"
        return done
    verdict = newest(entries, version, "verdict")
    drafts: list[Draft] = []
    if verdict is None or verdict.decision != "pass":
        said = f"the gate said {verdict.decision}" if verdict else "no gate has judged it"
        if not override.strip():
            raise BadInput(
                f"{name}/{version}: {said}; to let it in all the same, give the reason with "
                "--override (it stays in the ledger with your name)"
            )
        drafts.append(_about(registered, "overridden", verdict, override.strip()))
    check_package(open_registered(client, registered))
    drafts.append(_about(registered, "promoted", verdict, override.strip()))
    *_, entry = ledger.append(drafts, _expected(now, expect, name))
    mirror(home, name)
    return entry


def rollback(home: Home, name: str, to: str | None = None, expect: str | None = None) -> Entry:
    """Put an earlier champion back, or version `to`; returns the ledger's entry of it.

    Without `to` it is the champion before, by the ledger; rolling back twice goes one further.
    With `expect` the request can be repeated: once it is done, asking again changes nothing. The
    target's files must be as registered. Raises BadInput or Raced.
    """
    ledger, client = Ledger(home), open_client(home)
    entries = _entries(home, ledger, client, name)
    now = champion(entries)
    last = next((one for one in reversed(entries) if one.epoch is not None), None)
    repeated = last is not None and last.kind == "rolled back" and last.expected == expect
    if last is not None and expect is not None and repeated and to in (None, last.version):
        mirror(home, name)
        return last
    if to is None:
        earlier = champions(entries)[:-1]
        if not earlier:
            raise BadInput(f"{name}: has no earlier champion to go back to; see sdft ledger {name}")
        to = earlier[-1]
    elif newest(entries, to, *CHANGES) is None:
        raise BadInput(f"{name}/{to}: was never champion; sdft promote can make it one")
    if to == now.version:
        raise BadInput(f"{name}/{to}: is the champion already")
    registered = _registered(entries, name, to)
    check_package(open_registered(client, registered))
    draft = _about(registered, "rolled back", newest(entries, to, "verdict"))
    [entry] = ledger.append([draft], _expected(now, expect, name))
    mirror(home, name)
    return entry


def _entries(home: Home, ledger: Ledger, client: MlflowClient, name: str) -> list[Entry]:
    entries = own_entries(ledger, client, name)
    if not entries:
        raise BadInput(f"{name}: is not in the ledger of {home.root}; see sdft status")
    return entries


def _registered(entries: list[Entry], name: str, version: str) -> Entry:
    found = newest(entries, version, "registered")
    if found is None:
        known = ", ".join(one.version or "" for one in entries if one.kind == "registered")
        raise BadInput(f"{name}/{version}: is no version in the ledger; there are: {known or '-'}")
    return found


def _about(registered: Entry, kind: Kind, verdict: Entry | None, reason: str = "") -> Draft:
    judged = (verdict.verdict_hash, verdict.decision) if verdict else (None, None)
    return about(registered, kind, *judged).model_copy(update={"reason": reason})


def _expected(now: Champion, expect: str | None, name: str) -> Champion:
    """The champion to swap against; raises BadInput where it is not who the caller expects."""
    if expect is not None and expect != (now.version or "none"):
        raise BadInput(
            f"{name}: the champion is version {now.version or 'none'}, not {expect} as expected; "
            "look at sdft status and ask again"
        )
    return now
