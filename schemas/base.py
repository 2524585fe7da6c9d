"""The base of every contract: frozen, and unknown keys are errors, never ignored."""

import os
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from schemas.digest import digest_json


class BadInput(ValueError):
    """A user's mistake: the message says what is wrong, where, and what would be right."""


def write_atomically(path: Path, text: str) -> None:
    """Write `text` so that `path` holds either all of it or what it held before."""
    path = path.resolve()  # a link stays a link
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:  # a full disk must not be filled with what is half there
        error.filename = error.filename or str(path)
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Have the disk hold a file's content, or which names a directory has, before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Contract(BaseModel):
    """A frozen value with no unknown keys, read from and written to JSON files."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def read(cls, path: Path) -> Self:
        """The value in a file; raises BadInput, with the file, where it holds no such value."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise BadInput(f"{path}: is not there") from None
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            where = f"{field}: " if field else ""
            raise BadInput(f"{path}: is no {cls.__name__}: {where}{first['msg']}") from None

    @property
    def text(self) -> str:
        """What `write` writes."""
        return self.model_dump_json(indent=2) + "\n"

    def write(self, path: Path) -> None:
        write_atomically(path, self.text)


class Sealed(Contract):
    """A contract that carries its own hash, so that one altered in its file is found."""

    hash: str = ""

    @property
    def sealed(self) -> str:
        """What `hash` must be: sha256 over everything else."""
        return digest_json(self.model_dump(mode="json", exclude={"hash"}))

    def seal(self) -> Self:
        return self.model_copy(update={"hash": self.sealed})

    @classmethod
    def read(cls, path: Path) -> Self:
        """The value in a file; raises BadInput where it is none, or not as it was sealed."""
        value = super().read(path)
        if value.hash != value.sealed:
            raise BadInput(f"{path}: was altered after it was written")
        return value
