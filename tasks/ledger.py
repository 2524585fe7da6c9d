"""The ledger's table: entries are appended in one transaction, never changed, and hash-chained.

The entry is the commit point of a registration, verdict, promotion or rollback. Aliases in the
registry and events that go out are mirrors: each keeps a cursor, the last entry it has taken over.
"""

import getpass
import os
import platform
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import (
    DDL,
    Column,
    Connection,
    Engine,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    event,
    insert,
    make_url,
    select,
    text,
    update,
)
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from schemas.base import BadInput
from schemas.ledger import CHANGES, GENESIS, Champion, Draft, Entry
from sdft.process import exclusive
from sdft.record import code_version
from tasks.home import Home

WAIT_S = 60
"""How long a writer waits for another one's transaction."""

_METADATA = MetaData()
_ENTRIES = Table(
    "ledger",
    _METADATA,
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("time", String(40), nullable=False),
    Column("kind", String(20), nullable=False),
    Column("name", String(63), nullable=False, index=True),
    Column("version", String(20)),
    Column("epoch", Integer),
    Column("expected", String(20)),
    Column("skill", String(63)),
    Column("parent_version", String(20)),
    *(
        Column(f"{name}", String(64))
        for name in (
            "stage_key",
            "model_hash",
            "data_hash",
            "evidence_hash",
            "package_hash",
            "verdict_hash",
        )
    ),
    Column("decision", String(20)),
    Column("reason", Text, nullable=False),
    Column("who", Text, nullable=False),
    Column("host", Text, nullable=False),
    Column("code_version", Text, nullable=False),
    Column("previous", String(64), nullable=False),
    Column("hash", String(64), nullable=False),
    UniqueConstraint("name", "epoch"),  # one change of champion an epoch, whoever writes it
)
_CURSORS = Table(
    "ledger_cursor",
    _METADATA,
    Column("consumer", String(40), primary_key=True),
    Column("name", String(63), primary_key=True),
    Column("seq", Integer, nullable=False),
)

for _change in ("UPDATE", "DELETE"):
    event.listen(
        _ENTRIES,
        "after_create",
        DDL(
            f"CREATE TRIGGER ledger_no_{_change.lower()} BEFORE {_change} ON ledger "
            "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END"
        ).execute_if(dialect="sqlite"),
    )
event.listen(
    _ENTRIES,
    "after_create",
    DDL(
        "CREATE FUNCTION ledger_append_only() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'the ledger is append-only'; END $$; "
        "CREATE TRIGGER ledger_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON ledger "
        "FOR EACH STATEMENT EXECUTE FUNCTION ledger_append_only()"
    ).execute_if(dialect="postgresql"),
)


class Raced(BadInput):
    """A change of champion that was asked for on a champion that is no longer there."""


class Ledger:
    """The ledger of a home: its own SQLite file, or the database that SDFT_LEDGER_URL names."""

    def __init__(self, home: Home) -> None:
        self.engine = _engine(home.ledger_uri)
        with self._transaction() as connection:  # two processes may find it missing at once
            _METADATA.create_all(connection)

    def entries(self, name: str | None = None) -> list[Entry]:
        """All entries, or those of one name, in the order they were written."""
        query = select(_ENTRIES).order_by(_ENTRIES.c.seq)
        if name is not None:
            query = query.where(_ENTRIES.c.name == name)
        with self.engine.connect() as connection:
            return [Entry.model_validate(dict(row)) for row in connection.execute(query).mappings()]

    def champion(self, name: str) -> Champion:
        """The champion of a name now."""
        with self.engine.connect() as connection:
            return _champion(connection, name)

    def append(self, drafts: Sequence[Draft], expected: Champion | None = None) -> list[Entry]:
        """Write entries, all or none; the drafts of one call are about one name.

        A change of champion is written only while the champion is `expected`, and gets the epoch
        after it. Raises Raced where it is not.
        """
        with self._transaction() as connection:
            if expected is not None and any(draft.kind in CHANGES for draft in drafts):
                now = _champion(connection, drafts[0].name)
                if now != expected:
                    raise Raced(
                        f"{drafts[0].name}: the champion is version {now.version} (change "
                        f"{now.epoch}), not {expected.version} (change {expected.epoch}) as "
                        "expected; someone was faster: look at sdft status and ask again"
                    )
            last = connection.execute(
                select(_ENTRIES.c.seq, _ENTRIES.c.hash).order_by(_ENTRIES.c.seq.desc()).limit(1)
            ).first()
            seq, previous = (last.seq, last.hash) if last else (0, GENESIS)
            written: list[Entry] = []
            for draft in drafts:
                seq += 1
                if draft.kind in CHANGES:
                    assert expected is not None, "a change of champion needs the expected one"
                    place = {"epoch": expected.epoch + 1, "expected": expected.version}
                    draft = draft.model_copy(update=place)
                entry = _seal(draft, seq, previous)
                connection.execute(insert(_ENTRIES).values(entry.model_dump()))
                written.append(entry)
                previous = entry.hash
        return written

    def cursor(self, consumer: str, name: str) -> int:
        """The last entry that a mirror has taken over; 0 for none."""
        query = select(_CURSORS.c.seq).where(
            _CURSORS.c.consumer == consumer, _CURSORS.c.name == name
        )
        with self.engine.connect() as connection:
            return connection.execute(query).scalar() or 0

    def advance(self, consumer: str, name: str, seq: int) -> None:
        """Move a mirror's cursor on; it never goes back."""
        mine = (_CURSORS.c.consumer == consumer) & (_CURSORS.c.name == name)
        with self._transaction() as connection:
            there = connection.execute(select(_CURSORS.c.seq).where(mine)).scalar()
            if there is None:
                values = {"consumer": consumer, "name": name, "seq": seq}
                connection.execute(insert(_CURSORS).values(values))
            elif there < seq:
                connection.execute(update(_CURSORS).where(mine).values(seq=seq))

    @contextmanager
    def alone(self, name: str) -> Generator[None]:
        """Keep out whoever else asks for this name, over several transactions.

        The lock ends with its process: a file beside the SQLite one, or held by the server.
        """
        if self.engine.dialect.name == "postgresql":
            with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as held:
                lock = text("SELECT pg_advisory_lock(724302, hashtext(:name))")
                held.execute(lock, {"name": name})  # until the connection closes
                yield
        else:
            with exclusive(Path(self.engine.url.database or "").parent / "locks" / name):
                yield

    @contextmanager
    def _transaction(self) -> Generator[Connection]:
        with self.engine.execution_options(writes=True).begin() as connection:
            if connection.dialect.name == "postgresql":  # SQLite has one writer by BEGIN IMMEDIATE
                connection.execute(text(f"SET LOCAL lock_timeout = '{WAIT_S}s'"))
                connection.execute(text("SELECT pg_advisory_xact_lock(724301)"))
            yield connection


_OPTIONS: dict[str, dict[str, Any]] = {
    "sqlite": {"connect_args": {"timeout": WAIT_S}},
    # a statement sees what was there when it began: so what is read after the lock is new
    "postgresql": {"isolation_level": "READ COMMITTED"},
}


def _engine(url: str) -> Engine:
    try:
        options = _OPTIONS.get(make_url(url).get_backend_name(), {})
        engine = create_engine(url, poolclass=NullPool, **options)
    except (SQLAlchemyError, ImportError) as error:
        raise BadInput(f"SDFT_LEDGER_URL is no usable database address: {error}") from None
    if engine.dialect.name == "sqlite":

        @event.listens_for(engine, "connect")
        def _leave_transactions_to_us(connection, _record) -> None:  # pyright: ignore
            connection.isolation_level = None
            connection.execute("PRAGMA synchronous=FULL")

        @event.listens_for(engine, "begin")
        def _one_writer(connection: Connection) -> None:  # pyright: ignore
            writes = connection.get_execution_options().get("writes")
            connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _champion(connection: Connection, name: str) -> Champion:
    row = connection.execute(
        select(_ENTRIES.c.version, _ENTRIES.c.epoch)
        .where(_ENTRIES.c.name == name, _ENTRIES.c.epoch.is_not(None))
        .order_by(_ENTRIES.c.epoch.desc())
        .limit(1)
    ).first()
    return Champion(version=row.version, epoch=row.epoch) if row else Champion()


def _seal(draft: Draft, seq: int, previous: str) -> Entry:
    open_entry = Entry(
        **draft.model_dump(),
        seq=seq,
        time=datetime.now(UTC).isoformat(timespec="milliseconds"),
        who=who(),
        host=platform.node(),
        code_version=code_version(),
        previous=previous,
        hash="",
    )
    return open_entry.model_copy(update={"hash": open_entry.sealed})


def who() -> str:
    """Who runs this, for the ledger: SDFT_USER where a service acts for a person, or the login."""
    return os.environ.get("SDFT_USER") or getpass.getuser()
