"""Promotion and rollback: a compare-and-swap in the ledger, and the registry's aliases after it."""

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import (
    BAD_REQUEST,
    INVALID_PARAMETER_VALUE,
    RESOURCE_DOES_NOT_EXIST,
    ErrorCode,
)
from prefect import task

from schemas.base import BadInput
from schemas.ledger import CHANGES, Champion, Draft, Entry, Kind
from sdft.chain import about, champion, champions, newest
from tasks.console import say
from tasks.home import Home
from tasks.ledger import Ledger
from tasks.packages import check_package, open_registered
from tasks.tracking import VERDICT_TAG, open_client

_NOT_THERE = (
    ErrorCode.Name(RESOURCE_DOES_NOT_EXIST),  # no such model
    ErrorCode.Name(INVALID_PARAMETER_VALUE),  # no such alias
)
_COLLISION = ErrorCode.Name(BAD_REQUEST)
"""Two set an alias or tag for the first time: the second one meets the first one's row."""
CANDIDATE, CHAMPION = "candidate", "champion"
ALIASES = "aliases"
"""The registry's aliases as a mirror of the ledger: the name of its cursor."""
ROUNDS = 20
"""How often the aliases are set before somebody else must be moving them all the time."""
LEDGER_HEAD = "sdft.ledger_head"
"""Tag of the registered model: the newest entry, so that a ledger cut short is found."""


def promote(
    home: Home, name: str, version: str, expect: str | None = None, override: str = ""
) -> Entry:
    """Make a version the champion; returns the ledger's entry of it.

    `expect` is the version that must be champion now (`none` for no champion); without it, the one
    that is. A version that the gate did not pass needs `override`, the reason of whoever lets it
    in. Asking again for what is done changes nothing. Raises BadInput for a version that may not
    serve or whose files are not as registered, and Raced when somebody else was faster.
    """
    ledger = Ledger(home)
    entries = ledger.entries(name)
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
        draft = _about(registered, "overridden", verdict)
        drafts.append(draft.model_copy(update={"reason": override.strip()}))
    check_package(open_registered(open_client(home), registered))
    drafts.append(_about(registered, "promoted", verdict))
    *_, entry = ledger.append(drafts, _expected(now, expect, name))
    mirror(home, name)
    return entry


def rollback(home: Home, name: str, to: str | None = None, expect: str | None = None) -> Entry:
    """Put an earlier champion back, or version `to`; returns the ledger's entry of it.

    Without `to` it is the champion before, by the ledger; rolling back twice goes one further.
    With `expect` the request can be repeated: once it is done, asking again changes nothing. The
    target's files must be as registered. Raises BadInput or Raced.
    """
    ledger = Ledger(home)
    entries = ledger.entries(name)
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
    check_package(open_registered(open_client(home), registered))
    draft = _about(registered, "rolled back", newest(entries, to, "verdict"))
    [entry] = ledger.append([draft], _expected(now, expect, name))
    mirror(home, name)
    return entry


def mirror(home: Home, name: str) -> None:
    """Bring the registry's aliases to what the ledger says, and read them back.

    Whoever comes late, even paused between ledger and alias, reads the ledger again after writing,
    so the last one to leave has written what is true.
    """
    ledger, client = Ledger(home), open_client(home)
    place = ledger.cursor(ALIASES, name)  # once: others move it while this one may be paused
    for _ in range(ROUNDS):
        entries = ledger.entries(name)
        assert entries, f"{name} is not in the ledger"
        try:
            _set_aliases(client, name, entries)
            _mirror_verdicts(client, name, entries, place)
        except MlflowException as error:
            if error.error_code != _COLLISION:
                raise
            continue
        if ledger.entries(name) == entries and not drift(client, name, entries):
            ledger.advance(ALIASES, name, entries[-1].seq)
            return
    raise BadInput(f"{name}: its aliases keep changing; end what else moves them, then reconcile")


def _set_aliases(client: MlflowClient, name: str, entries: list[Entry]) -> None:
    for alias, version in wanted_aliases(entries).items():
        found = alias_version(client, name, alias)
        if version is None and found is not None:
            client.delete_registered_model_alias(name, alias)
        elif version is not None and found != version:
            client.set_registered_model_alias(name, alias, version)
    head = entries[-1]
    client.set_registered_model_tag(name, LEDGER_HEAD, f"{head.seq}:{head.hash}")


def _mirror_verdicts(client: MlflowClient, name: str, entries: list[Entry], place: int) -> None:
    """The verdicts that the registry has not taken over yet, as tags of their versions."""
    for entry in entries:
        if entry.kind == "verdict" and entry.seq > place:
            client.set_model_version_tag(name, entry.version, VERDICT_TAG, entry.decision)


def wanted_aliases(entries: list[Entry]) -> dict[str, str | None]:
    """What one name's entries say that its aliases must be; None where there must be none."""
    candidates = [one.version for one in entries if one.kind in ("registered", "verdict")]
    stack = champions(entries)
    return {  # in the order of their weight: the first is set first
        CHAMPION: stack[-1] if stack else None,
        CANDIDATE: candidates[-1] if candidates else None,
    }


def drift(client: MlflowClient, name: str, entries: list[Entry]) -> list[str]:
    """How the registry's aliases differ from the ledger: one line an alias."""
    return [
        f"{name}: the alias {alias} is on version {found}, the ledger says {wanted}"
        for alias, wanted in wanted_aliases(entries).items()
        if (found := alias_version(client, name, alias)) != wanted
    ]


def alias_version(client: MlflowClient, name: str, alias: str) -> str | None:
    """The version that an alias points to; None where there is no model or alias."""
    try:
        return str(client.get_model_version_by_alias(name, alias).version)
    except MlflowException as error:
        if error.error_code in _NOT_THERE:
            return None
        raise


@task(task_run_name="settle-registry-{name}")
def settle_registry(name: str, home_dir: str) -> None:
    """Finish what a crash left between ledger and aliases; say which aliases were moved by hand."""
    home = Home(home_dir)
    ledger = Ledger(home)
    entries = ledger.entries(name)
    if entries and ledger.cursor(ALIASES, name) < entries[-1].seq:
        mirror(home, name)
    for line in drift(open_client(home), name, entries) if entries else []:
        say("registry", name, f"{line}; sdft reconcile puts it back", "yellow")


def reconcile(home: Home, name: str) -> list[str]:
    """Make the registry what the ledger says; returns what was found, one line each.

    Work that a crash left between ledger and aliases is finished. An alias that was moved by hand
    is put back, which leaves a `repaired` entry. What only a person can decide is only said.
    """
    ledger, client = Ledger(home), open_client(home)
    entries = ledger.entries(name)
    if not entries:
        raise BadInput(f"{name}: is not in the ledger of {home.root}; see sdft status")
    found = drift(client, name, entries)
    behind = ledger.cursor(ALIASES, name) < entries[-1].seq
    if found and behind:
        found = [f"{line}: finished" for line in found]
    elif found:
        ledger.append([Draft(kind="repaired", name=name, version=None, reason="; ".join(found))])
        found = [f"{line}: moved by hand, put back" for line in found]
    if found or behind:
        mirror(home, name)
    known = {one.version for one in entries if one.kind == "registered"}
    there = {str(one.version) for one in client.search_model_versions(f"name = '{name}'")}
    found += [
        f"{name}/{one}: is in the registry only; sdft learn or delete it"
        for one in sorted(there - known, key=int)
    ]
    found += [
        f"{name}/{one}: is in the ledger, but gone from the registry"
        for one in sorted((v for v in known - there if v), key=int)
    ]
    return found


def _registered(entries: list[Entry], name: str, version: str) -> Entry:
    found = newest(entries, version, "registered")
    if found is None:
        known = ", ".join(one.version or "" for one in entries if one.kind == "registered")
        raise BadInput(f"{name}/{version}: is no version in the ledger; there are: {known or '-'}")
    return found


def _about(registered: Entry, kind: Kind, verdict: Entry | None) -> Draft:
    if verdict is None:
        return about(registered, kind, None, None)
    return about(registered, kind, verdict.verdict_hash, verdict.decision)


def _expected(now: Champion, expect: str | None, name: str) -> Champion:
    """The champion to swap against; raises BadInput where it is not who the caller expects."""
    if expect is not None and expect != (now.version or "none"):
        raise BadInput(
            f"{name}: the champion is version {now.version or 'none'}, not {expect} as expected; "
            "look at sdft status and ask again"
        )
    return now
