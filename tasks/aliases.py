"""The registry's aliases and verdict tags as a mirror of the ledger: set, compared, put right."""

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST, ErrorCode

from schemas.base import BadInput
from schemas.ledger import Draft, Entry
from sdft.chain import champions
from tasks.home import Home
from tasks.ledger import Ledger
from tasks.packages import open_registered
from tasks.tracking import NOT_THERE, VERDICT_TAG, all_versions, experiment, open_client

_COLLISION = ErrorCode.Name(BAD_REQUEST)
"""Two set an alias or tag for the first time: the second one meets the first one's row."""
CANDIDATE, CHAMPION = "candidate", "champion"
ALIASES = "aliases"
"""The name of this mirror's cursor in the ledger."""
ROUNDS = 20
"""Attempts before giving up: something else keeps moving the aliases."""
LEDGER_HEAD = "sdft.ledger_head"
"""Tag of the registered model: the newest entry, so that a ledger cut short is found."""


def mirror(home: Home, name: str) -> None:
    """Bring the registry's aliases and tags to what the ledger says, and read them back.

    Whoever comes late, even paused between ledger and alias, reads the ledger again after writing,
    so the last one to leave has written what is true.
    """
    ledger, client = Ledger(home), open_client(home)
    for _ in range(ROUNDS):
        entries = own_entries(ledger, client, name)
        assert entries, f"{name} is not in the ledger"
        try:
            _set_aliases(client, name, entries)
            for version, (_, decision) in _wrong_verdicts(client, name, entries).items():
                client.set_model_version_tag(name, version, VERDICT_TAG, decision)
        except MlflowException as error:
            if error.error_code != _COLLISION:
                raise
            continue
        if ledger.entries(name) == entries and not drift(client, name, entries):
            ledger.advance(ALIASES, name, entries[-1].seq)
            return
    raise BadInput(f"{name}: its aliases keep changing; end what else moves them, then reconcile")


def _set_aliases(client: MlflowClient, name: str, entries: list[Entry]) -> None:
    for alias, version in _settable(client, name, entries).items():
        found = alias_version(client, name, alias)
        if version is None and found is not None:
            client.delete_registered_model_alias(name, alias)
        elif version is not None and found != version:
            client.set_registered_model_alias(name, alias, version)
    head = entries[-1]
    client.set_registered_model_tag(name, LEDGER_HEAD, f"{head.seq}:{head.hash}")


def _wrong_verdicts(
    client: MlflowClient, name: str, entries: list[Entry]
) -> dict[str, tuple[str | None, str | None]]:
    """By version, the tag that is not the newest verdict, and that verdict."""
    newest = {one.version: one.decision for one in entries if one.kind == "verdict"}
    tags = {str(one.version): one.tags.get(VERDICT_TAG) for one in all_versions(client, name)}
    return {
        version: (tags[version], decision)
        for version, decision in newest.items()
        if version in tags and tags[version] != decision
    }


def wanted_aliases(entries: list[Entry]) -> dict[str, str | None]:
    """What one name's entries say that its aliases must be; None where there must be none."""
    candidates = [one.version for one in entries if one.kind in ("registered", "verdict")]
    stack = champions(entries)
    return {  # in the order of their weight: the first is set first
        CHAMPION: stack[-1] if stack else None,
        CANDIDATE: candidates[-1] if candidates else None,
    }


def _settable(client: MlflowClient, name: str, entries: list[Entry]) -> dict[str, str | None]:
    """The wanted aliases, without those of versions that were deleted from the registry."""
    there = versions_of(client, name)
    wanted = wanted_aliases(entries).items()
    return {alias: version for alias, version in wanted if version is None or version in there}


def versions_of(client: MlflowClient, name: str) -> set[str]:
    """The versions that the registry has of a name."""
    return {str(one.version) for one in all_versions(client, name)}


def drift(client: MlflowClient, name: str, entries: list[Entry]) -> list[str]:
    """How the registry's aliases and verdict tags differ from the ledger: one line each."""
    moved = [
        f"{name}: the alias {alias} is on version {found}, the ledger says {wanted}"
        for alias, wanted in _settable(client, name, entries).items()
        if (found := alias_version(client, name, alias)) != wanted
    ]
    return moved + [
        f"{name}/{version}: tag {VERDICT_TAG} is {found}, the ledger says {decision}"
        for version, (found, decision) in _wrong_verdicts(client, name, entries).items()
    ]


def alias_version(client: MlflowClient, name: str, alias: str) -> str | None:
    """The version that an alias points to; None where there is no model or alias."""
    try:
        return str(client.get_model_version_by_alias(name, alias).version)
    except MlflowException as error:
        if error.error_code in NOT_THERE:
            return None
        raise


def settle(home: Home, name: str) -> list[str]:
    """Finish what a crash left between ledger and aliases; returns the drift that is no crash's.

    Raises BadInput where nothing could be registered since the experiment was deleted.
    """
    ledger, client = Ledger(home), open_client(home)
    experiment(client, home, name)
    entries = own_entries(ledger, client, name)
    if not entries:
        return []
    if is_behind(ledger, entries):
        mirror(home, name)
    return drift(client, name, entries)


def is_behind(ledger: Ledger, entries: list[Entry]) -> bool:
    """Whether the aliases have yet to take over some of one name's entries."""
    return ledger.cursor(ALIASES, entries[-1].name) < entries[-1].seq


def own_entries(ledger: Ledger, client: MlflowClient, name: str) -> list[Entry]:
    """One name's entries, after proving that the registry's model of that name follows them.

    Raises BadInput where the registry has seen an entry that is not there: the ledger was cut
    short, or the registry belongs to another one.
    """
    try:
        head = client.get_registered_model(name).tags.get(LEDGER_HEAD)
    except MlflowException as error:
        if error.error_code not in NOT_THERE:
            raise
        head = None
    entries = ledger.entries(name)  # after the head, since the ledger only grows
    if head is not None and head not in {f"{one.seq}:{one.hash}" for one in entries}:
        raise BadInput(
            f"{name}: the registry knows the ledger's entry {head}, which is not there: the ledger "
            "was cut short, or the registry belongs to another ledger (SDFT_LEDGER_URL names it)"
        )
    return entries


def reconcile(home: Home, name: str) -> list[str]:
    """Make the registry what the ledger says; returns what was found, one line each.

    Work that a crash left between ledger and aliases is finished. An alias or verdict tag that was
    changed by hand is put back, which leaves a `repaired` entry. What only a person can decide is
    only said.
    """
    ledger, client = Ledger(home), open_client(home)
    entries = own_entries(ledger, client, name)
    if not entries:
        raise BadInput(f"{name}: is not in the ledger of {home.root}; see sdft status")
    found = drift(client, name, entries)
    behind = is_behind(ledger, entries)
    if found and behind:
        found = [f"{line}: finished" for line in found]
    elif found and ledger.entries(name) == entries:  # or somebody is at it just now
        ledger.append([Draft(kind="repaired", name=name, version=None, reason="; ".join(found))])
        found = [f"{line}: changed by hand, put back" for line in found]
    if found or behind:
        mirror(home, name)
    known = {one.version for one in entries if one.kind == "registered"}
    there = versions_of(client, name)
    found += [
        f"{name}/{one}: is in the registry only; sdft learn or delete it"
        for one in sorted(there - known, key=int)
    ]
    return found + _deleted_runs(client, [one for one in entries if one.kind == "registered"])


def _deleted_runs(client: MlflowClient, registered: list[Entry]) -> list[str]:
    """Versions that are gone, or their run: MLflow deletes one, whatever rests on it."""
    found = []
    for one in registered:
        try:
            run = open_registered(client, one).run.info
        except BadInput as gone:
            found.append(str(gone))
            continue
        if run.lifecycle_stage == "deleted":
            found.append(
                f"{one.name}/{one.version}: its run was deleted, and mlflow gc would remove what "
                f"proves it; to keep it: mlflow runs restore --run-id {run.run_id}"
            )
    return found
