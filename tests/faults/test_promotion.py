"""Promotion and rollback on a real registry: races, pauses, crashes, repetitions, drift."""

import signal
from pathlib import Path

import pytest
from mlflow import MlflowClient
from racer import GAPS, SPAWN, check_a_pause, check_a_race, promote_and_signal
from registry_home import RegistryHome, make_verdict

from schemas.base import BadInput
from schemas.ledger import Draft
from tasks import promotion
from tasks.aliases import alias_version, drift, mirror, reconcile
from tasks.ledger import Ledger
from tasks.packages import Manifest, Registered
from tasks.promotion import promote, rollback
from tasks.proof import prove
from tasks.publishing import is_let_in

pytestmark = [pytest.mark.slow, pytest.mark.faults]


@pytest.fixture
def demo(tmp_path: Path) -> RegistryHome:
    """Three versions, the third of them champion."""
    place = RegistryHome(tmp_path)
    assert place.line(["a", "b", "c"]) == ["1", "2", "3"]
    return place


def aliases(demo: RegistryHome) -> tuple[str | None, str | None]:
    return tuple(alias_version(demo.client, "demo", one) for one in ("candidate", "champion"))


def kinds(demo: RegistryHome) -> list[str]:
    return [one.kind for one in Ledger(demo.home).entries("demo")]


def test_a_stage_that_passes_is_champion_and_the_ledger_says_why(demo: RegistryHome) -> None:
    assert aliases(demo) == ("3", "3")
    assert kinds(demo) == ["registered", "verdict", "promoted"] * 3
    entry = Ledger(demo.home).entries("demo")[-1]
    assert (entry.version, entry.expected, entry.epoch, entry.decision) == ("3", "2", 3, "pass")


def test_registering_again_writes_nothing(demo: RegistryHome) -> None:
    before = Ledger(demo.home).entries()
    assert demo.line(["a", "b", "c"]) == ["1", "2", "3"]
    assert Ledger(demo.home).entries() == before


def test_refused_and_undecided_stages_do_not_serve(demo: RegistryHome) -> None:
    refused = demo.register(demo.grow("bad"), None, "refuse")
    undecided = demo.register(demo.grow("unsure"), None, "ask")
    assert aliases(demo) == (undecided, "3")
    assert kinds(demo)[9:] == ["registered", "verdict", "refused", "registered", "verdict"]
    for version in (refused, undecided):
        with pytest.raises(BadInput, match="give the reason with --override"):
            promote(demo.home, "demo", version)
    entry = promote(demo.home, "demo", undecided, override="looked at by hand")
    assert (entry.kind, entry.decision) == ("promoted", "ask")
    assert kinds(demo)[-2:] == ["overridden", "promoted"]
    assert Ledger(demo.home).entries("demo")[-2].reason == "looked at by hand"


def test_a_candidate_that_knows_less_waits_for_a_person(demo: RegistryHome) -> None:
    """A curriculum begun anew must not put a one-skill model in the place of a three-skill one."""
    fewer = demo.register(demo.grow("z"), None)
    assert aliases(demo) == (fewer, "3")
    assert promote(demo.home, "demo", fewer).version == fewer
    assert aliases(demo) == (fewer, fewer)


def test_rollback_goes_back_one_by_one_and_can_be_repeated(demo: RegistryHome) -> None:
    assert rollback(demo.home, "demo", expect="3").version == "2"
    again = rollback(demo.home, "demo", expect="3")
    assert again.version == "2", "the same request twice is one rollback"
    assert kinds(demo).count("rolled back") == 1
    assert rollback(demo.home, "demo").version == "1"
    assert aliases(demo) == ("3", "1")
    with pytest.raises(BadInput, match="no earlier champion"):
        rollback(demo.home, "demo")
    assert promote(demo.home, "demo", "3").version == "3"
    assert rollback(demo.home, "demo", to="2").version == "2"


def test_wrong_requests_are_refused_in_words(demo: RegistryHome) -> None:
    for wrong, message in [
        (lambda: promote(demo.home, "demo", "9"), "demo/9: is no version in the ledger"),
        (lambda: promote(demo.home, "nobody", "1"), "nobody: is not in the ledger of"),
        (lambda: rollback(demo.home, "nobody"), "nobody: is not in the ledger of"),
        (lambda: promote(demo.home, "demo", "2", expect="1"), "version 3, not 1 as expected"),
        (lambda: rollback(demo.home, "demo", expect="2"), "version 3, not 2 as expected"),
        (lambda: rollback(demo.home, "demo", to="9"), "was never champion"),
        (lambda: rollback(demo.home, "demo", to="3"), "is the champion already"),
    ]:
        with pytest.raises(BadInput, match=message):
            wrong()
    assert kinds(demo) == ["registered", "verdict", "promoted"] * 3


def test_a_version_whose_files_changed_is_not_let_in(demo: RegistryHome) -> None:
    [weights] = [
        path
        for path in demo.home.artifacts.rglob("model.safetensors")
        if demo.client.get_model_version("demo", "2").source.removeprefix("file://") in str(path)
    ]
    weights.write_text("other weights")
    with pytest.raises(BadInput, match=r"demo/2: .*model\.safetensors is not as it was registered"):
        rollback(demo.home, "demo")
    assert aliases(demo) == ("3", "3")


def test_a_deleted_version_holds_up_nothing_else(demo: RegistryHome) -> None:
    refused = demo.register(demo.grow("bad"), None, "refuse")
    demo.client.delete_model_version("demo", refused)
    assert rollback(demo.home, "demo").version == "2"
    assert aliases(demo)[1] == "2"
    assert reconcile(demo.home, "demo") == [f"demo/{refused}: is gone from the registry"]
    with pytest.raises(BadInput, match=f"demo/{refused}: is gone from the registry"):
        promote(demo.home, "demo", refused, override="why not")


def test_a_registry_of_another_ledger_is_left_alone(
    demo: RegistryHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two homes on one registry need one ledger; without it neither may move the other's."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", demo.home.tracking_uri)
    other = RegistryHome(tmp_path / "other")
    stage = other.grow("z")
    with pytest.raises(BadInput, match="belongs to another ledger"):
        other.register(stage, None)
    assert aliases(demo) == ("3", "3")
    assert len(demo.client.search_model_versions("name = 'demo'")) == 3
    assert Ledger(other.home).entries() == []
    for name in ("demo", "nobody"):
        with pytest.raises(BadInput, match="SDFT_LEDGER_URL|is not in the ledger"):
            reconcile(other.home, name)


def test_a_refusal_that_comes_while_a_promotion_checks_is_not_passed_over(
    demo: RegistryHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = promotion.check_package

    def meanwhile(registered: Registered) -> Manifest:
        refused = Draft(kind="verdict", name="demo", version="2", decision="refuse")
        Ledger(demo.home).append([refused.model_copy(update={"verdict_hash": "f" * 64})])
        return real(registered)

    monkeypatch.setattr(promotion, "check_package", meanwhile)
    with pytest.raises(BadInput, match="demo/2: was judged anew meanwhile"):
        promote(demo.home, "demo", "2")
    assert kinds(demo)[-1] == "verdict"


def test_a_new_verdict_moves_no_champion(demo: RegistryHome) -> None:
    """Neither back to what was rolled back, nor to files that were altered since."""
    rollback(demo.home, "demo")
    last = demo.grow("c", demo.grow("b", demo.grow("a")))
    verdict = make_verdict(last, "pass", note="-judged-anew")
    demo.register_judged(last, verdict, "2")
    assert kinds(demo)[-2:] == ["rolled back", "verdict"]
    assert aliases(demo) == ("3", "2")


def test_the_next_stage_may_start_from_what_a_person_let_in(demo: RegistryHome) -> None:
    stage = demo.grow("unsure")
    verdict = make_verdict(stage, "ask")
    version = demo.register_judged(stage, verdict, None)
    assert not is_let_in(demo.home, "demo", stage.key, verdict)
    promote(demo.home, "demo", version, override="looked at by hand")
    assert is_let_in(demo.home, "demo", stage.key, verdict)
    stricter = make_verdict(stage, "ask", note="-judged-anew")
    assert not is_let_in(demo.home, "demo", stage.key, stricter), "not in the ledger yet"
    assert demo.register_judged(stage, stricter, None) == version
    assert not is_let_in(demo.home, "demo", stage.key, stricter)


def test_an_alias_moved_by_hand_is_drift_and_put_back(demo: RegistryHome) -> None:
    demo.client.set_registered_model_alias("demo", "champion", "1")
    entries = Ledger(demo.home).entries("demo")
    said = "demo: the alias champion is on version 1, the ledger says 3"
    assert drift(demo.client, "demo", entries) == [said]
    assert reconcile(demo.home, "demo") == [f"{said}: changed by hand, put back"]
    assert aliases(demo) == ("3", "3")
    assert kinds(demo)[-1] == "repaired"
    assert reconcile(demo.home, "demo") == []


def test_a_verdict_tag_changed_by_hand_is_drift_and_put_back(demo: RegistryHome) -> None:
    refused = demo.register(demo.grow("bad"), None, "refuse")
    demo.client.set_model_version_tag("demo", refused, "sdft.verdict", "pass")
    said = f"demo/{refused}: tag sdft.verdict is pass, the ledger says refuse"
    assert reconcile(demo.home, "demo") == [f"{said}: changed by hand, put back"]
    assert demo.client.get_model_version("demo", refused).tags["sdft.verdict"] == "refuse"
    assert kinds(demo)[-1] == "repaired"
    assert prove(demo.home, f"demo/{refused}").stages == 1
    assert reconcile(demo.home, "demo") == []


@pytest.mark.parametrize("gap", GAPS)
def test_a_promotion_killed_in_any_gap_is_finished_or_undone(demo: RegistryHome, gap: str) -> None:
    child = SPAWN.Process(
        target=promote_and_signal, args=(demo.home.root, "demo", "1", gap, signal.SIGKILL)
    )
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    champion = Ledger(demo.home).champion("demo").version
    assert champion == ("3" if gap == "before the ledger" else "1")
    reconcile(demo.home, "demo")
    assert aliases(demo) == ("3", champion)
    assert "repaired" not in kinds(demo), "a crash is not a move by hand"
    assert promote(demo.home, "demo", "1").version == "1", "the same command goes on"
    assert kinds(demo).count("promoted") == 4


@pytest.mark.parametrize(
    "gap", ["before the ledger", "between ledger and alias", "before an alias is set"]
)
def test_a_paused_promoter_does_no_harm_when_it_wakes(demo: RegistryHome, gap: str) -> None:
    check_a_pause(demo, gap)


def test_racing_promoters_make_exactly_one_champion_a_round(tmp_path: Path) -> None:
    check_a_race(RegistryHome(tmp_path), after_round=lambda: None)


def test_a_paused_mirror_leaves_no_older_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = RegistryHome(tmp_path)
    stage = place.grow("s")
    place.register(stage, None, "refuse")
    real = MlflowClient.set_model_version_tag

    def late(client: MlflowClient, *arguments: str) -> None:
        monkeypatch.setattr(MlflowClient, "set_model_version_tag", real)
        place.register(stage, None, "pass")  # another process's, while this one is paused
        real(client, *arguments)

    monkeypatch.setattr(MlflowClient, "set_model_version_tag", late)
    Ledger(place.home).append(
        [Draft(kind="verdict", name="demo", version="1", decision="ask", verdict_hash="0" * 64)]
    )
    mirror(place.home, "demo")
    assert place.client.get_model_version("demo", "1").tags["sdft.verdict"] == "pass"
