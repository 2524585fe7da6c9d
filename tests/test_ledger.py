"""The ledger: append-only, chained, one change of champion at a time; and what its chain tells."""

import getpass
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DatabaseError

from schemas.base import BadInput
from schemas.ledger import Champion, Draft, Entry, Kind
from sdft.chain import (
    ancestry,
    champion,
    champions,
    first_break,
    history,
    let_in,
    skills_of,
    withdrawn,
)
from tasks.console import shown_address
from tasks.home import Home
from tasks.ledger import Ledger, LedgerAway, Raced, who


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(Home(tmp_path))


def registered(version: str, parent: str | None = None, name: str = "demo") -> Draft:
    return Draft(
        kind="registered", name=name, version=version, skill=f"s{version}", parent_version=parent
    )


def promoted(version: str, name: str = "demo") -> Draft:
    return Draft(kind="promoted", name=name, version=version)


def test_entries_are_chained_over_all_names(ledger: Ledger) -> None:
    ledger.append([registered("1"), promoted("1")], Champion())
    ledger.append([registered("1", name="other")])
    entries = ledger.entries()
    assert [one.seq for one in entries] == [1, 2, 3]
    assert [one.previous for one in entries[1:]] == [one.hash for one in entries[:-1]]
    assert first_break(entries) is None
    assert [one.seq for one in ledger.entries("other")] == [3]


def test_a_change_of_champion_needs_the_champion_it_expects(ledger: Ledger) -> None:
    ledger.append([promoted("1")], Champion())
    assert ledger.champion("demo") == Champion(version="1", epoch=1)
    with pytest.raises(Raced, match=r"the champion is version 1 \(change 1\), not None"):
        ledger.append([promoted("2")], Champion())
    ledger.append([promoted("2")], Champion(version="1", epoch=1))
    ledger.append([promoted("1")], Champion(version="2", epoch=2))
    with pytest.raises(Raced):  # the same version again, but an older epoch: fenced
        ledger.append([promoted("3")], Champion(version="1", epoch=1))
    assert [one.expected for one in ledger.entries()] == [None, "1", "2"]


def test_all_or_none_of_a_call_is_written(ledger: Ledger) -> None:
    with pytest.raises(Raced):
        ledger.append([registered("1"), promoted("1")], Champion(version="9", epoch=9))
    assert ledger.entries() == []


@pytest.mark.parametrize(
    "statement", ["UPDATE ledger SET who = 'nobody' WHERE seq = 1", "DELETE FROM ledger"]
)
def test_the_database_refuses_changes(ledger: Ledger, statement: str) -> None:
    ledger.append([registered("1")])
    with (
        pytest.raises(DatabaseError, match="append-only"),
        ledger.engine.begin() as connection,
    ):
        connection.execute(text(statement))


def test_a_broken_chain_is_found_and_located(ledger: Ledger) -> None:
    ledger.append([registered(str(number)) for number in range(1, 6)])
    entries = ledger.entries()
    altered = entries[2].model_copy(update={"who": "nobody"})
    assert "entry 3: was altered" in (first_break([*entries[:2], altered, *entries[3:]]) or "")
    resealed = altered.model_copy(update={"hash": altered.sealed})
    assert "entry 4: does not follow entry 3" in (
        first_break([*entries[:2], resealed, *entries[3:]]) or ""
    )
    assert "entry 2: is missing" in (first_break([entries[0], *entries[2:]]) or "")


@given(st.data())
def test_every_changed_field_breaks_the_chain(data: st.DataObject) -> None:
    entry = entry_of(promoted("1"))
    field = data.draw(st.sampled_from(sorted(Entry.model_fields)))
    value = getattr(entry, field)
    other = value + 1 if isinstance(value, int) else f"{value}x"
    assert first_break([entry]) is None
    assert first_break([entry.model_copy(update={field: other})]) is not None


def entry_of(draft: Draft) -> Entry:
    rest = {"time": "t", "who": "me", "host": "h", "code_version": "c", "previous": "0" * 64}
    return Entry.model_validate(draft.model_dump() | rest | {"epoch": 1, "seq": 1}).seal()


HISTORIES = {
    "promotions pile up": (["+1", "+2", "+3"], ["1", "2", "3"]),
    "a rollback takes the top away": (["+1", "+2", "+3", "-2"], ["1", "2"]),
    "again goes one further": (["+1", "+2", "+3", "-2", "-1"], ["1"]),
    "a named rollback takes all above away": (["+1", "+2", "+3", "-1"], ["1"]),
    "the last time it was champion counts": (["+1", "+2", "+1", "+3", "-1"], ["1", "2", "1"]),
    "after a rollback comes a promotion": (["+1", "+2", "-1", "+3"], ["1", "3"]),
    "what was rolled back can come back": (["+1", "+2", "-1", "+2"], ["1", "2"]),
}


@pytest.mark.parametrize("name", HISTORIES)
def test_who_is_and_was_champion(ledger: Ledger, name: str) -> None:
    changes, stack = HISTORIES[name]
    for change in changes:
        kind = "promoted" if change[0] == "+" else "rolled back"
        draft = Draft(kind=kind, name="demo", version=change[1])
        ledger.append([draft], ledger.champion("demo"))
    entries = ledger.entries("demo")
    assert champions(entries) == stack
    assert champion(entries) == Champion(version=stack[-1], epoch=len(changes))
    assert champion(entries) == ledger.champion("demo")


@pytest.mark.parametrize(
    ("changes", "gone"),
    [
        (["+1", "+2", "+3"], set()),
        (["+1", "+2", "+3", "-1"], {"2", "3"}),
        (["+1", "+2", "-1", "+4"], {"2"}),  # 4 rests on 1
        (["+1", "+2", "-1", "+3"], set()),  # 3 rests on 2, which so came back
        (["+1", "+2", "-1", "+2"], set()),
        (["+1", "+4", "+2"], set()),  # another champion is no rollback
        (["+1", "+2", "+3", "-2", "-1"], {"2", "3"}),
    ],
)
def test_what_was_withdrawn(ledger: Ledger, changes: list[str], gone: set[str]) -> None:
    parents = {"1": None, "2": "1", "3": "2", "4": "1"}
    ledger.append([registered(version, parent) for version, parent in parents.items()])
    for change in changes:
        kind = "promoted" if change[0] == "+" else "rolled back"
        draft = Draft(kind=kind, name="demo", version=change[1])
        ledger.append([draft], ledger.champion("demo"))
    assert withdrawn(ledger.entries("demo")) == gone


@pytest.mark.parametrize(
    ("changes", "version", "told"),
    [
        (["+1", "+2", "-1"], "2", ["promoted", "rolled back"]),
        (["+1", "+2", "-1"], "1", ["promoted", "put back"]),
        (["+1", "+2", "+3", "-1"], "2", ["promoted", "rolled back"]),
        (["+1", "+2", "-1", "+2"], "2", ["promoted", "rolled back", "promoted"]),
        (["+1", "+2", "-1", "-2"], "1", ["promoted", "put back", "rolled back"]),
        (["+1", "+2"], "1", ["promoted"]),
    ],
)
def test_the_history_of_a_version_has_what_took_it_away(
    ledger: Ledger, changes: list[str], version: str, told: list[str]
) -> None:
    for change in changes:
        kind = "promoted" if change[0] == "+" else "rolled back"
        now = ledger.champion("demo")
        draft = Draft(kind=kind, name="demo", version=change[1], expected=now.version)
        ledger.append([draft], now)
    entries = history(ledger.entries("demo"), version)
    assert [one.told_of(version) for one in entries] == told


def test_a_history_is_read_in_one_pass(ledger: Ledger) -> None:
    ledger.append([promoted("1")], Champion())
    ledger.append([promoted("2")], Champion(version="1", epoch=1))
    back = Draft(kind="rolled back", name="demo", version="1")
    ledger.append([back], Champion(version="2", epoch=2))
    entries = ledger.entries("demo")
    assert history(iter(entries), "2") == tuple(entries[1:])


def test_a_parent_that_is_missing_is_said(ledger: Ledger) -> None:
    ledger.append([registered("2", "1")])
    with pytest.raises(BadInput, match="version 1: the entry that registered it is not in the"):
        ancestry(ledger.entries("demo"), "2")


def test_ancestry_follows_parents_not_numbers(ledger: Ledger) -> None:
    ledger.append([registered("1"), registered("2", "1"), registered("3", "1")])
    entries = ledger.entries()
    assert [one.version for one in ancestry(entries, "3")] == ["1", "3"]
    assert skills_of(entries, "3") == {"s1", "s3"}
    assert skills_of(entries, None) == set()


def test_what_passed_or_was_overridden_is_let_in_until_it_is_judged_anew(ledger: Ledger) -> None:
    def after(kind: Kind, verdict_hash: str, decision: str) -> bool:
        draft = Draft(kind=kind, name="demo", version="1", verdict_hash=verdict_hash)
        ledger.append([draft.model_copy(update={"decision": decision})])
        return let_in(ledger.entries("demo"), "1")

    ledger.append([registered("1")])
    assert not let_in(ledger.entries("demo"), "1")
    assert after("verdict", "x", "pass")
    assert not after("verdict", "y", "refuse")
    assert after("overridden", "y", "refuse")
    assert not after("verdict", "z", "ask")


@pytest.mark.parametrize(
    "address",
    [
        "sqlite:////nowhere/ledger.db",
        "postgresql+psycopg://user:s3cret@127.0.0.1:9/ledger",
        "postgresql+psycopg://user:s3cret@host:port/ledger",
        "nothing://user:s3cret@host/ledger",
    ],
)
def test_an_unusable_database_is_said_without_its_password(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDFT_LEDGER_URL", address)
    with pytest.raises((BadInput, LedgerAway), match="SDFT_LEDGER_URL") as caught:
        Ledger(Home(tmp_path))
    assert "s3cret" not in str(caught.value)


def test_a_file_that_is_no_database_is_said(tmp_path: Path) -> None:
    (tmp_path / "ledger.db").write_text("no database" * 100)
    with pytest.raises(BadInput, match="cannot be used: DatabaseError"):
        Ledger(Home(tmp_path))


def test_a_user_without_a_name_can_write(monkeypatch: pytest.MonkeyPatch) -> None:
    def nameless() -> str:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.delenv("SDFT_USER", raising=False)
    monkeypatch.setattr(getpass, "getuser", nameless)
    assert who() == f"uid {os.getuid()}"


def test_a_user_whose_name_no_entry_can_hold_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"SDFT_USER": os.fsdecode(b"t\xe9am")})
    with pytest.raises(BadInput, match="SDFT_USER: is no UTF-8 text"):
        who()


def test_a_server_that_is_away_when_a_name_is_locked_is_the_ledgers(ledger: Ledger) -> None:
    ledger.engine = create_engine("postgresql+psycopg://u:s3cret@127.0.0.1:9/db")
    with pytest.raises(LedgerAway, match="the ledger's database does not answer") as caught:
        ledger.alone("demo").__enter__()
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("http://user:s3cret@host:5000/x?token=s3cret", "http://host:5000/x"),
        ("https://s3cret@host", "https://host"),
        ("sqlite:////home/mlflow.db", "sqlite:////home/mlflow.db"),
        ("postgresql://u:s3cret@host/db?password=s3cret", "postgresql://host/db"),
        ("databricks", "databricks"),
        ("postgresql://u:s3/c#r@et@host/db?x=y", "postgresql://host/db"),
        ("postgresql://u:s3c?ret@host/db", "postgresql://..."),
        ("https://host/x?token=a@s3cret", "https://..."),
        ("sqlite:////home/me@work/mlflow.db", "sqlite:////home/me@work/mlflow.db"),
    ],
)
def test_addresses_are_shown_without_secrets(address: str, shown: str) -> None:
    assert shown_address(address) == shown


def test_a_cursor_never_goes_back(ledger: Ledger) -> None:
    assert ledger.cursor("aliases", "demo") == 0
    for seq in (3, 2):
        ledger.advance("aliases", "demo", seq)
    assert ledger.cursor("aliases", "demo") == 3
    assert ledger.cursor("webhook", "demo") == 0
