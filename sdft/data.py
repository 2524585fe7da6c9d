"""Data from any accepted file to the one canonical form, and its content hash.

Whatever the file format, the same rows give the same hash: it is taken over canonical rows.
"""

import csv
import json
import re
import sys
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.base import BadInput, sync
from schemas.curriculum import HUB, DataSource
from schemas.data import EVAL_SCHEMA, TRAIN_SCHEMA
from schemas.digest import STRICT_JSON, canonical_json, digest_json
from schemas.templates import Message
from sdft.files import disk_errors

Row = dict[str, Any]

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_KINDS = (".jsonl", ".json", ".csv", ".parquet")
_REQUIRED = {
    "train": ("prompt", "response"),
    "anchors": ("prompt",),
    "eval": ("prompt", "references"),
}
_OPTIONAL = {
    "train": ("id", "context", "metadata"),
    "anchors": ("id", "metadata"),
    "eval": ("id", "choices", "metadata"),
}


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


def read_rows(source: DataSource, kind: str, cache_dir: Path) -> list[Row]:
    """The rows of a source with our column names, values untouched.

    `kind` is train, anchors or eval. Raises BadInput for a missing, empty or unreadable file and
    for missing columns.
    """
    columns = {ours: source.columns.get(ours, ours) for ours in _REQUIRED[kind] + _OPTIONAL[kind]}
    if unknown := set(source.columns) - set(columns):
        raise BadInput(
            f"{source.path}: columns maps {', '.join(sorted(unknown))}, which is none of ours: "
            f"{', '.join(columns)}"
        )
    with _readable(source):
        rows: list[Row] = list(_load(source, cache_dir))
    if not rows:
        raise BadInput(f"{source.path}: has no rows")
    names = list(dict.fromkeys(name for row in rows for name in row))
    for ours, theirs in columns.items():
        needed = ours in _REQUIRED[kind] or ours in source.columns
        if needed and theirs not in names:
            raise BadInput(
                f"{source.path}: has no column {theirs!r} (for {ours}); it has "
                f"{', '.join(names)}; map yours with columns: {{{ours}: <its name>}}"
            )
    present = {ours: theirs for ours, theirs in columns.items() if theirs in names}
    return [{ours: row.get(theirs) for ours, theirs in present.items()} for row in rows]


@contextmanager
def _readable(source: DataSource) -> Generator[None]:
    """Whatever the readers raise on a bad file, as a BadInput that names it."""
    try:
        yield
    except BadInput:
        raise
    except (pa.ArrowException, OSError, ValueError, csv.Error) as error:
        raise BadInput(f"{source.path}: cannot be read: {_innermost(error)}") from error


def _load(source: DataSource, cache_dir: Path) -> Iterable[Row]:
    path = Path(source.path)
    if source.path.startswith(HUB) or path.is_dir():
        return _from_datasets(source, cache_dir)
    if not path.is_file():
        raise BadInput(f"{path}: there is no such file")
    if path.suffix not in _KINDS:
        raise BadInput(f"{path}: is none of {', '.join(_KINDS)} nor a datasets directory")
    if path.stat().st_size == 0:
        raise BadInput(f"{path}: is empty")
    match path.suffix:
        case ".parquet":
            with pq.ParquetFile(path) as file:
                return file.read().to_pylist()
        case ".csv":
            return _csv_rows(path)
        case _:
            return _json_rows(path)


def _from_datasets(source: DataSource, cache_dir: Path) -> Any:
    """A dataset of the hub, which is downloaded into the cache, or one that was saved to a
    directory."""
    import datasets
    from datasets.exceptions import DatasetsError

    datasets.disable_progress_bars()
    try:
        if source.path.startswith(HUB):
            name, place = source.path.removeprefix(HUB), str(cache_dir)
            return datasets.load_dataset(
                name, split=source.split, revision=source.revision, cache_dir=place
            )
        loaded = datasets.load_from_disk(source.path)
    except DatasetsError as error:
        raise BadInput(f"{source.path}: cannot be read: {_innermost(error)}") from error
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    if source.split not in loaded:
        names = ", ".join(map(str, loaded))
        raise BadInput(f"{source.path}: has no split {source.split!r}; it has {names}")
    return loaded[source.split]


def _json_rows(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8-sig")
    numbered = [(1, text)] if path.suffix == ".json" else enumerate(text.split("\n"), 1)
    rows: list[Row] = []
    for number, part in numbered:
        if not part.strip():
            continue
        try:
            value = STRICT_JSON.decode(part)
            if _SURROGATE.search(part):
                json.dumps(value, ensure_ascii=False).encode()
        except json.JSONDecodeError as error:
            raise BadInput(f"{path}:{number + error.lineno - 1}: is no JSON: {error.msg}") from None
        except ValueError as error:
            raise BadInput(f"{path}:{number}: holds what is no text or number: {error}") from None
        except RecursionError:
            raise BadInput(f"{path}:{number}: is nested too deeply") from None
        found = value if path.suffix == ".json" and isinstance(value, list) else [value]
        if not all(isinstance(row, dict) for row in found):
            raise BadInput(f"{path}:{number}: holds something else than an object")
        rows += found
    return rows


def _csv_rows(path: Path) -> list[Row]:
    """All fields are texts, "NA" and "007" too.

    Raises BadInput for a row with more or fewer fields than the header, which would shift.
    """
    csv.field_size_limit(sys.maxsize)  # a context may be a whole document
    rows: list[Row] = []
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, strict=True)
        names = next(reader, [])
        if twice := [name for name in names if names.count(name) > 1]:
            raise BadInput(f"{path}:1: has two columns {twice[0]!r}")
        for row in reader:
            if row and len(row) != len(names):
                raise BadInput(
                    f"{path}:{reader.line_num}: has {len(row)} fields, the header {len(names)}; "
                    "put fields with commas in double quotes"
                )
            if row:
                rows.append(dict(zip(names, row, strict=True)))
    return rows


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}".splitlines()[0]


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
