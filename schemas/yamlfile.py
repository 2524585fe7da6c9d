"""YAML files that people write: every mistake is told with its file, line and field."""

from collections.abc import Generator, Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from schemas.base import BadInput

Place = tuple[Hashable, ...]
"""Keys and indices from the root of a YAML document to a value."""


def read_yaml(path: Path, keys: str) -> tuple[dict[str, Any], dict[Place, int]]:
    """A YAML file's mapping, and the lines of its places."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadInput(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read as UTF-8 text: {error}") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        lines = dict(_lines(root, set())) if root else {}
        content = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise BadInput(f"{path}: is no valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path}: must be a mapping with {keys}")
    return content, lines


class _Loader(yaml.SafeLoader):
    """Says where a text stands that looks like a date or number and is none."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError):
            kind = node.tag.rpartition(":")[2]
            raise yaml.MarkedYAMLError(
                problem=f"{str(node.value)[:40]!r} cannot be read as {kind}; put a text in quotes",
                problem_mark=node.start_mark,
            ) from None


@contextmanager
def named(path: Path, lines: dict[Place, int]) -> Generator[None]:
    """Turn what is wrong with a document into a BadInput with file, line and field."""
    try:
        yield
    except ValidationError as error:
        problems = [_problem(path, lines, detail) for detail in error.errors()]
        raise BadInput("\n".join(problems)) from None


def _lines(node: yaml.Node, walked: set[int], at: Place = ()) -> Iterator[tuple[Place, int]]:
    """Every place in the document with its 1-based line; a key given twice is an error.

    What an alias stands for is walked once: aliases of aliases are more than can be counted.
    """
    yield at, node.start_mark.line + 1
    if id(node) in walked:
        return
    walked.add(id(node))
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(
                    problem="a key must be a plain word", problem_mark=key.start_mark
                )
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
            yield from _lines(value, walked, (*at, key.value))
            yield (*at, key.value), key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _lines(value, walked, (*at, index))


def _problem(path: Path, lines: dict[Place, int], detail: Any) -> str:
    place = tuple(detail["loc"])
    known = place
    while known and known not in lines:  # a missing key is reported at the mapping that lacks it
        known = known[:-1]
    field = ".".join(str(part) for part in place) or "curriculum"
    match detail["type"]:
        case "extra_forbidden":
            message = "is no known key"
        case "missing":
            message = "is required and missing"
        case _:
            message = detail["msg"].removeprefix("Value error, ")
    return f"{path}:{lines.get(known, 1)}: {field}: {message}"
