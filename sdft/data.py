"""The canonical form of data, and its content hash.

Whatever file they were read from, the same rows give the same hash: it is taken over canonical
rows.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.base import sync
from schemas.data import EVAL_SCHEMA, TRAIN_SCHEMA
from schemas.digest import canonical_json, digest_json
from schemas.templates import Message
from sdft.files import disk_errors

Row = dict[str, Any]


@dataclass(frozen=True)
class Demonstration:
    """One canonical training row."""

    id: str
    messages: list[Message]
    response: str | None
    """None for an anchor, whose teacher is shown no demonstration."""
    context: str | None


@dataclass(frozen=True)
class Item:
    """One canonical evaluation row."""

    id: str
    messages: list[Message]
    references: list[str]


def as_messages(prompt: Any) -> list[Message] | None:
    """A prompt as chat messages: a text is one user turn; None where it is neither."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not prompt:
        return None
    messages = []
    for turn in prompt:
        match turn:
            case {"role": str(role), "content": str(content)}:
                messages.append({"role": role, "content": content})
            case _:
                return None
    return messages


def as_references(value: Any) -> list[str] | None:
    """References as a list of texts: a text is a list of one; None where it is neither."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        return value
    return None


def row_id(row: Row) -> str | None:
    """The row's own id as text, or one made from its content where the file has none."""
    if "id" in row:
        return None if row["id"] is None else str(row["id"])
    return digest_json({key: plain(value) for key, value in row.items()})[:16]


def train_table(rows: Iterable[Row]) -> pa.Table:
    """Canonical demonstrations or anchors; the rows must have passed validation."""
    return _table(
        [
            {
                "id": row_id(row),
                "messages": as_messages(row["prompt"]),
                "response": row.get("response"),
                "context": row.get("context") or None,
                "metadata": _metadata(row),
            }
            for row in rows
        ],
        TRAIN_SCHEMA,
    )


def eval_table(rows: Iterable[Row]) -> pa.Table:
    """Canonical evaluation items; the rows must have passed validation."""
    return _table(
        [
            {
                "id": row_id(row),
                "messages": as_messages(row["prompt"]),
                "references": as_references(row["references"]),
                "choices": row.get("choices") or None,
                "metadata": _metadata(row),
            }
            for row in rows
        ],
        EVAL_SCHEMA,
    )


def _table(rows: list[Row], schema: pa.Schema) -> pa.Table:
    return pa.Table.from_pylist(
        [{**row, "row_hash": digest_json(row)} for row in rows], schema=schema
    )


def _metadata(row: Row) -> str | None:
    value = row.get("metadata")
    return None if value is None else canonical_json(plain(value))


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: timestamps and the like become text, pandas' NaN null."""
    return json.loads(json.dumps(value, default=str), parse_constant=lambda _: None)


def data_hash(table: pa.Table) -> str:
    """The identity of a canonical table: sha256 over its rows' hashes in order."""
    return digest_json(table.column("row_hash").to_pylist())


def rehash(table: pa.Table) -> str:
    """The data hash of a canonical table made again from its content, whatever `row_hash` says."""
    rows = table.drop_columns("row_hash").to_pylist()
    return digest_json([digest_json(row) for row in rows])


def write_table(table: pa.Table, path: Path) -> None:
    """Write zstd Parquet so that `path` is whole or absent."""
    partial = path.with_name(f".{path.name}.partial")
    with disk_errors(path):
        pq.write_table(table, partial, compression="zstd")
        sync(partial)
        partial.replace(path)


def read_demonstrations(path: Path) -> list[Demonstration]:
    """The canonical training rows in a snapshot."""
    columns = ["id", "messages", "response", "context"]
    return [Demonstration(**row) for row in pq.read_table(path, columns=columns).to_pylist()]


def read_items(path: Path) -> list[Item]:
    """The canonical evaluation rows in a snapshot."""
    columns = ["id", "messages", "references"]
    return [Item(**row) for row in pq.read_table(path, columns=columns).to_pylist()]
