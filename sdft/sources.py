"""Rows from any accepted file, with our column names and their values untouched."""

import csv
import json
import re
import sys
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.base import BadInput
from schemas.curriculum import HUB, DataSource
from schemas.digest import STRICT_JSON
from sdft.data import Row

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
                f"{', '.join(names)}; {_hint(ours, names)}"
            )
    present = {ours: theirs for ours, theirs in columns.items() if theirs in names}
    return [{ours: row.get(theirs) for ours, theirs in present.items()} for row in rows]


def _hint(ours: str, names: list[str]) -> str:
    """What to do about a column that is missing."""
    if len(names) == 1 and re.search(r"[;\t|]", names[0]):
        return "its fields seem to be separated by something else than commas: save it with commas"
    if "messages" in names:
        return "of a chat, prompt is the messages before the last answer, and response that answer"
    return f"map yours with columns: {{{ours}: <its name>}}"


@contextmanager
def _readable(source: DataSource) -> Generator[None]:
    """Whatever the readers raise on a bad file, as a BadInput that names it."""
    try:
        yield
    except BadInput:
        raise
    except UnicodeDecodeError as error:
        wrong = error.object[error.start]
        raise BadInput(
            f"{source.path}: is no UTF-8 text (byte {wrong:#04x} at {error.start}); save it as "
            "UTF-8"
        ) from None
    except (pa.ArrowException, OSError, ValueError, csv.Error) as error:
        raise BadInput(f"{source.path}: cannot be read: {_innermost(error)}") from error


def _load(source: DataSource, cache_dir: Path) -> Iterable[Row]:
    path = Path(source.path)
    if source.path.startswith(HUB) or path.is_dir():
        return _from_datasets(source, cache_dir)
    if not path.is_file():
        raise BadInput(f"{path}: there is no such file")
    kind = path.suffix.lower()
    if kind not in _KINDS:
        raise BadInput(f"{path}: is none of {', '.join(_KINDS)} nor a datasets directory")
    if path.stat().st_size == 0:
        raise BadInput(f"{path}: is empty")
    match kind:
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
    except FileNotFoundError as error:
        if source.path.startswith(HUB):
            raise
        raise BadInput(
            f"{source.path}: is a directory, but none that datasets.save_to_disk has written; name "
            "a file"
        ) from error
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    if source.split not in loaded:
        names = ", ".join(map(str, loaded))
        raise BadInput(f"{source.path}: has no split {source.split!r}; it has {names}")
    return loaded[source.split]


def _json_rows(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8-sig")
    whole = path.suffix.lower() == ".json"
    numbered = [(1, text)] if whole else enumerate(text.split("\n"), 1)
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
        found = value if whole and isinstance(value, list) else [value]
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
