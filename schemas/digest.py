"""Content hashes: of values, of files, of directories."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from pydantic import JsonValue


def canonical_json(value: JsonValue | dict[str, Any]) -> str:
    """One text for one value: sorted keys, no spaces, NaN refused."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is no number that JSON can hold")
    return number


STRICT_JSON = json.JSONDecoder(parse_constant=_finite, parse_float=_finite)
"""Refuses NaN and infinity, also as 1e999: what it reads, `canonical_json` can write."""


def digest_json(value: JsonValue | dict[str, Any]) -> str:
    """sha256 of the canonical JSON of a value, as 64 hex digits."""
    return hashlib.sha256(canonical_json(value).encode("utf-8", "surrogatepass")).hexdigest()


def digest_text(text: str) -> str:
    """sha256 of a text's UTF-8 bytes, as 64 hex digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def digest_file(path: Path) -> str:
    """sha256 of a file's bytes, as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
