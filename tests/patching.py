"""Striking at an exact place of a real program."""

from collections.abc import Callable
from importlib import import_module
from typing import Any


def patched(function: str, turn: int, strike: Callable[[], None]) -> None:
    """Have `strike` called just before the n-th call of `module:name` or `module:class.name`."""
    module, _, name = function.partition(":")
    *path, last = name.split(".")
    owner: Any = import_module(module)
    for part in path:
        owner = getattr(owner, part)
    real = getattr(owner, last)
    calls = 0

    def cut(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == turn:
            strike()
        return real(*args, **kwargs)

    setattr(owner, last, cut)
