"""Registrations killed in every gap, and two at once: nothing is there twice, nothing is lost."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from registry_home import RegistryHome

from schemas.base import BadInput
from sdft.chain import first_break
from tasks import ledger as ledger_module
from tasks import registration
from tasks.aliases import alias_version, drift, reconcile
from tasks.ledger import Ledger
from tasks.proof import prove
from tasks.training import TrainedStage

pytestmark = [pytest.mark.slow, pytest.mark.faults]
LONG_S = 120

GAPS: dict[str, tuple[Any, str, int]] = {
    "before the registered model": (registration, "ensure_model", 1),
    "after the registered model": (registration, "find_version", 1),
    "before the logged model": (MlflowClient, "create_logged_model", 1),
    "after the logged model": (registration, "save_package", 1),
    "before the upload": (MlflowClient, "log_model_artifacts", 1),
    "amid the upload": (shutil, "copy2", 2),
    "before it is ready": (MlflowClient, "finalize_logged_model", 1),
    "before the version": (MlflowClient, "create_model_version", 1),
    "after the version": (registration, "package_of", 1),
    "before the manifests": (registration, "log_manifest", 1),
    "between the manifests": (registration, "log_manifest", 2),
    "after the manifests": (registration, "_write_down", 1),
    "before the ledger": (Ledger, "append", 1),
    "amid the ledger's transaction": (ledger_module, "_seal", 3),
    "after the ledger": (registration, "mirror", 1),
    "before the champion's alias": (MlflowClient, "set_registered_model_alias", 1),
    "before the candidate's alias": (MlflowClient, "set_registered_model_alias", 2),
    "before the head": (MlflowClient, "set_registered_model_tag", 1),
    "before the cursor": (Ledger, "advance", 1),
    "before the verdict's tag": (MlflowClient, "set_model_version_tag", 1),
    "after the verdict's tag": (registration, "say", 1),
}
"""The function that the kill comes just before, and in which of its calls."""
WRITTEN = tuple(GAPS).index("after the ledger")
"""From this gap on the ledger has all of it, before it nothing."""


@pytest.fixture(scope="module")
def processes() -> Any:
    """Processes with nothing of ours but the imports, which they take over ready made."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["registry_home"])
    with pytest.MonkeyPatch.context() as patch:  # the server looks nowhere else for what to load
        patch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
        multiprocessing.forkserver.ensure_running()
    return context


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home whose databases are there already; every test takes another name in it."""
    place = tmp_path_factory.mktemp("registration")
    RegistryHome(place).grow("first")
    return place


def register(folder: Path, stage: TrainedStage, name: str, parent: str | None) -> None:
    """Register a stage that passed."""
    RegistryHome(folder, name).register(stage, parent)


def register_and_die(
    folder: Path, stage: TrainedStage, name: str, parent: str | None, gap: str
) -> None:
    """Register a stage, with SIGKILL to oneself in a gap."""
    place = RegistryHome(folder, name)
    owner, function, turn = GAPS[gap]
    real: Callable[..., Any] = getattr(owner, function)
    calls = 0

    def cut(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == turn:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(owner, function, cut)
    place.register(stage, parent)


def register_together(
    folder: Path, stages: list[TrainedStage], shared: dict[str, str], gate: Barrier, meet: bool
) -> None:
    """Register stages, each at the same moment as another process registers it.

    With `meet`, each waits until both have seen that the version is not there; not for long, for
    the other one may be kept out until this one is through.
    """
    os.environ.update(shared)
    place = RegistryHome(folder, "twice")
    real = registration.find_version

    def see(*args: Any) -> Any:
        found = real(*args)
        with contextlib.suppress(threading.BrokenBarrierError):
            gate.wait(10)
        return found

    if meet:
        registration.find_version = see
    for stage in stages:
        if not meet:
            gate.wait(30)
        place.register(stage, None)


def run(processes: Any, target: Callable[..., None], *arguments: Any) -> int | None:
    child = processes.Process(target=target, args=arguments)
    child.start()
    child.join(LONG_S)
    return child.exitcode


def check(place: RegistryHome, name: str, skills: int) -> None:
    """One version a stage, each entry once, aliases as in the ledger, and all of it proven."""
    ledger = Ledger(place.home)
    entries = ledger.entries(name)
    assert [one.kind for one in entries] == ["registered", "verdict", "promoted"] * skills
    assert len(place.client.search_model_versions(f"name = '{name}'")) == skills
    newest = str(skills)
    for alias in ("candidate", "champion"):
        assert alias_version(place.client, name, alias) == newest == entries[-1].version
    assert drift(place.client, name, entries) == []
    assert first_break(ledger.entries()) is None
    assert prove(place.home, name).stages == skills
    assert reconcile(place.home, name) == []


@pytest.mark.parametrize("gap", GAPS)
def test_a_killed_registration_is_finished_by_the_next(
    processes: Any, folder: Path, gap: str
) -> None:
    name = _name("again", gap)
    place = RegistryHome(folder, name)
    stage = place.grow("skill")
    assert run(processes, register_and_die, folder, stage, name, None, gap) == -signal.SIGKILL
    written = [one.kind for one in Ledger(place.home).entries(name)]
    complete = tuple(GAPS).index(gap) >= WRITTEN
    assert written == (["registered", "verdict", "promoted"] if complete else []), "all or none"
    for _ in range(2):  # and once more changes nothing
        assert run(processes, register, folder, stage, name, None) == 0
        check(place, name, 1)


def test_a_stage_that_another_home_trained_to_other_weights_is_not_judged_as_its(
    tmp_path: Path,
) -> None:
    place = RegistryHome(tmp_path)
    stage = place.grow("skill")
    place.register(stage, None)
    before = Ledger(place.home).entries()
    other = stage.model_copy(update={"model": stage.model.model_copy(update={"model_hash": "f"})})
    with pytest.raises(BadInput, match=f"demo/1: was registered .* remove {stage.directory}, and"):
        place.register(other, None, "refuse")
    assert Ledger(place.home).entries() == before


@pytest.mark.parametrize("gap", GAPS)
def test_after_a_kill_reconcile_brings_the_aliases_to_the_ledger(
    processes: Any, folder: Path, gap: str
) -> None:
    """On a second stage, so that the champion's alias is somewhere already."""
    name = _name("settled", gap)
    place = RegistryHome(folder, name)
    first = place.grow("first")
    parent = place.register(first, None)
    second = place.grow("second", first)
    assert run(processes, register_and_die, folder, second, name, parent, gap) == -signal.SIGKILL
    said = reconcile(place.home, name)
    entries = Ledger(place.home).entries(name)
    assert drift(place.client, name, entries) == []
    assert [one.kind for one in entries[3:]] == (
        ["registered", "verdict", "promoted"] if tuple(GAPS).index(gap) >= WRITTEN else []
    )
    assert "by hand" not in " ".join(said), "a crash is not a move by hand"
    assert first_break(Ledger(place.home).entries()) is None
    assert prove(place.home, f"{name}/1").stages == 1, "what was there before is untouched"
    assert run(processes, register, folder, second, name, parent) == 0
    check(place, name, 2)


@pytest.mark.parametrize("gap", [gap for number, gap in enumerate(GAPS) if number >= WRITTEN])
def test_what_reconcile_has_settled_can_be_proven(processes: Any, folder: Path, gap: str) -> None:
    """The ledger has all of the registration: nothing else needs to run for the proof to hold."""
    name = _name("proven", gap)
    place = RegistryHome(folder, name)
    stage = place.grow("skill")
    assert run(processes, register_and_die, folder, stage, name, None, gap) == -signal.SIGKILL
    reconcile(place.home, name)
    check(place, name, 1)


@pytest.mark.parametrize("meet", [True, False], ids=["both see no version", "as it comes"])
@pytest.mark.parametrize("homes", [1, 2], ids=["one home", "two homes"])
def test_two_that_register_the_same_stage_at_once(
    processes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, homes: int, meet: bool
) -> None:
    """In one home, or in two that share registry and ledger, as two machines would."""
    shared = {
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/shared.db",
        "SDFT_LEDGER_URL": f"sqlite:///{tmp_path}/shared-ledger.db",
    }
    for variable, address in shared.items():
        monkeypatch.setenv(variable, address)
    folders = [tmp_path / str(number % homes) for number in range(2)]
    places = [RegistryHome(folder, "twice") for folder in folders]
    grown = [[place.grow(f"s{n}") for n in range(1 if meet else 8)] for place in places]
    assert [one.key for one in grown[0]] == [one.key for one in grown[1]], "the same stages"
    gate = processes.Barrier(2)
    both = [
        processes.Process(target=register_together, args=(folder, stages, shared, gate, meet))
        for folder, stages in zip(folders, grown, strict=True)
    ]
    for one in both:
        one.start()
    for one in both:
        one.join(LONG_S)
        one.kill()
    assert [one.exitcode for one in both] == [0, 0]
    [place, _] = places
    entries = Ledger(place.home).entries("twice")
    registered = [one for one in entries if one.kind == "registered"]
    assert [one.stage_key for one in registered] == [one.key for one in grown[0]], "once a stage"
    assert len(place.client.search_model_versions("name = 'twice'")) == len(grown[0])
    assert drift(place.client, "twice", entries) == []
    assert first_break(Ledger(place.home).entries()) is None
    for one in registered:
        assert prove(place.home, f"twice/{one.version}").stages == 1


def _name(what: str, gap: str) -> str:
    return f"{what}-{gap}".replace("'", "").replace(" ", "-")
