"""What a home is known by, and what half-written directories in it are known by."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from schemas.results import EvaluationSpec, SuiteSpec
from schemas.settings import EvaluationSettings
from sdft import files
from sdft.files import OLD_S, is_orphan, partial_name, placed
from tasks import evaluation
from tasks.home import Home


def test_a_home_is_the_same_on_every_machine_and_a_copy_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is for the pods of a cluster, each of which has a name of its own."""
    (tmp_path / "one").mkdir()
    key = Home(tmp_path / "one").lease_key
    monkeypatch.setattr(platform, "node", lambda: "another-pod")
    assert Home(tmp_path / "one").lease_key == key
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "other").mkdir()
    assert len({key, Home(tmp_path / "two").lease_key, Home(tmp_path / "other").lease_key}) == 3
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["identity"]


def test_a_half_written_directory_of_the_dead_is_an_orphan_and_one_of_another_machine_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    dead = tmp_path / f"{partial_name()}x".replace(f"-{os.getpid()}-", f"-{process.pid}-")
    mine = tmp_path / f"{partial_name()}x"
    for path in (dead, mine):
        path.mkdir()
    assert is_orphan(dead)
    assert not is_orphan(mine)
    monkeypatch.setattr(files, "machine", lambda: "another boot")
    assert not is_orphan(dead), "its process may live there"
    os.utime(dead, (0, dead.stat().st_mtime - OLD_S - 1))
    assert is_orphan(dead)


def test_a_directory_that_another_process_puts_there_meanwhile_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, real = tmp_path / "target", shutil.rmtree
    raced: list[Path] = []

    def rmtree(path: Path, **options: bool) -> None:
        real(path, **options)
        if path == target and not raced:
            target.mkdir()
            (target / "theirs").touch()
            raced.append(target)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    with placed(target) as partial:
        (partial / "ours").touch()
    assert raced
    assert [path.name for path in target.iterdir()] == ["ours"]


def test_two_evaluations_of_a_model_do_not_share_a_folder(tmp_path: Path) -> None:
    """Two runs with one base model may have one worker score it on suites of their own."""
    folders = {
        evaluation._work(Home(tmp_path), spec)
        for spec in (
            EvaluationSpec(
                model_dir="",
                model_hash="0" * 64,
                template_hash="t",
                suites=(SuiteSpec(name="a", file="", suite_hash=suite, scorer="contains"),),
                settings=EvaluationSettings(),
                libraries={},
            )
            for suite in ("1" * 64, "2" * 64)
        )
    }
    assert len(folders) == 2
