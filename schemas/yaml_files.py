"""YAML files that people write: what is wrong is named with file, line and field."""

from collections.abc import Generator, Hashable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from schemas.base import BadInput

Place = tuple[Hashable, ...]
"""Keys and indices from the root of a document to a value."""
SAID = {
    "missing": "is required and missing",
    "tuple_type": "must be a list, each on a line that begins with '- '",
    "model_type": "must be a mapping of keys to values",
    "dict_type": "must be a mapping of keys to values",
    "string_type": "must be a text; put it in quotes",
}
"""What pydantic says of Python's types, by its name for it."""


def read_yaml(path: Path, keys: str) -> tuple[dict[str, Any], dict[Place, int]]:
    """A YAML file's mapping, and the lines of its places.

    `keys` says which it must have. Raises BadInput where it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadInput(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise BadInput(f"{path}: is a directory; name the YAML file in it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read as UTF-8 text: {error}") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        lines = dict(_lines(root, set())) if root else {}
        content = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise BadInput(f"{path}{_where(error)}") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path}: must be a mapping with {keys}")
    return content, lines


def _where(error: Exception) -> str:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return f": is no valid YAML: {error}"
    mark, said = error.problem_mark, str(error.problem)
    advice = "; indent with spaces" if "'\\t'" in said else ""
    return f":{mark.line + 1}:{mark.column + 1}: is no valid YAML: {said}{advice}"


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
def naming(path: Path, lines: dict[Place, int], keys: frozenset[str]) -> Generator[None]:
    """Turn what is wrong with a document into a BadInput with file, line and field.

    `keys` are all that there are, for who has misspelt one.
    """
    try:
        yield
    except ValidationError as error:
        problems = [_problem(path, lines, keys, detail) for detail in error.errors()]
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


def _problem(path: Path, lines: dict[Place, int], keys: frozenset[str], detail: Any) -> str:
    place: Place = tuple(detail["loc"]) or tuple(detail.get("ctx", {}).get("place", ()))
    known = place
    while known and known not in lines:  # a missing key is reported at the mapping that lacks it
        known = known[:-1]
    field = ".".join(str(part) for part in place) or "curriculum"
    message = SAID.get(detail["type"], detail["msg"].removeprefix("Value error, "))
    if detail["type"] == "extra_forbidden":
        close = get_close_matches(str(place[-1]), keys, 1)
        message = "is no known key" + (f"; is it {close[0]}?" if close else "")
    return f"{path}:{lines.get(known, 1)}: {field}: {message}"
