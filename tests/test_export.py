"""`sdft export`: a directory that is what the ledger says, whole, or not there.

That transformers opens it, and adapters, are in `test_learn.py`.
"""

import errno
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from registry_home import RegistryHome
from typer.testing import CliRunner, Result

from flows import cli
from schemas.base import BadInput
from sdft.modelfiles import model_files, model_hash
from tasks.artifacts import local_copy, run_file
from tasks.ledger import Ledger
from tasks.packages import package_uri

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryHome]:
    """Two versions, the second champion; commands find it by SDFT_HOME."""
    place = RegistryHome(tmp_path_factory.mktemp("export"))
    place.line(["a", "b"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDFT_HOME", str(place.home.root))
        yield place


def run(reference: str, directory: Path) -> Result:
    return CliRunner().invoke(cli.app, ["export", reference, str(directory)])


def refusal(reference: str, directory: Path) -> str:
    error = run(reference, directory).exception
    assert isinstance(error, BadInput)
    return str(error)


def test_a_version_is_written_with_the_hash_that_the_ledger_has(
    demo: RegistryHome, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    registered = [one for one in Ledger(demo.home).entries() if one.kind == "registered"]
    for entry, reference, name in zip(
        registered, ("demo/1", "demo"), ("empty", "new"), strict=True
    ):
        result = run(reference, tmp_path / name)
        assert result.exit_code == 0, result.output
        written = model_hash(model_files(tmp_path / name))
        assert written == entry.model_hash
        assert f"demo/{entry.version}, 2 files" in result.output
        assert f"proven: model {written}, as ledger entry {entry.seq} says\n" in result.output


def test_a_directory_that_holds_something_is_left_as_it_is(
    demo: RegistryHome, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    note = tmp_path / "full" / "note"
    note.write_text("mine")
    for place in (tmp_path / "full", note):
        assert refusal("demo", place) == (
            f"{place}: is there already; name a directory that is new or empty"
        )
    assert refusal("demo", tmp_path / "no" / "way") == (
        f"{tmp_path / 'no'}: there is no such directory"
    )
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "note"]
    assert note.read_text() == "mine"


def test_what_somebody_writes_there_meanwhile_is_not_removed(
    demo: RegistryHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    copied = shutil.copyfile

    def copyfile(source: Any, place: Any, **options: Any) -> None:
        copied(source, place, **options)
        target.mkdir(exist_ok=True)
        (target / "note").write_text("mine")

    monkeypatch.setattr("tasks.exporting.shutil.copyfile", copyfile)
    assert "is there already" in refusal("demo", target)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "note"]


def test_wrong_requests_name_what_there_is(demo: RegistryHome, tmp_path: Path) -> None:
    assert "nobody: is not in the ledger" in refusal("nobody", tmp_path / "out")
    assert "demo/9: is not in the ledger" in refusal("demo/9", tmp_path / "out")
    assert "the aliases are champion and candidate" in refusal("demo@best", tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(
    demo: RegistryHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Any, place: Any) -> None:
        Path(place).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(place))

    monkeypatch.setattr("tasks.exporting.shutil.copyfile", full)
    said = refusal("demo", tmp_path / "out")
    assert said == (
        f"{tmp_path}/out: cannot be written: No space left on device; nothing of it is left"
    )
    assert not any(tmp_path.iterdir())
    if Path("/proc/self").is_dir():  # where root can make no directory either
        assert refusal("demo", Path("/proc/x")).startswith("/proc/x: cannot be written: ")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ("package", "model.safetensors"),
        ("config", "config.json"),
        ("more", "modeling.py"),
        ("record", "record"),
    ],
)
def test_what_is_not_as_it_was_trained_is_not_written(
    demo: RegistryHome, tmp_path: Path, damage: str, named: str
) -> None:
    version = demo.client.get_model_version("demo", "2")
    kept = demo.client.get_run(version.run_id)
    package = local_copy(package_uri(demo.client, version))
    other = demo.client.get_run(demo.client.get_model_version("demo", "1").run_id)
    place = {
        "package": package / "model" / "model.safetensors",
        "config": run_file(kept, "model-files") / "config.json",
        "more": run_file(kept, "model-files") / "modeling.py",
        "record": run_file(kept, "record.json"),
    }[damage]
    honest = place.read_bytes() if place.exists() else None
    if damage == "record":
        place.write_bytes(run_file(other, "record.json").read_bytes())
    else:
        place.write_bytes(b"\x01" + (honest or b"")[1:])
    result = run("demo", tmp_path / "out")
    place.unlink()
    if honest is not None:
        place.write_bytes(honest)
    assert result.exit_code == 4
    assert "demo/2: " in result.output and named in result.output
    assert not any(tmp_path.iterdir())
    assert run("demo", tmp_path / "out").exit_code == 0


def test_a_package_that_is_gone_is_named(demo: RegistryHome, tmp_path: Path) -> None:
    package = local_copy(package_uri(demo.client, demo.client.get_model_version("demo", "1")))
    package.rename(package.with_name("aside"))
    said = refusal("demo/1", tmp_path / "out")
    package.with_name("aside").rename(package)
    assert said.startswith("demo/1: its package is gone or cannot be read: ")
    assert not any(tmp_path.iterdir())
