"""The ledger's table: entries are appended in one transaction, never changed, and hash-chained.

The entry is the commit point of a registration, verdict, promotion or rollback. Aliases in the
registry and events that go out are mirrors: each keeps a cursor, the last entry it has taken over.
"""

import getpass
import os
import platform
import sqlite3
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from sqlalchemy import (
    Connection,
    Engine,
    create_engine,
    event,
    insert,
    make_url,
    select,
    text,
    update,
)
from sqlalchemy.exc import OperationalError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from schemas.base import BadInput
from schemas.ledger import CHANGES, GENESIS, Champion, Draft, Entry
from sdft.process import exclusive
from sdft.record import code_version
from tasks.console import shown_address
from tasks.failures import RunFailed
from tasks.home import DATABASE_WAIT_S, Home
from tasks.ledger_tables import CURSORS, ENTRIES, METADATA

WAIT_S = DATABASE_WAIT_S
"""How long a writer waits for another one's transaction."""


class LedgerAway(RunFailed):
    """The ledger's database is locked for too long, full, read-only or gone."""


class Raced(BadInput):
    """A change of champion that was asked for on a champion that is no longer there."""


class Ledger:
    """The ledger of a home: its own SQLite file, or the database that SDFT_LEDGER_URL names."""

    def __init__(self, home: Home) -> None:
        self.engine = _engine(home.ledger_uri)
        try:
            with self.transaction() as connection:  # two processes may find it missing at once
                METADATA.create_all(connection)
        except LedgerAway as error:
            raise LedgerAway(
                f"{shown_address(home.ledger_uri)} (SDFT_LEDGER_URL): {error}"
            ) from None
        except SQLAlchemyError as error:  # its text may hold a part of the address
            raise BadInput(
                f"the ledger's database ({shown_address(home.ledger_uri)}) cannot be used: "
                f"{type(error).__name__}; see SDFT_LEDGER_URL"
            ) from None

    def entries(self, name: str | None = None) -> list[Entry]:
        """All entries, or those of one name, in the order they were written."""
        query = select(ENTRIES).order_by(ENTRIES.c.seq)
        if name is not None:
            query = query.where(ENTRIES.c.name == name)
        with self.reading() as connection:
            rows = connection.execute(query).mappings().all()
        try:
            return [Entry.model_validate(dict(row)) for row in rows]
        except ValidationError as error:
            raise BadInput(f"the ledger holds what is no entry: {error.errors()[0]}") from None

    def champion(self, name: str) -> Champion:
        """The champion of a name now."""
        with self.reading() as connection:
            return _champion(connection, name)

    def append(
        self,
        drafts: Sequence[Draft],
        expected: Champion | None = None,
        permitted: Callable[[Connection], None] | None = None,
    ) -> list[Entry]:
        """Write entries, all or none; the drafts of one call are about one name.

        A change of champion is written only while the champion is `expected`, and gets the epoch
        after it; a promotion only while its verdict is the version's newest. Raises Raced else.
        `permitted` may look into the database first and raise what it likes.
        """
        with self.transaction() as connection:
            if permitted is not None:
                permitted(connection)
            if expected is not None and any(draft.kind in CHANGES for draft in drafts):
                now = _champion(connection, drafts[0].name)
                if now != expected:
                    raise Raced(
                        f"{drafts[0].name}: the champion is version {now.version} (change "
                        f"{now.epoch}), not {expected.version} (change {expected.epoch}) as "
                        "expected; someone was faster: look at sdft status and ask again"
                    )
            last = connection.execute(
                select(ENTRIES.c.seq, ENTRIES.c.hash).order_by(ENTRIES.c.seq.desc()).limit(1)
            ).first()
            seq, previous = (last.seq, last.hash) if last else (0, GENESIS)
            written: list[Entry] = []
            for draft in drafts:
                seq += 1
                if draft.kind in CHANGES:
                    assert expected is not None, "a change of champion needs the expected one"
                    place = {"epoch": expected.epoch + 1, "expected": expected.version}
                    draft = draft.model_copy(update=place)
                if draft.kind == "promoted" and draft.verdict_hash != _verdict(connection, draft):
                    raise Raced(
                        f"{draft.name}/{draft.version}: was judged anew meanwhile; look at sdft "
                        "ledger and ask again"
                    )
                entry = _seal(draft, seq, previous)
                connection.execute(insert(ENTRIES).values(entry.model_dump()))
                written.append(entry)
                previous = entry.hash
        return written

    def cursor(self, consumer: str, name: str) -> int:
        """The last entry that a mirror has taken over; 0 for none."""
        query = select(CURSORS.c.seq).where(CURSORS.c.consumer == consumer, CURSORS.c.name == name)
        with self.reading() as connection:
            return connection.execute(query).scalar() or 0

    def advance(self, consumer: str, name: str, seq: int) -> None:
        """Move a mirror's cursor on; it never goes back."""
        mine = (CURSORS.c.consumer == consumer) & (CURSORS.c.name == name)
        with self.transaction() as connection:
            there = connection.execute(select(CURSORS.c.seq).where(mine)).scalar()
            if there is None:
                values = {"consumer": consumer, "name": name, "seq": seq}
                connection.execute(insert(CURSORS).values(values))
            elif there < seq:
                connection.execute(update(CURSORS).where(mine).values(seq=seq))

    @contextmanager
    def alone(self, name: str) -> Generator[None]:
        """Keep out whoever else asks for this name, over several transactions.

        The lock ends with its process: a file beside the SQLite one, or held by the server.
        """
        if self.engine.dialect.name == "postgresql":
            with ExitStack() as held:
                with _answering():  # not what is done meanwhile, which may be MLflow's
                    connection = held.enter_context(self.engine.connect())
                    connection = connection.execution_options(isolation_level="AUTOCOMMIT")
                    lock = text("SELECT pg_advisory_lock(724302, hashtext(:name))")
                    connection.execute(lock, {"name": name})  # until the connection closes
                yield
        else:
            with exclusive(Path(self.engine.url.database or "").parent / "locks" / name):
                yield

    @contextmanager
    def transaction(self) -> Generator[Connection]:
        """One that writes; nobody else writes meanwhile."""
        with _answering(), self.engine.execution_options(writes=True).begin() as connection:
            if connection.dialect.name == "postgresql":  # SQLite has one writer by BEGIN IMMEDIATE
                connection.execute(text(f"SET LOCAL lock_timeout = '{WAIT_S}s'"))
                connection.execute(text("SELECT pg_advisory_xact_lock(724301)"))
            yield connection

    @contextmanager
    def reading(self) -> Generator[Connection]:
        """A transaction that reads."""
        with _answering(), self.engine.connect() as connection:
            yield connection


@contextmanager
def _answering() -> Generator[None]:
    try:
        yield
    except OperationalError as error:  # without its text, which may hold a part of the address
        why = type(error.orig).__name__ if error.orig else type(error).__name__
        local = str(error.orig) if isinstance(error.orig, sqlite3.Error) else why
        raise LedgerAway(
            f"the ledger's database does not answer ({local}); nothing is half-written: run the "
            "same command again when it does"
        ) from None


_OPTIONS: dict[str, dict[str, Any]] = {
    "sqlite": {"connect_args": {"timeout": WAIT_S}},
    # a statement sees what was there when it began: so what is read after the lock is new
    "postgresql": {"isolation_level": "READ COMMITTED"},
}


def _engine(url: str) -> Engine:
    try:
        options = _OPTIONS.get(make_url(url).get_backend_name(), {})
        engine = create_engine(url, poolclass=NullPool, **options)
    except ImportError as error:
        raise BadInput(
            f"SDFT_LEDGER_URL: {error}; install sdft's extra postgres (README)"
        ) from None
    except (SQLAlchemyError, ValueError):  # its text may hold the password
        raise BadInput(
            "SDFT_LEDGER_URL is no usable database address, such as "
            "postgresql+psycopg://user:password@host/database"
        ) from None
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
        select(ENTRIES.c.version, ENTRIES.c.epoch)
        .where(ENTRIES.c.name == name, ENTRIES.c.epoch.is_not(None))
        .order_by(ENTRIES.c.epoch.desc())
        .limit(1)
    ).first()
    return Champion(version=row.version, epoch=row.epoch) if row else Champion()


def _verdict(connection: Connection, draft: Draft) -> str | None:
    """The hash of the newest verdict on a draft's version."""
    return connection.execute(
        select(ENTRIES.c.verdict_hash)
        .where(
            ENTRIES.c.name == draft.name,
            ENTRIES.c.version == draft.version,
            ENTRIES.c.kind == "verdict",
        )
        .order_by(ENTRIES.c.seq.desc())
        .limit(1)
    ).scalar()


def _seal(draft: Draft, seq: int, previous: str) -> Entry:
    return Entry(
        **draft.model_dump(),
        seq=seq,
        time=datetime.now(UTC).isoformat(timespec="milliseconds"),
        who=who(),
        host=platform.node(),
        code_version=code_version(),
        previous=previous,
    ).seal()


def who() -> str:
    """Who runs this, for the ledger: SDFT_USER where a service acts for a person, or the login."""
    try:
        return check_text("SDFT_USER", os.environ.get("SDFT_USER", "")) or getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return f"uid {os.getuid()}"


def check_text(what: str, text: str) -> str:
    """`text`; raises BadInput where it has bytes that are no UTF-8, which no entry can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadInput(f"{what}: is no UTF-8 text") from None
    return text
