"""More than a hundred random edits of files, ledger rows, tags and aliases: each one is found."""

import random
import sqlite3
from pathlib import Path

import pytest
from registry_home import RegistryHome

from tasks.proof import Disproved, prove
from tasks.stagefiles import INPUTS

pytestmark = [pytest.mark.slow, pytest.mark.faults]
FLIPS, ROWS = 90, 40
TAGS = ("sdft.skill", "sdft.stage_key", "sdft.data_hash", "sdft.model_hash", "sdft.verdict")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> RegistryHome:
    place = RegistryHome(tmp_path_factory.mktemp("tampering"))
    place.line(["a", "b", "c"])
    return place


def found(demo: RegistryHome) -> str:
    with pytest.raises(Disproved) as caught:
        prove(demo.home, "demo")
    return str(caught.value)


def test_every_flipped_bit_of_a_file_is_found(demo: RegistryHome) -> None:
    """Every artifact of runs and packages, every file that a stage's record lists, the base."""
    rng = random.Random(0)
    places = [demo.home.artifacts, *demo.home.stages.glob("*/*"), Path(demo.base.path)]
    files = [one for place in places for one in (place, *sorted(place.rglob("*"))) if one.is_file()]
    files = [one for one in files if one != demo.home.stages / one.parent.name / INPUTS]
    assert len(files) > FLIPS // 2
    for number in range(FLIPS):
        path = files[number % len(files)]
        whole = path.read_bytes()
        place = rng.randrange(len(whole))
        altered = bytearray(whole)
        altered[place] ^= 1 << rng.randrange(8)
        path.write_bytes(altered)
        message = found(demo)
        assert path.name in message or path.parent.name in message or "base model" in message
        path.write_bytes(whole)
    assert prove(demo.home, "demo").stages == 3


def test_every_edited_ledger_row_is_found(demo: RegistryHome) -> None:
    rng = random.Random(1)
    database = sqlite3.connect(demo.home.root / "ledger.db", isolation_level=None)
    database.execute("DROP TRIGGER ledger_no_update")
    columns = [row[1] for row in database.execute("PRAGMA table_info(ledger)") if row[1] != "seq"]
    for _ in range(ROWS):
        seq, column = rng.randint(1, 9), rng.choice(columns)
        [value] = database.execute(f"SELECT {column} FROM ledger WHERE seq = ?", [seq]).fetchone()
        other = value + 100 if isinstance(value, int) else 77 if column == "epoch" else f"{value}x"
        if column == "kind":
            other = "repaired" if value != "repaired" else "refused"
        database.execute(f"UPDATE ledger SET {column} = ? WHERE seq = ?", [other, seq])
        assert f"ledger entry {seq}: was altered" in found(demo), column
        database.execute(f"UPDATE ledger SET {column} = ? WHERE seq = ?", [value, seq])
    assert prove(demo.home, "demo").stages == 3


@pytest.mark.parametrize("version", ["1", "2", "3"])
def test_every_edited_tag_and_moved_alias_is_found(demo: RegistryHome, version: str) -> None:
    client = demo.client
    for tag in (*TAGS, "sdft.parent_version"):
        value = client.get_model_version("demo", version).tags[tag]
        client.set_model_version_tag("demo", version, tag, f"{value}x")
        assert f"demo/{version}: tag" in found(demo)
        client.set_model_version_tag("demo", version, tag, value)
    for alias in ("champion", "candidate"):
        if version != "3":
            client.set_registered_model_alias("demo", alias, version)
            assert f"alias {alias} is on version {version}" in found(demo)
            client.set_registered_model_alias("demo", alias, "3")
    assert prove(demo.home, "demo").stages == 3
