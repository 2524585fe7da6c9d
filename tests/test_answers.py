"""`sdft answers`: what a version answered to a suite, shown to people and to programs."""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from registry_home import RegistryHome, make_verdict
from typer.testing import CliRunner, Result

from flows import cli
from schemas.base import BadInput
from schemas.data import ITEM_SCHEMA
from schemas.digest import digest_file, digest_json
from schemas.results import CellEvidence, EvaluationSpec, SuiteJudgement, SuiteSpec
from schemas.settings import EvaluationSettings
from sdft.cells import cell_of
from sdft.data import Row, data_hash, eval_table, write_table
from tasks.artifacts import run_file
from tasks.evaluation import ScoredCell, log_scores
from tasks.training import TrainedStage

pytestmark = pytest.mark.slow

LONG = [{"role": "user", "content": f"turn {n}"} for n in range(4)]
LONG += [{"role": "user", "content": f"begin {'long ' * 400}end"}]
HOSTILE = "[red]Red?[/red] \x1b[2J\x9b2J \u202e"
ITEMS: list[Row] = [
    {"id": "one", "prompt": "What is blue?", "references": ["the sky", "the sea"]},
    {"id": "two", "prompt": HOSTILE, "references": ["[bold]"]},
    {"id": "three", "prompt": LONG, "references": ["end"]},
    {"id": "four", "prompt": "Too long", "references": ["x"]},
]
SAID = ("the sky", "\x1b]0;title\x07[/nothing]", "no", None)
BEFORE = ("grass", "[bold]", "no", None)
FOLDER = "evaluation/a"


def scored(stage: TrainedStage, items: list[Row], said: tuple[str | None, ...]) -> ScoredCell:
    """A stage's cell on suite a, as an evaluation leaves it; None was not asked."""
    folder = (
        Path(stage.directory).parent.parent
        / "scored"
        / f"{len(items)}-{digest_json(list(said))[:8]}"
    )
    folder.mkdir(parents=True, exist_ok=True)
    rows = eval_table(items)
    write_table(rows, folder / "rows.parquet")
    results = [
        {"id": one["id"], "status": "invalid", "error": "the prompt has 900 tokens"}
        if text is None
        else {
            "id": one["id"],
            "status": "scored",
            "completion": text,
            "score": float(text in one["references"]),
        }
        for one, text in zip(items, said, strict=True)
    ]
    write_table(pa.Table.from_pylist(results, schema=ITEM_SCHEMA), folder / "items.parquet")
    suite = SuiteSpec(name="a", file="", suite_hash=data_hash(rows), scorer="exact_match")
    spec = EvaluationSpec(
        model_dir="",
        model_hash=stage.model.model_hash,
        template_hash="t",
        suites=(),
        settings=EvaluationSettings(),
        libraries={},
    )
    cell = cell_of(spec, suite, results, digest_file(folder / "items.parquet"), 1.0)
    return ScoredCell(
        cell=cell,
        items_file=str(folder / "items.parquet"),
        suite_file=str(folder / "rows.parquet"),
    )


def judged(now: ScoredCell, before: ScoredCell) -> SuiteJudgement:
    after, reference = (
        CellEvidence.model_validate(one.cell.model_dump(include={*CellEvidence.model_fields}))
        for one in (now, before)
    )
    return SuiteJudgement.model_validate(
        dict.fromkeys(SuiteJudgement.model_fields)
        | {"suite": "a", "role": "new skill", "decision": "refuse", "reason": "lost", "limit": 0.1}
        | {"reference_stage": 0, "settings": {}, "pairs": now.cell.items}
        | {"candidate_cell": after, "reference_cell": reference}
    )


def refused(place: RegistryHome) -> None:
    """A stage that the gate refused, registered with its answers and those of the base model."""
    stage = place.grow("a")
    now, before = scored(stage, ITEMS, SAID), scored(stage, ITEMS, BEFORE)
    log_scores(place.client, stage.run_id, {"a": now, "later": now})
    verdict = make_verdict(stage, "refuse").model_copy(
        update={"judgements": (judged(now, before),)}
    )
    place.register_judged(stage, verdict, None, {"a": before.items_file})


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryHome]:
    """One version, refused, with answers on two suites; commands find it by SDFT_HOME."""
    place = RegistryHome(tmp_path_factory.mktemp("answers"))
    refused(place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDFT_HOME", str(place.home.root))
        patch.setenv("COLUMNS", "80")
        yield place


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["answers", *arguments])


def kept(place: RegistryHome, path: str) -> Path:
    run_id = place.client.get_model_version("demo", "1").run_id
    return run_file(place.client.get_run(run_id), path)


def refusal(*arguments: str) -> str:
    error = run(*arguments).exception
    assert isinstance(error, BadInput), arguments
    return str(error)


def test_answers_stand_below_what_was_asked_and_beside_those_of_before(demo: RegistryHome) -> None:
    result = run("demo@candidate", "a")
    assert result.exit_code == 0, result.output
    first = result.output.partition("wrong, base was right  two\n")[0]
    asked = "right, base was wrong one user What is blue? expected the sky the sea"
    assert " ".join(first.split()) == f"{asked} answered the sky base grass"
    assert "invalid" in result.output and "the prompt has 900 tokens" in result.output
    assert result.output.endswith("demo/1 on a: 3 of 4 wrong; base, which it was held against: 3\n")


def test_a_long_chat_is_cut_where_it_says_so_and_fits_the_terminal(demo: RegistryHome) -> None:
    lines = run("demo/1", "a").output.splitlines()
    assert max(map(len, lines)) <= 80
    text = "".join(lines)
    assert "[2 earlier messages]" in text
    assert "turn 1" not in text and "turn 2" in text and "begin long" in text
    assert "[1409 characters]" in " ".join(text.split())


def test_what_a_model_says_does_nothing_to_the_terminal(demo: RegistryHome) -> None:
    output = run("demo/1", "a").output
    assert not set("\x1b\x07\x9b\u202e") & set(output)
    for shown in (r"[red]Red?[/red] \u001b[2J\u009b2J \u202e", r"\u001b]0;title\u0007[/nothing]"):
        assert shown in output


def test_only_the_wrong_ones(demo: RegistryHome) -> None:
    output = run("demo/1", "a", "--wrong").output
    assert "What is blue?" not in output and "Too long" in output
    assert "3 of 4 wrong" in output
    found = json.loads(run("demo/1", "a", "--wrong", "--json").output)
    assert [one["id"] for one in found["answers"]] == ["two", "three", "four"]
    assert (found["items"], found["wrong"], found["reference_wrong"]) == (4, 3, 3)


def test_the_document_has_all_of_every_text(demo: RegistryHome) -> None:
    found = json.loads(run("demo/1", "a", "--json").output)
    one, two, three, four = found["answers"]
    assert (two["prompt"], two["answer"]) == ([{"role": "user", "content": HOSTILE}], SAID[1])
    assert (two["right"], two["reference_answer"], two["reference_right"]) == (
        False,
        "[bold]",
        True,
    )
    assert (one["right"], one["reference_right"], three["prompt"]) == (True, False, LONG)
    assert (four["status"], four["answer"], four["right"]) == ("invalid", None, False)
    assert found["reference_stage"] == 0
    later = json.loads(run("demo/1", "later", "--json").output)
    assert later["reference_stage"] is None, "the gate did not judge it"
    assert later["answers"][0]["reference_answer"] is None


def test_wrong_requests_name_what_there_is(demo: RegistryHome) -> None:
    assert refusal("demo", "a") == "demo: has no champion"
    assert "nobody: is not in the ledger" in refusal("nobody", "a")
    assert "demo/7: is not in the ledger" in refusal("demo/7", "a")
    assert refusal("demo/1", "b") == "demo/1: was not scored on 'b', only on a, later"


@pytest.mark.parametrize(
    ("file", "why"),
    [
        (f"{FOLDER}/rows.parquet", "not the items that were answered"),
        (f"{FOLDER}/items.parquet", "not what the verdict was given on"),
        ("references/a/items.parquet", "not what the verdict was given on"),
    ],
)
def test_what_is_not_as_it_was_is_not_shown(demo: RegistryHome, file: str, why: str) -> None:
    place = kept(demo, file)
    honest = place.read_bytes()
    table = eval_table(ITEMS[:3]) if place.name == "rows.parquet" else pa.table({"id": ["one"]})
    write_table(table, place)
    said = refusal("demo/1", "a")
    assert said.startswith(f"demo/1: {file} of its run ") and why in said
    place.unlink()
    assert f"demo/1: {file} of its run " in refusal("demo/1", "a")
    place.write_bytes(honest)


def test_items_that_changed_are_asked_and_kept_anew(demo: RegistryHome) -> None:
    """Though the stage and its run are those of before."""
    run_id = demo.client.get_model_version("demo", "1").run_id
    stage = demo.grow("a")
    assert stage.run_id == run_id
    changed = [*ITEMS[:3], ITEMS[3] | {"references": ["y"]}]
    log_scores(demo.client, run_id, {"later": scored(stage, changed, ("the sea", "", "no", "y"))})
    last = json.loads(run("demo/1", "later", "--json").output)["answers"][3]
    assert (last["references"], last["right"]) == (["y"], True)


def test_answers_of_a_run_that_was_killed_between_items_and_answers(demo: RegistryHome) -> None:
    run_id = demo.client.get_model_version("demo", "1").run_id
    newer = scored(demo.grow("a"), ITEMS[1:], SAID[1:])
    demo.client.log_artifact(run_id, newer.suite_file, "evaluation/later")
    demo.client.set_tag(run_id, "sdft.suite.later", newer.cell.suite_hash)
    assert "on later are to other items than lie beside them" in refusal("demo/1", "later")
    log_scores(demo.client, run_id, {"later": newer})
    assert json.loads(run("demo/1", "later", "--json").output)["items"] == 3


def test_a_run_from_before_items_were_kept_gets_them_when_it_is_learned_again(
    demo: RegistryHome,
) -> None:
    run_id = demo.client.get_model_version("demo", "1").run_id
    demo.client.delete_tag(run_id, "sdft.suite.a")
    kept(demo, f"{FOLDER}/rows.parquet").unlink()
    assert "its run does not keep the items of a; sdft learn, run again" in refusal("demo/1", "a")
    log_scores(demo.client, run_id, {"a": scored(demo.grow("a"), ITEMS, SAID)})
    assert run("demo/1", "a").exit_code == 0
