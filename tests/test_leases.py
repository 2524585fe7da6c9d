"""Leases: one holder at a time; the dead are replaced at once, the silent after a while."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from sqlalchemy import update

from tasks import leases
from tasks.home import Home
from tasks.leases import (
    Fence,
    Fenced,
    Holder,
    check,
    check_in,
    checking,
    holders,
    leased,
    myself,
)
from tasks.ledger import Ledger, LedgerAway
from tasks.ledger_tables import LEASES


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv(leases.LEASE_S, "0.6")
    return Home(tmp_path)


def put(ledger: Ledger, holder: Holder) -> None:
    """Have another process hold the key `stage`."""
    with ledger.transaction() as connection:
        connection.execute(update(LEASES).values(holder=holder.model_dump_json()))


def finished_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_lease_is_held_beats_and_is_released(home: Home) -> None:
    ledger = Ledger(home)
    with leased("stage", "alpha", home) as fence:
        check(ledger, fence)
        assert holders(ledger)["stage"].pid == psutil.Process().pid
        before = beats(ledger)
        time.sleep(0.5)
        assert beats(ledger) > before
    assert holders(ledger) == {}
    with leased("stage", "alpha", home) as again:
        assert again.token == fence.token + 1
    with pytest.raises(Fenced):
        check(ledger, fence)


def test_a_second_holder_waits_for_one_that_beats(home: Home) -> None:
    order: list[str] = []

    def second() -> None:
        with leased("stage", "alpha", home):
            order.append("second")

    with leased("stage", "alpha", home):
        waiting = threading.Thread(target=second)
        waiting.start()
        time.sleep(2.0)  # more than three times what a silent one is given
        order.append("first")
    waiting.join(10)
    assert order == ["first", "second"]


def test_a_dead_holder_is_replaced_at_once_and_a_silent_one_after_a_while(home: Home) -> None:
    ledger = Ledger(home)
    with leased("stage", "alpha", home):
        pass
    dead = myself().model_copy(update={"pid": finished_process()})
    put(ledger, dead)
    assert dead.is_dead
    began = time.monotonic()
    with leased("stage", "alpha", home):
        assert time.monotonic() - began < 0.5
    elsewhere = dead.model_copy(update={"machine": "another boot"})
    put(ledger, elsewhere)
    assert not elsewhere.is_dead, "it cannot be seen from here"
    began = time.monotonic()
    with leased("stage", "alpha", home):
        assert 0.5 < time.monotonic() - began < 5


def test_a_number_that_another_process_has_now_is_no_sign_of_life() -> None:
    assert not myself().is_dead
    assert myself().model_copy(update={"started": 1.0}).is_dead


def test_a_clock_that_is_set_kills_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    alive, dead = myself(), myself().model_copy(update={"started": 1.0})
    boot = psutil.boot_time()
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: boot + 3600)
    monkeypatch.setattr("psutil.boot_time", lambda: boot + 3600)
    assert psutil.Process().create_time() > boot + 3600
    assert not alive.is_dead
    assert dead.is_dead


def test_an_outage_of_the_ledger_that_is_shorter_than_a_lease_fences_nobody(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, asked = Ledger(home), 0

    def away(*_: object) -> None:
        nonlocal asked
        asked += 1
        raise LedgerAway("it starts again")

    with leased("stage", "alpha", home) as fence:
        look = checking(ledger, fence)
        with monkeypatch.context() as patch:
            patch.setattr(leases, "check", away)
            look()
        look()
        with monkeypatch.context() as patch:
            patch.setattr(leases, "check", away)
            end = time.monotonic() + 10
            with pytest.raises(LedgerAway):
                while time.monotonic() < end:
                    look()
    assert asked > 2
    with leased("stage", "alpha", home), pytest.raises(Fenced):
        look()


def test_the_ledger_writes_nothing_for_one_that_is_fenced(home: Home) -> None:
    ledger = Ledger(home)
    with leased("stage", "alpha", home) as fence:
        ledger.append([], permitted=lambda connection: check_in(connection, fence))
    with leased("stage", "alpha", home), pytest.raises(Fenced, match="took this work over"):
        ledger.append([], permitted=lambda connection: check_in(connection, fence))
    with pytest.raises(Fenced):
        check(ledger, Fence(key="never held", token=1))


def test_only_what_the_dead_held_is_released(home: Home) -> None:
    ledger = Ledger(home)
    with leased("dead", "alpha", home):
        pass
    put(ledger, myself().model_copy(update={"pid": finished_process()}))
    with leased("alive", "beta", home):
        assert list(leases.release_dead(ledger)) == ["dead"]
        assert list(holders(ledger)) == ["alive"]


def test_what_silent_holders_elsewhere_held_is_released_and_they_are_fenced(home: Home) -> None:
    ledger = Ledger(home)
    began = time.monotonic()
    with leased("here", "alpha", home):
        assert leases.release_silent(ledger) == {}
        assert time.monotonic() - began < 0.5, "nobody elsewhere is watched"
    elsewhere = myself().model_copy(update={"machine": "a pod that is gone"})
    with leased("asleep", "beta", home) as fence:
        pass
    put(ledger, elsewhere)  # both keys
    with leased("alive", "gamma", home):
        held = LEASES.c.key == "alive"
        with ledger.transaction() as connection:
            values = {"holder": elsewhere.model_dump_json()}
            connection.execute(update(LEASES).where(held).values(values))
        assert sorted(leases.release_silent(ledger)) == ["asleep", "here"]
        assert list(holders(ledger)) == ["alive"]
    with pytest.raises(
        Fenced, match="took this work over, or gave it up, for this one gave no sign"
    ):
        check(ledger, fence)


def test_who_ends_while_it_is_watched_is_not_taken_for_dead(home: Home) -> None:
    ledger = Ledger(home)
    with leased("there", "alpha", home):
        pass
    put(ledger, myself().model_copy(update={"machine": "a pod"}))
    ending = threading.Timer(0.3, lambda: release(ledger))
    ending.start()
    assert leases.release_silent(ledger) == {}
    ending.join()


def release(ledger: Ledger) -> None:
    with ledger.transaction() as connection:
        connection.execute(update(LEASES).values(holder=None))


def beats(ledger: Ledger) -> int:
    with ledger.reading() as connection:
        return connection.execute(LEASES.select()).one().beats
