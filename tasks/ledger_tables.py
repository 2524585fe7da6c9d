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

for _change in ("UPDATE", "DELETE"):
    event.listen(
        ENTRIES,
        "after_create",
        DDL(
            f"CREATE TRIGGER ledger_no_{_change.lower()} BEFORE {_change} ON ledger "
            "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END"
        ).execute_if(dialect="sqlite"),
    )
event.listen(
    ENTRIES,
    "after_create",
    DDL(
        "CREATE FUNCTION ledger_append_only() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'the ledger is append-only'; END $$; "
        "CREATE TRIGGER ledger_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON ledger "
        "FOR EACH STATEMENT EXECUTE FUNCTION ledger_append_only()"
    ).execute_if(dialect="postgresql"),
)
