"""A finished stage that nobody touched is not read again; one that somebody did is."""

import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from stages import Case

from schemas.base import BadInput
from sdft import modelfiles
from tasks import seen
from tasks.seen import SEEN, known_record

Reads = list[Path]


@pytest.fixture(scope="module")
def trained(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    case = Case(tiny_dir, tmp_path_factory.mktemp("case"))
    _, _, directory = case.run("stage", case.spec())
    return directory


@pytest.fixture
def stage(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "stage")
    return tmp_path / "stage"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """Which files were hashed; files count as settled at once."""
    monkeypatch.setattr(seen, "SETTLED_S", 0.0)
    real, done = modelfiles.digest_file, Reads()

    def digest(path: Path) -> str:
        done.append(path)
        return real(path)

    monkeypatch.setattr(modelfiles, "digest_file", digest)
    return done


def test_what_nobody_touched_is_read_once(stage: Path, reads: Reads) -> None:
    first = known_record(stage)
    assert first is not None
    assert {path.name for path in reads} >= {"model.safetensors", "metrics.jsonl"}
    reads.clear()
    assert known_record(stage) == first
    assert reads == []


def test_what_was_written_just_now_is_read_again(
    stage: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second change within a tick of the file system's clock could not be told from the first."""
    monkeypatch.setattr(seen, "SETTLED_S", 3600.0)
    known_record(stage)
    assert not (stage / SEEN).exists()
    reads.clear()
    known_record(stage)
    assert reads != []


def flip(stage: Path) -> None:
    """Another bit in the weights; size and time of modification as before."""
    time.sleep(0.02)  # a tick of the file system's clock
    weights = stage / "model" / "model.safetensors"
    before = weights.stat()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(stage: Path) -> None:
    """Other weights under the same name."""
    weights = stage / "model" / "model.safetensors"
    other = weights.with_name("other")
    other.write_bytes(weights.read_bytes()[:-1] + b"x")
    other.replace(weights)


def add(stage: Path) -> None:
    (stage / "model" / "extra.json").write_text("{}")


def remove(stage: Path) -> None:
    (stage / "metrics.jsonl").unlink()


def link(stage: Path) -> None:
    config = stage / "model" / "config.json"
    config.unlink()
    config.symlink_to("/etc/hostname")


@pytest.mark.parametrize("change", [flip, replace, add, remove, link])
def test_what_somebody_touched_is_read_and_refused(
    stage: Path, reads: Reads, change: Callable[[Path], None]
) -> None:
    known_record(stage)
    assert (stage / SEEN).is_file()
    change(stage)
    with pytest.raises(BadInput, match=r"is not as .* lists it|is a link that leaves"):
        known_record(stage)


def test_a_memory_that_was_altered_is_not_believed(stage: Path, reads: Reads) -> None:
    known_record(stage)
    flip(stage)
    remembered = json.loads((stage / SEEN).read_text())
    now = (stage / "model" / "model.safetensors").stat()
    marks = [now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns]
    assert remembered["files"]["model/model.safetensors"] != marks
    remembered["files"]["model/model.safetensors"] = marks
    (stage / SEEN).write_text(json.dumps(remembered))
    with pytest.raises(BadInput, match="is not as"):
        known_record(stage)


def test_where_nothing_can_be_kept_all_is_read_each_time(
    stage: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("schemas.base.write_atomically", full)
    for _ in range(2):
        reads.clear()
        assert known_record(stage) is not None
        assert reads != []


def test_no_stage_is_nothing(tmp_path: Path) -> None:
    assert known_record(tmp_path) is None
