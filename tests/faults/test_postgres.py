"""The ledger on PostgreSQL: what the SQLite file is tested for, on a server of its own."""

import os
import signal
import time
from collections.abc import Generator
from pathlib import Path

import pytest
from postgres import (
    append_and_signal,
    append_one,
    append_together,
    open_together,
    server,
)
from racer import SPAWN, check_a_pause, check_a_race, is_stopped
from registry_home import RegistryHome
from sqlalchemy import inspect, text
from sqlalchemy.exc import DatabaseError

from infra.postgresql import new_database, run_sql
from schemas.base import BadInput
from schemas.ledger import Champion, Draft
from sdft.chain import first_break
from tasks.aliases import reconcile
from tasks.home import Home
from tasks.ledger import Ledger, Raced
from tasks.promotion import promote, rollback
from tasks.proof import prove

pytestmark = [pytest.mark.slow, pytest.mark.faults]


@pytest.fixture(scope="module")
def postgres() -> Generator[str]:
    with server() as url:
        yield url


@pytest.fixture
def database(postgres: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """An empty database that SDFT_LEDGER_URL names."""
    url = new_database(postgres, tmp_path.name)
    monkeypatch.setenv("SDFT_LEDGER_URL", url)
    return url


@pytest.fixture
def ledger(database: str, tmp_path: Path) -> Ledger:
    return Ledger(Home(tmp_path))


@pytest.fixture
def demo(database: str, tmp_path: Path) -> RegistryHome:
    """Three versions, the third of them champion."""
    place = RegistryHome(tmp_path)
    assert place.line(["a", "b", "c"]) == ["1", "2", "3"]
    return place


def registered(version: str, name: str = "demo") -> Draft:
    return Draft(kind="registered", name=name, version=version, skill=f"s{version}")


def promoted(version: str, name: str = "demo") -> Draft:
    return Draft(kind="promoted", name=name, version=version)


def note(text: str) -> Draft:
    return Draft(kind="repaired", name="demo", version=None, reason=text)


def test_the_tables_are_made_once_and_entries_come_back_as_written(
    ledger: Ledger, tmp_path: Path
) -> None:
    names = set(inspect(ledger.engine).get_table_names())
    assert names == {"ledger", "ledger_cursor", "lease", "watched_skill"}
    written = ledger.append([registered("1"), promoted("1")], Champion())
    again = Ledger(Home(tmp_path))
    assert again.entries() == written
    assert first_break(again.entries()) is None
    for seq in (3, 2):
        again.advance("aliases", "demo", seq)
    assert ledger.cursor("aliases", "demo") == 3


def test_long_and_foreign_text_comes_back_as_written(ledger: Ledger) -> None:
    reasons = ["Ünïcödé 名前 🙂", "x" * 100_000, "100% of 'it' \\ \"that\" %s :name"]
    ledger.append([note(one) for one in reasons])
    assert [one.reason for one in ledger.entries()] == reasons
    assert first_break(ledger.entries()) is None


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE ledger SET who = 'nobody' WHERE seq = 1",
        "UPDATE ledger SET who = 'nobody' WHERE seq = 99",
        "DELETE FROM ledger",
        "TRUNCATE ledger",
        "TRUNCATE ledger, ledger_cursor CASCADE",
    ],
)
def test_the_database_refuses_changes(ledger: Ledger, statement: str) -> None:
    before = ledger.append([registered("1")])
    with (
        pytest.raises(DatabaseError, match="append-only"),
        ledger.engine.begin() as connection,
    ):
        connection.execute(text(statement))
    assert ledger.entries() == before


def test_a_change_of_champion_needs_the_champion_it_expects(ledger: Ledger) -> None:
    ledger.append([promoted("1")], Champion())
    with pytest.raises(Raced, match=r"the champion is version 1 \(change 1\), not None"):
        ledger.append([registered("2"), promoted("2")], Champion())
    assert len(ledger.entries()) == 1, "all or none"
    ledger.append([promoted("2")], Champion(version="1", epoch=1))
    ledger.append([promoted("1")], Champion(version="2", epoch=2))
    with pytest.raises(Raced):  # the same version again, but an older epoch: fenced
        ledger.append([promoted("3")], Champion(version="1", epoch=1))
    ledger.append([promoted("1", "other")], Champion())
    assert [one.expected for one in ledger.entries()] == [None, "1", "2", None]
    assert first_break(ledger.entries()) is None


def test_processes_that_make_the_tables_at_once(
    postgres: str, database: str, tmp_path: Path
) -> None:
    urls = [new_database(postgres, f"{tmp_path.name}-{number}") for number in range(10)]
    gate = SPAWN.Barrier(4)
    _all_through([(open_together, (urls, tmp_path, gate))] * 4)
    for url in urls:
        os.environ["SDFT_LEDGER_URL"] = url  # the fixture puts its own back
        entries = Ledger(Home(tmp_path)).entries()
        assert len({one.version for one in entries}) == 4
        assert first_break(entries) is None


@pytest.mark.parametrize("isolation", ["read committed", "serializable"])
def test_processes_that_append_at_once(database: str, tmp_path: Path, isolation: str) -> None:
    """Whatever the server's administrator made the default of transactions."""
    run_sql(database, f"ALTER ROLE sdft SET default_transaction_isolation = '{isolation}'")
    try:
        gate = SPAWN.Barrier(4)
        _all_through([(append_together, (tmp_path, 50, gate))] * 4)
    finally:
        run_sql(database, "ALTER ROLE sdft RESET default_transaction_isolation")
    entries = Ledger(Home(tmp_path)).entries()
    assert len(entries) == 4 * 50 * 3
    assert first_break(entries) is None


def test_a_writer_killed_amid_its_transaction_leaves_nothing(
    ledger: Ledger, tmp_path: Path
) -> None:
    before = ledger.append([note("before")])
    child = SPAWN.Process(target=append_and_signal, args=(tmp_path, signal.SIGKILL))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert ledger.entries() == before
    ledger.append([note("after")])
    assert first_break(ledger.entries()) is None


def test_a_writer_paused_amid_its_transaction_keeps_others_out_only_for_a_while(
    ledger: Ledger, tmp_path: Path
) -> None:
    child = SPAWN.Process(target=append_and_signal, args=(tmp_path, signal.SIGSTOP))
    child.start()
    while not is_stopped(child.pid):
        time.sleep(0.05)
    other = SPAWN.Process(target=append_one, args=(tmp_path, 2))
    other.start()
    other.join(30)
    gave_up = other.exitcode
    other.kill()
    os.kill(child.pid, signal.SIGCONT)
    child.join(60)
    assert gave_up == 1, "an error, not a wait without end"
    assert child.exitcode == 0
    assert [one.reason for one in ledger.entries()] == ["first", "second"]
    assert first_break(ledger.entries()) is None


def test_promotion_rollback_reconcile_and_proof(demo: RegistryHome) -> None:
    assert not (demo.home.root / "ledger.db").exists()
    assert rollback(demo.home, "demo", expect="3").version == "2"
    assert rollback(demo.home, "demo", expect="3").version == "2"
    with pytest.raises(BadInput, match="version 2, not 3 as expected"):
        promote(demo.home, "demo", "1", expect="3")
    demo.client.set_registered_model_alias("demo", "champion", "1")
    assert "changed by hand, put back" in reconcile(demo.home, "demo")[0]
    assert prove(demo.home, "demo").stages == 2
    assert [one.epoch for one in Ledger(demo.home).entries("demo") if one.epoch] == [1, 2, 3, 4]


@pytest.mark.parametrize("gap", ["before the ledger", "between ledger and alias"])
def test_a_paused_promoter_does_no_harm_when_it_wakes(demo: RegistryHome, gap: str) -> None:
    check_a_pause(demo, gap)


def test_racing_promoters_make_exactly_one_champion_a_round(ledger: Ledger, tmp_path: Path) -> None:
    connections: list[int] = []
    check_a_race(RegistryHome(tmp_path), lambda: connections.append(_connections(ledger)))
    assert max(connections) <= 2 * 5, "a process keeps no more connections than it uses"


def _all_through(work: list[tuple]) -> None:
    children = [SPAWN.Process(target=target, args=arguments) for target, arguments in work]
    for one in children:
        one.start()
    for one in children:
        one.join(120)
        one.kill()
    assert [one.exitcode for one in children] == [0] * len(children)


def _connections(ledger: Ledger) -> int:
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
    with ledger.engine.connect() as connection:
        return connection.execute(text(query)).scalar_one()
