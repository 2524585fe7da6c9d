"""The ledger's tables, and the triggers that keep its entries as they were written."""

from sqlalchemy import (
    DDL,
    Column,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    event,
)

METADATA = MetaData()
ENTRIES = Table(
    "ledger",
    METADATA,
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
        Column(name, String(64))
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
CURSORS = Table(
    "ledger_cursor",
    METADATA,
    Column("consumer", String(40), primary_key=True),
    Column("name", String(63), primary_key=True),
    Column("seq", Integer, nullable=False),
)
LEASES = Table(
    "lease",
    METADATA,
    Column("key", String(200), primary_key=True),
    Column("token", Integer, nullable=False),
    Column("beats", Integer, nullable=False),
    Column("holder", Text),
)

WATCHED = Table(
    "watched_skill",
    METADATA,
    Column("curriculum", String(63), primary_key=True),
    Column("place", Integer, primary_key=True, autoincrement=False),
    Column("skill", String(63), nullable=False),
    Column("content_hash", String(64), nullable=False),
    Column("time", String(40), nullable=False),
    Column("who", Text, nullable=False),
    UniqueConstraint("curriculum", "skill"),
)


def _only_append(table: Table) -> None:
    """Triggers that keep what was written once."""
    name = table.name
    for change in ("UPDATE", "DELETE"):
        event.listen(
            table,
            "after_create",
            DDL(
                f"CREATE TRIGGER {name}_no_{change.lower()} BEFORE {change} ON {name} "
                f"BEGIN SELECT RAISE(ABORT, 'the {name} is append-only'); END"
            ).execute_if(dialect="sqlite"),
        )
    event.listen(
        table,
        "after_create",
        DDL(
            f"CREATE FUNCTION {name}_append_only() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$ BEGIN RAISE EXCEPTION 'the {name} is append-only'; END $$; "
            f"CREATE TRIGGER {name}_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {name} "
            f"FOR EACH STATEMENT EXECUTE FUNCTION {name}_append_only()"
        ).execute_if(dialect="postgresql"),
    )


for _table in (ENTRIES, WATCHED):
    _only_append(_table)
