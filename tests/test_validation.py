"""Validation of rows and models: everything that is wrong is named, and nothing is half-written."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import eval_rows, save_tiny_model, train_rows, write_jsonl

from schemas.base import BadInput
from schemas.curriculum import Curriculum, DataSource
from schemas.expectations import Expectation, train_suite
from schemas.snapshot import Snapshot, SuiteData
from sdft.data import Row
from sdft.sources import read_rows
from tasks import validation
from tasks.basemodel import ModelDir, describe_model, resolve_base_model
from tasks.home import Home
from tasks.validation import Checker, validate_data


def check(
    folder: Path,
    model_dir: Path,
    train: list[dict],
    items: list[dict] | None = None,
    **changes: object,
) -> SuiteData:
    skill = {
        "name": "alpha",
        "train": str(write_jsonl(folder / "train.jsonl", train)),
        "eval": str(write_jsonl(folder / "eval.jsonl", items or eval_rows(4))),
        "training": {"max_new_tokens": 60},
    }
    for key in ("scorer", "allow_overlap", "training"):
        if key in changes:
            skill[key] = changes.pop(key)
    content = {
        "name": "demo",
        "base_model": str(model_dir),
        "skills": [skill],
        "evaluation": {"max_new_tokens": 60},
    }
    curriculum = Curriculum.model_validate(content | changes)
    checker = Checker(curriculum, describe_model(model_dir), Home(folder / "home"))
    [skill] = curriculum.skills
    return SuiteData(eval=checker.check_eval(skill), train=checker.check_train(skill))


def altered(**change: object) -> list[dict]:
    rows = train_rows(6)
    rows[2] |= change
    return rows


BAD_TRAIN = {
    "null prompt": (altered(prompt=None), r"prompt is a text, or messages .*: not so in row 3"),
    "blank response": (altered(response=" \n"), "response is not blank: not so in row 3"),
    "null response": (altered(response=None), "response is a text and not null: not so in row 3"),
    "duplicate id": (altered(id="alpha-0"), "id is unique.*: not so in row 1, 3"),
    "long prompt": (altered(prompt="x" * 300), r"the prompt fits \(at most 196 tokens\).*row 3"),
    "long response": (altered(response="x" * 80), r"the response fits.*row 3"),
    "odd context": (altered(context=3), "context is a text or null: not so in row 3"),
    "asked in eval": (
        altered(prompt="Please say  alpha 1"),
        r"the prompt is in no evaluation suite \(a skill's own may have it: allow_overlap\).*row 3",
    ),
    "assistant last": (
        [
            {"id": "a", "prompt": [{"role": "assistant", "content": "x"}], "response": "y"},
            {"id": "b", "prompt": [{"role": "user", "content": "x"}], "response": "y"},
        ],
        "roles are .*: not so in row 1",
    ),
    "messages in a field": (
        altered(prompt=str([{"role": "user", "content": "x"}])),
        r"holds chat messages \(JSONL and .*: not so in row 3",
    ),
    "messages in parts": (
        altered(prompt=[{"role": "user", "content": [{"type": "text", "text": "x"}]}]),
        r"prompt is a text, or messages .*: not so in row 3",
    ),
    "three roles in one": (
        altered(prompt=[{"role": "user>assistant>user", "content": "x"}]),
        "roles are .*: not so in row 3",
    ),
}


@pytest.mark.parametrize("name", BAD_TRAIN)
def test_bad_rows_are_named_with_row_and_rule(name: str, tiny_dir: Path, tmp_path: Path) -> None:
    rows, message = BAD_TRAIN[name]
    with pytest.raises(BadInput, match=message) as error:
        check(tmp_path, tiny_dir, rows)
    assert str(tmp_path / "train.jsonl") in str(error.value)
    refused = list((tmp_path / "home" / "data").glob("refused-*"))
    assert len(refused) == 1
    assert (refused[0] / "docs.html").read_text().startswith("<!DOCTYPE html>")
    quarantine = pq.read_table(refused[0] / "quarantine.parquet").to_pylist()
    assert all(row["reasons"] for row in quarantine)
    snapshots = list((tmp_path / "home" / "data").glob("*/snapshot.json"))
    assert len(snapshots) == 1, "only the evaluation items passed"


@pytest.mark.parametrize(
    ("item", "scorer", "message"),
    [
        ({"references": []}, "exact_match", "references is a text or a list.*row 2"),
        (
            {"references": ["a", "("]},
            "regex",
            r"can use every reference: not so in row 2 \('\(' is no regular expression: missing \)",
        ),
        (
            {"references": ["weather"]},
            "tool_call",
            r"can use every reference: not so in row 1 .*, 2 \('weather' holds no JSON object\)",
        ),
        (
            {"references": [" "]},
            "exact_match",
            r"can use every reference: not so in row 2 \(' ' is blank\)",
        ),
        ({"choices": 3}, "exact_match", "choices is a list of texts or null.*row 2"),
        ({"choices": "yes|no"}, "exact_match", "choices is a list of texts or null.*row 2"),
        (
            {"references": ["a{99999999999999}"]},
            "regex",
            r"can use every reference: not so in row 2 .* is no regular expression",
        ),
        ({"prompt": ""}, "exact_match", "prompt is not blank.*row 2"),
    ],
)
def test_bad_items_are_named(
    item: dict, scorer: str, message: str, tiny_dir: Path, tmp_path: Path
) -> None:
    items = eval_rows(3)
    items[1] |= item
    with pytest.raises(BadInput, match=message):
        check(tmp_path, tiny_dir, train_rows(3), items, scorer=scorer)


def test_continue_learns_from_the_good_rows_and_keeps_the_bad_ones(
    tiny_dir: Path, tmp_path: Path
) -> None:
    data = check(tmp_path, tiny_dir, altered(response=""), on_invalid="continue")
    assert data.train is not None
    assert (data.train.rows, data.train.quarantined) == (5, 1)
    [bad] = pq.read_table(Path(data.train.directory) / "quarantine.parquet").to_pylist()
    assert bad["row"] == 3
    assert bad["reasons"] == ["response is not blank"]
    assert json.loads(bad["content"])["id"] == "alpha-2"


def test_a_blank_response_does_not_hide_a_long_one(tiny_dir: Path, tmp_path: Path) -> None:
    rows = altered(response="")
    rows[4]["response"] = "x" * 80
    data = check(tmp_path, tiny_dir, rows, on_invalid="continue")
    assert data.train is not None
    assert (data.train.rows, data.train.quarantined) == (4, 2)


def test_a_rule_that_cannot_be_looked_at_lets_nothing_pass(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though another one names a row that can be left out."""

    def crashes_too(*limits: int) -> list[Expectation]:
        crashing = Expectation(
            type="expect_column_values_to_be_between",
            kwargs={"column": "response", "max_value": 3},
            rule="a text is at most 3",
        )
        return [*train_suite(*limits), crashing]

    monkeypatch.setattr(validation, "train_suite", crashes_too)
    with pytest.raises(
        BadInput, match=r"(?s)(?=.*at most 3: not so\n)(?=.*not blank: not so in row 3\n)"
    ):
        check(tmp_path, tiny_dir, altered(response=""), on_invalid="continue")


def test_turns_that_the_chat_template_refuses_are_named(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    template = model / "chat_template.jinja"
    refusal = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    )
    template.write_text(refusal + template.read_text())
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "x"}]
    with pytest.raises(
        BadInput, match=r"template takes the turns: not so in row 3 \(No system role\)"
    ):
        check(tmp_path, model, altered(prompt=turns))
    items = eval_rows(3)
    items[1]["prompt"] = turns
    with pytest.raises(
        BadInput, match=r"template takes the turns: not so in row 2 \(No system role\)"
    ):
        check(tmp_path, model, train_rows(3), items)


def test_the_quarantine_says_why_a_reference_is_of_no_use(tiny_dir: Path, tmp_path: Path) -> None:
    items = eval_rows(3)
    items[1]["references"] = ["(" * 50]
    data = check(tmp_path, tiny_dir, train_rows(3), items, scorer="regex", on_invalid="continue")
    [bad] = pq.read_table(Path(data.eval.directory) / "quarantine.parquet").to_pylist()
    [reason] = bad["reasons"]
    said = f"the scorer can use every reference: '{'(' * 40}...' is no regular expression"
    assert reason.startswith(said)


def test_overlap_is_allowed_only_where_it_is_said(tiny_dir: Path, tmp_path: Path) -> None:
    rows = altered(prompt="Please say alpha 1")
    assert check(tmp_path, tiny_dir, rows, allow_overlap=True).train is not None


def test_no_skill_trains_on_what_another_suite_asks(tiny_dir: Path, tmp_path: Path) -> None:
    general = write_jsonl(tmp_path / "general.jsonl", eval_rows(3, "other"))
    suites = [{"name": "general", "eval": str(general)}]
    rows = altered(prompt="Please say other 2")
    with pytest.raises(BadInput, match=r"the prompt is in no evaluation suite.*row 3"):
        check(tmp_path, tiny_dir, rows, general=suites, allow_overlap=True)


def test_settings_that_leave_no_room_for_a_prompt_are_named(tiny_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"max_new_tokens of the skill alpha is 256, which leaves"):
        check(tmp_path, tiny_dir, train_rows(3), training={"max_new_tokens": 256})
    with pytest.raises(BadInput, match=r"evaluation\.max_new_tokens is 300, which leaves no room"):
        check(tmp_path, tiny_dir, train_rows(3), evaluation={"max_new_tokens": 300})


def test_what_no_teacher_reads_need_not_fit_one(tiny_dir: Path, tmp_path: Path) -> None:
    rows = altered(context="x" * 300)
    with pytest.raises(BadInput, match=r"the teacher's prompt fits .*not so in row 3"):
        check(tmp_path, tiny_dir, rows)
    check(tmp_path, tiny_dir, rows, training={"method": "sft", "max_new_tokens": 60})


def check_anchors(
    folder: Path, model_dir: Path, rows: list[dict], method: str = "sdft", **changes: object
) -> Snapshot | None:
    files = {
        "train": str(write_jsonl(folder / "train.jsonl", train_rows(3))),
        "eval": str(write_jsonl(folder / "eval.jsonl", eval_rows(3))),
    }
    content = {
        "name": "demo",
        "base_model": str(model_dir),
        "skills": [
            {"name": "alpha", "training": {"max_new_tokens": 60, "max_prompt_tokens": 50}, **files},
            {"name": "beta", "training": {"max_new_tokens": 20, "method": method}, **files},
        ],
        "general": [{"name": "general", "eval": files["eval"]}],
        "anchors": str(write_jsonl(folder / "anchors.jsonl", rows)),
    }
    curriculum = Curriculum.model_validate(content | changes)
    return Checker(curriculum, describe_model(model_dir), Home(folder / "home")).check_anchors()


def anchors_with(**change: object) -> list[dict]:
    rows = [{"id": f"a{n}", "prompt": f"Name {n}"} for n in range(4)]
    rows[2] |= change
    return rows


def test_anchors_are_prompts_without_answers(tiny_dir: Path, tmp_path: Path) -> None:
    made = check_anchors(tmp_path, tiny_dir, anchors_with())
    assert made is not None and (made.name, made.rows, made.quarantined) == ("anchors", 4, 0)
    answered = anchors_with(response="ignored")
    assert check_anchors(tmp_path, tiny_dir, answered) == made
    assert pq.read_table(made.file)["response"].to_pylist() == [None] * 4
    assert check_anchors(tmp_path, tiny_dir, answered, anchors=None) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "Please say alpha 1"}, "the prompt is in no evaluation suite: not so in row 3"),
        ({"prompt": "Say  alpha 1"}, "no skill demonstrates an answer.*: not so in row 3"),
        ({"prompt": " "}, "prompt is not blank: not so in row 3"),
        ({"id": "a0"}, "id is unique.*: not so in row 1, 3"),
        ({"prompt": "x" * 240}, r"the prompt fits \(at most 236 tokens\): not so in row 3"),
    ],
)
def test_bad_anchors_are_named(change: dict, message: str, tiny_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=rf"(?s)anchors\.jsonl: .*{message}"):
        check_anchors(tmp_path, tiny_dir, anchors_with(**change))


def test_anchors_need_a_teacher_in_every_stage(tiny_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="the skill beta is learned by sft, which has no teacher"):
        check_anchors(tmp_path, tiny_dir, anchors_with(), method="sft")


def test_the_items_of_each_suite_are_read_once(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files: list[str] = []

    def counted(source: DataSource, kind: str, cache: Path) -> list[Row]:
        files.append(Path(source.path).name)
        return read_rows(source, kind, cache)

    skills = [
        {
            "name": name,
            "train": str(write_jsonl(tmp_path / f"{name}-train.jsonl", train_rows(3, name))),
            "eval": str(write_jsonl(tmp_path / f"{name}-eval.jsonl", eval_rows(3, name))),
        }
        for name in ("a", "b", "c")
    ]
    content = {"name": "demo", "base_model": str(tiny_dir), "skills": skills}
    content["training"] = {"max_new_tokens": 60}
    content["evaluation"] = {"max_new_tokens": 60}
    content["anchors"] = str(write_jsonl(tmp_path / "anchors.jsonl", anchors_with()))
    monkeypatch.setattr(validation, "read_rows", counted)
    curriculum, model = Curriculum.model_validate(content), describe_model(tiny_dir)
    found = validate_data.fn(curriculum, model, str(tmp_path / "home"))
    assert found.data.keys() == {"a", "b", "c"} and found.anchors is not None
    assert sorted(one for one in files if "eval" in one) == [f"{n}-eval.jsonl" for n in "abc"]


def test_what_is_wrong_in_any_set_is_said_at_once(tiny_dir: Path, tmp_path: Path) -> None:
    sets = {
        "a-train": altered(response=" "),
        "a-eval": [{**row, "references": []} for row in eval_rows(3)],
        "b-train": altered(id="alpha-0"),
        "b-eval": eval_rows(3, "beta"),
    }
    files = {
        name: str(write_jsonl(tmp_path / f"{name}.jsonl", rows)) for name, rows in sets.items()
    }
    skills = [
        {"name": one, "train": files[f"{one}-train"], "eval": files[f"{one}-eval"]} for one in "ab"
    ]
    content = {"name": "demo", "base_model": str(tiny_dir), "skills": skills}
    content["training"] = {"max_new_tokens": 60}
    for answer, wrong in [(60, ["a-train", "a-eval", "b-train"]), (900, ["a-train", "b-train"])]:
        content["evaluation"] = {"max_new_tokens": answer}
        curriculum = Curriculum.model_validate(content)
        with pytest.raises(BadInput) as error:
            validate_data.fn(curriculum, describe_model(tiny_dir), str(tmp_path / "home"))
        said = str(error.value)
        assert [name for name in files if f"{files[name]}: 1 rule is broken" in said] == wrong
        assert said.count("leaves no room for a prompt") == (answer == 900), "once for both suites"


def test_items_that_cannot_be_read_hide_nothing_else(tiny_dir: Path, tmp_path: Path) -> None:
    """Two skills have the same demonstrations; what is no prompt in two sets is not one prompt."""
    files = {
        "train": write_jsonl(tmp_path / "train.jsonl", altered(prompt=None)),
        "a": tmp_path / "a.jsonl",
        "b": write_jsonl(tmp_path / "b.jsonl", [{**row, "prompt": None} for row in eval_rows(1)]),
    }
    files["a"].write_text("")
    skills = [
        {"name": name, "train": str(files["train"]), "eval": str(files[name])} for name in "ab"
    ]
    content = {"name": "demo", "base_model": str(tiny_dir), "skills": skills}
    content |= {"training": {"max_new_tokens": 60}, "evaluation": {"max_new_tokens": 60}}
    curriculum = Curriculum.model_validate(content)
    with pytest.raises(BadInput) as error:
        validate_data.fn(curriculum, describe_model(tiny_dir), str(tmp_path / "home"))
    said = str(error.value)
    assert [said.count(f"{file}: ") for file in files.values()] == [1, 1, 1], said
    assert "evaluation suite" not in said


def test_a_snapshot_is_reused_and_an_altered_one_made_again(tiny_dir: Path, tmp_path: Path) -> None:
    first = check(tmp_path, tiny_dir, train_rows(6))
    assert first.train is not None
    file = Path(first.train.file)
    before = file.stat().st_mtime_ns
    assert check(tmp_path, tiny_dir, train_rows(6)) == first
    assert file.stat().st_mtime_ns == before
    for name in ("rows.parquet", "snapshot.json", "result.json"):
        altered = file.with_name(name)
        altered.write_bytes(altered.read_bytes()[:-1] + b"?")
        again = check(tmp_path, tiny_dir, train_rows(6)).train
        assert again is not None and again.data_hash == first.train.data_hash
        assert altered.read_bytes()[-1:] != b"?"
    assert file.stat().st_mtime_ns != before


def spoil(kind: str, model: Path) -> None:
    match kind:
        case "tokenizer":
            (model / "tokenizer_config.json").unlink()
        case "vocabulary":
            (model / "tokenizer.json").unlink()
        case "no JSON":
            (model / "config.json").write_text("{")
        case "template":
            (model / "chat_template.jinja").unlink()
        case "pickled":
            (model / "model.safetensors").rename(model / "pytorch_model.bin")
        case "cut":
            content = (model / "model.safetensors").read_bytes()
            (model / "model.safetensors").write_bytes(content[:-1])
        case "part":
            index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
            (model / "model.safetensors.index.json").write_text(json.dumps(index))
        case "config":
            (model / "config.json").unlink()
        case "eos_token" | "pad_token":
            path = model / "tokenizer_config.json"
            content = json.loads(path.read_text())
            del content[kind]
            path.write_text(json.dumps(content))
        case "gone":
            shutil.rmtree(model)
        case "link":
            (model / "extra.json").symlink_to("/etc/hostname")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("tokenizer", "has no tokenizer"),
        ("vocabulary", "has no tokenizer"),
        ("no JSON", "is no JSON"),
        ("template", "has no chat template"),
        ("pickled", r"only pickled weights \(pytorch_model\.bin\)"),
        ("cut", r"model\.safetensors: is not whole"),
        ("part", r"model-00002-of-00002\.safetensors, which .*index\.json lists, is not there"),
        ("config", r"has no config\.json"),
        ("eos_token", "has no eos_token"),
        ("pad_token", "has no pad_token"),
        ("gone", "there is no such model directory"),
        ("link", "link that leaves the model directory"),
    ],
)
def test_model_directories_that_cannot_work_are_refused(
    kind: str, message: str, tmp_path: Path
) -> None:
    model = save_tiny_model(tmp_path / "model")
    spoil(kind, model)
    with pytest.raises(BadInput, match=message):
        resolve_base_model.fn(str(model), str(tmp_path / "home"))


def test_a_models_hash_is_its_content_not_its_place(tmp_path: Path) -> None:
    first = describe_model(save_tiny_model(tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "README.md").write_text("a card is not the model")
    second: ModelDir = describe_model(tmp_path / "b")
    assert second.model_hash == first.model_hash
    with (tmp_path / "b" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert describe_model(tmp_path / "b").model_hash != first.model_hash
