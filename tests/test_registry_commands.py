"""The commands of release owners and auditors, as they are typed: output, exit codes, documents."""

import json
from pathlib import Path

import pytest
from registry_home import RegistryHome
from typer.testing import CliRunner, Result

from flows import cli
from schemas.base import BadInput

pytestmark = pytest.mark.slow


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RegistryHome:
    """Two versions, the second champion; commands find it by SDFT_HOME."""
    place = RegistryHome(tmp_path)
    place.line(["a", "b"])
    monkeypatch.setenv("SDFT_HOME", str(place.home.root))
    monkeypatch.setenv("COLUMNS", "160")
    return place


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, arguments)


def said(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_promote_rollback_and_ledger(demo: RegistryHome) -> None:
    assert "champion: models:/demo/1, ledger entry 7 by" in said("rollback", "demo")
    assert "champion: models:/demo/2" in said("promote", "demo", "2", "--expect", "1")
    assert "ledger entry 8" in said("promote", "demo", "2"), "asked again, nothing new"
    table = said("ledger", "demo")
    assert ["rolled back" in table, "promoted" in table, "verdict pass" in table] == [True] * 3
    entries = json.loads(said("ledger", "demo", "--json"))
    assert [one["kind"] for one in entries][-2:] == ["rolled back", "promoted"]
    assert "registry and ledger agree" in said("reconcile")


def test_wrong_requests_raise_what_the_command_line_prints(demo: RegistryHome) -> None:
    for arguments, message in [
        (("promote", "demo", "7"), "demo/7: is no version in the ledger"),
        (("promote", "demo", "1", "--expect", "1"), "not 1 as expected"),
        (("ledger", "nobody"), "nobody: is not in the ledger"),
        (("lineage", "demo@latest"), "the aliases are champion and candidate"),
        (("lineage", "demo", "--as", "openlineage"), "needs --out"),
        (("lineage", "demo", "--out", "tree.txt"), "--out needs --as"),
        (("lineage", "demo", "--as", "json", "--out", "/nowhere/x"), "/nowhere/x: cannot be"),
        (("reconcile", "nobody"), "nobody: is not in the ledger"),
        (("trace", "xyz"), "neither a skill that was learned nor"),
        (("diff", "demo/1", "demo/9"), "demo/9: is not in the ledger"),
        (("replay", "demo", "--without", "a"), "no curriculum named 'demo'"),
    ]:
        error = run(*arguments).exception
        assert isinstance(error, BadInput), arguments
        assert message in str(error)


def test_lineage_in_every_form(demo: RegistryHome, tmp_path: Path) -> None:
    tree = said("lineage", "demo", "--verify")
    for fact in ("demo/2 (champion, candidate)", "1 a", "2 b", "3 rows", "promoted", "proven: 2"):
        assert fact in tree
    story = json.loads(said("lineage", "demo/2", "--as", "json", "--verify"))
    assert [stage["skill"] for stage in story["stages"]] == ["a", "b"]
    bom = json.loads(said("lineage", "demo", "--as", "cyclonedx"))
    assert bom["bomFormat"] == "CycloneDX"
    page = tmp_path / "page.html"
    said("lineage", "demo", "--as", "page", "--out", str(page))
    assert story["stages"][1]["model_hash"] in page.read_text()
    events = tmp_path / "events.jsonl"
    assert "4 events" in said("lineage", "demo", "--as", "openlineage", "--out", str(events))
    assert len(events.read_text().splitlines()) == 4


def test_trace_and_diff(demo: RegistryHome) -> None:
    assert [one["version"] for one in json.loads(said("trace", "a", "--json"))] == ["1", "2"]
    assert "learned by version 2" in said("trace", "b")
    assert "no version holds" in said("trace", "0" * 16)
    assert "+ skill b" in said("diff", "demo/1", "demo")


def test_a_lie_is_exit_code_4_and_named(demo: RegistryHome) -> None:
    weights = next((demo.home.stages).glob("*/model/model.safetensors"))
    weights.write_text("other weights")
    result = run("lineage", "demo", "--verify")
    assert result.exit_code == 4
    assert str(weights.parent) in result.output.replace("\n", "")
