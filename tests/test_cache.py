"""The cache of what came from elsewhere: whole or brought again, bounded, and safe to share."""

import multiprocessing
import os
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from schemas.base import BadInput
from schemas.parcel import Parcel
from schemas.stage import FileDigest
from sdft.modelfiles import all_files
from tasks.cache import LIMIT, Cache
from tasks.failures import RunFailed

SPAWN = multiprocessing.get_context("spawn")
LONG_S = 60


class Source:
    """A parcel, and somebody who brings its files and counts them."""

    def __init__(self, folder: Path, name: str, size: int = 100, files: int = 2) -> None:
        self.folder = folder / "source" / name
        self.folder.mkdir(parents=True)
        for number in range(files):
            (self.folder / f"{number}.bin").write_bytes(f"{name}{number}".encode().ljust(size))
        self.parcel = Parcel(name=name, files=all_files(self.folder))
        self.brought: list[str] = []

    def bring(self, entry: Path, lacking: list[FileDigest]) -> None:
        for one in lacking:
            (entry / one.path).write_bytes((self.folder / one.path).read_bytes())
            self.brought.append(one.path)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def test_what_is_there_is_not_brought_again(cache: Cache, tmp_path: Path) -> None:
    source = Source(tmp_path, "a")
    for _ in range(2):
        with cache.holding(source.parcel, source.bring) as entry:
            assert all_files(entry) == source.parcel.files
    assert source.brought == ["0.bin", "1.bin"]
    assert cache.find("a") == source.parcel
    assert cache.find("b") is None


def test_a_crash_in_between_costs_only_the_file_it_fell_into(cache: Cache, tmp_path: Path) -> None:
    source = Source(tmp_path, "a", files=3)

    def dies(entry: Path, lacking: list[FileDigest]) -> None:
        source.bring(entry, lacking[:1])
        (entry / lacking[1].path).write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), cache.holding(source.parcel, dies):
        pass
    with cache.holding(source.parcel, source.bring):
        assert source.brought == ["0.bin", "1.bin", "2.bin"]


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "added"])
def test_what_was_damaged_on_the_disk_is_found_and_brought_again(
    cache: Cache, tmp_path: Path, damage: str
) -> None:
    source = Source(tmp_path, "a")
    with cache.holding(source.parcel, source.bring) as entry:
        pass
    file = entry / "1.bin"
    match damage:
        case "flipped":
            file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
        case "cut":
            file.write_bytes(file.read_bytes()[:-1])
        case "gone":
            file.unlink()
        case _:
            file.unlink()
            (entry / "added.bin").write_bytes(b"x")
    with cache.holding(source.parcel, source.bring):
        assert source.brought == ["0.bin", "1.bin", "1.bin"]
        assert not (entry / "added.bin").exists()


def test_what_is_brought_must_be_what_it_is_named_by(cache: Cache, tmp_path: Path) -> None:
    source, wrong = Source(tmp_path, "a"), Source(tmp_path, "b")
    with pytest.raises(BadInput, match=r"a: 0\.bin is not what it should be"):
        cache.holding(source.parcel, wrong.bring).__enter__()
    with cache.holding(source.parcel, source.bring):
        assert source.brought == ["0.bin", "1.bin"]


def test_what_was_not_used_for_the_longest_time_makes_room_but_nothing_that_is_in_use(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LIMIT, "600")
    sources = {name: Source(tmp_path, name) for name in "abcd"}  # 200 bytes each
    for number, name in enumerate("abc"):
        with cache.holding(sources[name].parcel, sources[name].bring) as entry:
            assert entry.name == name
        os.utime(cache.listing(name), (number, number))
    a, d = sources["a"], sources["d"]
    with cache.holding(a.parcel, a.bring):  # the oldest one, used again
        with cache.holding(d.parcel, d.bring):
            assert [name for name in "abcd" if cache.find(name)] == ["a", "c", "d"]
        large = Source(tmp_path, "large", size=250)
        with pytest.raises(RunFailed, match="large takes 500 bytes, and 200 of the 600 of"):
            cache.holding(large.parcel, large.bring).__enter__()
        assert [name for name in "abcd" if cache.find(name)] == ["a"]
        assert not large.brought
    with cache.holding(large.parcel, large.bring):
        assert cache.find("a") is None
    huge = Source(tmp_path, "huge", size=301)
    with pytest.raises(BadInput, match=f"huge takes 602 bytes.* may take 600; set {LIMIT}"):
        cache.holding(huge.parcel, huge.bring).__enter__()
    for nonsense in ("many", "-1", "0", "1e9"):
        monkeypatch.setenv(LIMIT, nonsense)
        with pytest.raises(BadInput, match=f"{LIMIT} must be a number of bytes"):
            cache.holding(huge.parcel, huge.bring).__enter__()


def test_a_folder_can_be_taken_over_in_place_of_bringing_it(cache: Cache, tmp_path: Path) -> None:
    source = Source(tmp_path, "a")
    cache.keep(source.parcel, source.folder)
    assert not [*source.folder.iterdir()]
    cache.keep(source.parcel, source.folder)  # again
    with cache.holding(source.parcel, source.bring):
        assert source.brought == []


def use(folder: Path, parcels: list[Parcel], gate: Barrier, rounds: int, failed: Any) -> None:
    """Use parcels in turns; what is held must stay whole although others make room."""
    cache = Cache(folder / "cache")
    gate.wait(LONG_S)
    for number in range(rounds):
        parcel = parcels[(number + os.getpid()) % len(parcels)]

        def bring(entry: Path, lacking: list[FileDigest], parcel: Parcel = parcel) -> None:
            with (folder / f"{parcel.name}.count").open("a") as count:
                count.write("x")
            for one in lacking:
                data = (folder / "source" / parcel.name / one.path).read_bytes()
                (entry / one.path).write_bytes(data)

        try:
            with cache.holding(parcel, bring) as entry:
                for one in parcel.files:
                    if (entry / one.path).stat().st_size != one.size_bytes:
                        failed.value += 1
        except RunFailed:  # the others hold all the room there is: so it is said
            continue


def test_processes_share_it_and_each_parcel_is_brought_once(tmp_path: Path) -> None:
    source = Source(tmp_path, "a", size=1 << 20)
    assert run_users(tmp_path, [source.parcel], rounds=5) == 0
    assert (tmp_path / "a.count").read_text() == "x"


def test_processes_that_make_room_take_nothing_from_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LIMIT, str(5 << 10))
    sources = [Source(tmp_path, name, size=1 << 10) for name in "abcd"]  # room for two of them
    assert run_users(tmp_path, [one.parcel for one in sources], rounds=30) == 0
    taken = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*/*.bin"))
    assert 0 < taken <= 5 << 10
    assert sum(len(one.read_text()) for one in tmp_path.glob("*.count")) > len(sources)


def run_users(folder: Path, parcels: list[Parcel], rounds: int) -> int:
    gate, failed = SPAWN.Barrier(3), SPAWN.Value("i", 0)
    users = [
        SPAWN.Process(target=use, args=(folder, parcels, gate, rounds, failed)) for _ in range(3)
    ]
    for one in users:
        one.start()
    for one in users:
        one.join(LONG_S)
        assert one.exitcode == 0
    return int(failed.value)
