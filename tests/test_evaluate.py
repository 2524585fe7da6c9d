"""The evaluator: what becomes of every item, and a cell that its items are bound to."""

from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from schemas.base import BadInput
from schemas.digest import digest_file
from schemas.results import CellFile, EvaluationSpec, SuiteSpec
from schemas.settings import EvaluationSettings
from sdft.data import Item, eval_table, write_table
from sdft.drawing import Sampling
from sdft.evaluate import answer_items, evaluate
from sdft.model import LanguageModel, load_model
from sdft.process import Stop
from sdft.rollout import generate


@pytest.fixture
def lm(tiny_dir: Path) -> LanguageModel:
    return load_model(tiny_dir, torch.device("cpu"))


def spec(tiny_dir: Path, file: Path, scorer: str = "contains") -> EvaluationSpec:
    return EvaluationSpec(
        model_dir=str(tiny_dir),
        model_hash="m",
        template_hash="t",
        suites=(SuiteSpec(name="s", file=str(file), suite_hash="h", scorer=scorer),),
        settings=EvaluationSettings(max_new_tokens=4, batch_size=2),
        libraries={},
    )


def item(name: str, prompt: str, references: list[str]) -> Item:
    return Item(id=name, messages=[{"role": "user", "content": prompt}], references=references)


def test_a_wrong_answer_and_an_item_that_cannot_be_asked_are_two_things(
    lm: LanguageModel, tiny_dir: Path
) -> None:
    items = [
        item("wrong", "Say 1", ["never said"]),
        item("long", "x" * 400, ["1"]),
        item("bad", "Say 2", ["("]),
        item("none", "Say 3", []),
        item("right", "Say 4", ["^"]),
    ]
    run = spec(tiny_dir, Path("unused"), "regex")
    results = answer_items(lm, items, run.suites[0], run, Stop())
    assert results is not None
    found = {str(one["id"]): (one["status"], one.get("score")) for one in results}
    assert found == {
        "wrong": ("scored", 0.0),
        "long": ("invalid", None),
        "bad": ("invalid", None),
        "none": ("invalid", None),
        "right": ("scored", 1.0),
    }
    assert "tokens, only" in str(results[1]["error"])
    assert "regular expression" in str(results[2]["error"])


def test_an_output_that_is_not_finite_is_an_error_of_that_item_alone(
    lm: LanguageModel, tiny_dir: Path
) -> None:
    """One token's embedding is NaN: only the prompt that holds it is lost."""
    prompts = [lm.tokenizer.encode(text, add_special_tokens=False) for text in ("ab", "Qb", "cd")]
    sound = generate(lm, prompts, Sampling(4))
    assert all(answer.finite for answer in sound)
    with torch.no_grad():
        lm.model.config.tie_word_embeddings = False
        head = lm.model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.clone())
        lm.model.get_input_embeddings().weight[prompts[1][0]] = torch.nan
    broken = generate(lm, prompts, Sampling(4))
    assert [answer.finite for answer in broken] == [True, False, True]
    assert (broken[0], broken[2]) == (sound[0], sound[2])

    run = spec(tiny_dir, Path("unused"))
    items = [item("a", "b", ["1"]), item("q", "Q", ["1"])]
    results = answer_items(lm, items, run.suites[0], run, Stop())
    assert results is not None
    assert [one["status"] for one in results] == ["scored", "error"]
    assert results[1]["error"] == "the model's output was not finite"


def test_a_cell_counts_every_item_and_binds_its_items(tiny_dir: Path, tmp_path: Path) -> None:
    from tasks.gating import read_item_results
    from tasks.home import Home

    rows = [
        {"id": "1", "prompt": "Say 1", "references": ["never said"]},
        {"id": "2", "prompt": "x" * 400, "references": ["1"]},
        {"id": "3", "prompt": "Say 3", "references": ["never said"]},
    ]
    write_table(eval_table(rows), tmp_path / "items.parquet")
    home = Home(tmp_path / "home")
    run = spec(tiny_dir, tmp_path / "items.parquet")
    assert evaluate(run, home.cells, Stop())
    [folder] = home.cells.iterdir()
    cell = CellFile.read(folder / "cell.json").cell
    assert folder.name == cell.key == run.cell_key(run.suites[0])
    assert (cell.items, cell.scored, cell.errors, cell.invalid, cell.unrun) == (3, 2, 0, 1, 0)
    assert cell.score == 0.0
    assert cell.items_sha256 == digest_file(folder / "items.parquet")
    statuses = pq.read_table(folder / "items.parquet")["status"].to_pylist()
    assert Counter(statuses) == {"scored": 2, "invalid": 1}
    assert [one.score for one in read_item_results(home, cell)] == [0.0, None, 0.0]

    with (folder / "items.parquet").open("ab") as file:
        file.write(b"x")
    with pytest.raises(BadInput, match=r"not what cell\.json lists; delete"):
        read_item_results(home, cell)
