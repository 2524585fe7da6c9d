"""A watched folder or S3 prefix, read: which directories are there, and a checked copy of one."""

import os
import shutil
from collections import defaultdict
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem
from pyarrow.lib import ArrowException

from schemas.base import BadInput
from schemas.curriculum import S3
from schemas.watched import COMPLETE, Copy, Drop, SourceFile
from sdft.files import partial_name, placed
from sdft.modelfiles import all_files
from tasks.console import shown_address
from tasks.home import Home

COPY, CONTENT = "copy.json", "skill"
"""In a copy's directory: what it is, written last, and the files."""
READ_BYTES = 2**20
LINK = "is a symbolic link; copy the file"


def list_drops(address: str) -> dict[str, Drop]:
    """The directories under a folder or s3:// address, by name; what lies beside them is not ours.

    Raises BadInput where it cannot be read.
    """
    with _reading(address):
        files = [*(_on_s3(address) if address.startswith(S3) else _on_disk(Path(address)))]
    found: dict[str, list[SourceFile]] = defaultdict(list)
    problems: dict[str, list[str]] = defaultdict(list)
    for path, file in files:
        name, _, inside = path.partition("/")
        if name.startswith(".") and name != "..":
            continue
        if isinstance(file, str):
            problems[name].append(f"{inside or name} {file}")
        elif inside:
            found[name].append(file.model_copy(update={"path": inside}))
    return {
        name: Drop(name=name, files=tuple(found[name]), problems=tuple(problems[name]))
        for name in sorted({*found, *problems})
    }


def copy_of(drop: Drop, address: str, home: Home) -> tuple[Copy, Path]:
    """A copy in the home of what a directory holds now, and the folder of its files.

    One that is there and whole is taken where the listing, with its times, is the same.
    """
    listing = tuple(file for file in drop.files if file.path != COMPLETE)
    for folder in home.watched.glob(f"{drop.name}-*"):
        there = whole_copy(folder)
        if there is None or folder.name != copy_name(drop.name, there.content_hash):
            continue
        if there.listing == listing:
            return there, folder / CONTENT
    system, root = _system(address)
    home.watched.mkdir(exist_ok=True)
    fetched = home.watched / f"{partial_name()}{drop.name}-fetched"
    with placed(fetched) as partial:
        for file in listing:
            target = partial / CONTENT / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            with _reading(address):
                source = system.open_input_stream(f"{root}/{drop.name}/{file.path}")
            with source, target.open("wb") as written:
                while True:
                    with _reading(address):
                        part = source.read(READ_BYTES)
                    if not part:
                        break
                    written.write(part)
        copy = Copy(listing=listing, files=all_files(partial / CONTENT)).seal()
        copy.write(partial / COPY)
    folder = home.watched / copy_name(drop.name, copy.content_hash)
    if whole_copy(folder) is None:
        with placed(folder) as partial:  # replaces one that was altered
            partial.rmdir()
            fetched.rename(partial)
    else:  # the same files with other times
        copy.write(folder / COPY)
        shutil.rmtree(fetched)
    return copy, folder / CONTENT


def whole_copy(folder: Path) -> Copy | None:
    """The copy in a folder, if all of it is as it was copied."""
    try:
        copy = Copy.read(folder / COPY)
    except BadInput:
        return None
    return copy if all_files(folder / CONTENT) == copy.files else None


def copy_name(skill: str, content_hash: str) -> str:
    """The name of a copy's directory."""
    return f"{skill}-{content_hash[:16]}"


Listed = Generator[tuple[str, SourceFile | str]]
"""Paths under the address, with their file, or why nothing may be read there."""


def _on_disk(root: Path) -> Listed:
    unread: list[OSError] = []
    for top in sorted(root.iterdir()):
        if top.is_symlink():
            yield top.name, LINK
        if top.is_symlink() or not top.is_dir():
            continue
        for folder, folders, names in os.walk(top, onerror=unread.append):
            for name in sorted(folders + names):
                path = Path(folder, name)
                inside = path.relative_to(root).as_posix()
                if path.is_symlink():
                    yield inside, LINK
                elif path.is_file():
                    stat = path.stat()
                    yield inside, _listed(inside, stat.st_size, stat.st_mtime_ns)
    for error in unread:
        yield Path(error.filename).relative_to(root).as_posix(), f"cannot be read: {error.strerror}"


def _on_s3(address: str) -> Listed:
    system, root = _system(address)
    bucket = root.partition("/")[0]
    if system.get_file_info(bucket).type == FileType.NotFound:
        raise FileNotFoundError(f"there is no bucket {bucket}")
    # A prefix of which all objects are gone is an empty folder.
    for info in system.get_file_info(FileSelector(root, recursive=True, allow_not_found=True)):
        if info.type == FileType.File:
            inside = info.path.removeprefix(f"{root}/")
            yield inside, _listed(inside, info.size, info.mtime_ns)


def _listed(path: str, size_bytes: int, changed_ns: int) -> SourceFile:
    return SourceFile(path=path, size_bytes=size_bytes, changed_ns=changed_ns)


def _system(address: str) -> tuple[Any, str]:
    if address.startswith(S3):
        system, root = FileSystem.from_uri(address)
        return system, root.rstrip("/")
    return LocalFileSystem(), address


@contextmanager
def _reading(address: str) -> Generator[None]:
    try:
        yield
    except (OSError, ArrowException) as error:
        said = str(error).splitlines()[0]
        raise BadInput(f"{shown_address(address)}: cannot be read: {said}") from None
