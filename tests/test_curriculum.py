"""The curriculum file: inheritance, paths, and errors that name file, line and field."""

import json
from pathlib import Path

import pytest
from conftest import QUICKSTART

from flows.options import open_curriculum
from schemas.base import BadInput
from schemas.curriculum import Curriculum, load_curriculum
from schemas.names import check_name
from schemas.settings import LoraSettings
from schemas.templates import TEMPLATES, check_template, teacher_messages
from tasks.home import Home

GOOD = """\
name: demo
base_model: model
skills:
  - name: first
    train: data/first.jsonl
    eval: {path: data/eval.csv, columns: {references: answer}}
    training: {epochs: 3}
  - name: second
    train: /abs/second.parquet
    eval: {path: hub:org/name, revision: abc}
    scorer: tool_call
training:
  learning_rate: 1.0e-4
  epochs: 5
"""


def load(text: str, folder: Path) -> Curriculum:
    path = folder / "curriculum.yaml"
    path.write_text(text, encoding="utf-8")
    return load_curriculum(path)


def test_settings_are_inherited_and_paths_start_at_the_file(tmp_path: Path) -> None:
    curriculum = load(GOOD, tmp_path)
    first, second = curriculum.skills
    assert (first.training.epochs, second.training.epochs) == (3, 5)
    assert first.training.learning_rate == 1e-4
    assert first.train.path == str(tmp_path / "data" / "first.jsonl")
    assert second.train.path == "/abs/second.parquet"
    assert second.eval.path == "hub:org/name"
    assert curriculum.base_model == str(tmp_path / "model")


def test_nested_settings_are_inherited_one_by_one(tmp_path: Path) -> None:
    own = GOOD.replace("{epochs: 3}", "{lora: {alpha: 32}}")
    first, second = load(own + "  lora: {rank: 8, alpha: 16}\n", tmp_path).skills
    assert first.training.lora == LoraSettings(rank=8, alpha=32)
    assert second.training.lora == LoraSettings(rank=8, alpha=16)


def test_a_skill_that_turns_adapters_off_does_so_in_a_dump_too(tmp_path: Path) -> None:
    own = GOOD.replace("{epochs: 3}", "{lora: null}")
    curriculum = load(own + "  lora: {rank: 8}\n", tmp_path)
    assert [one.training.lora is None for one in curriculum.skills] == [True, False]
    for mode in ("json", "python"):
        assert Curriculum.model_validate(curriculum.model_dump(mode=mode)) == curriculum
    without = load(GOOD, tmp_path).model_dump(mode="json")
    assert "lora" not in without["skills"][0]["training"], "so that digests of before stand"


def test_aliases_of_aliases_are_walked_once(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60))]
    with pytest.raises(BadInput, match=r"curriculum.yaml:74: a59: is no known key"):
        load(GOOD + "\n".join(lines), tmp_path)
    shared = GOOD.replace("{epochs: 3}", "&own {epochs: 3}").replace(
        "scorer", "training: *own\n    scorer"
    )
    assert [one.training.epochs for one in load(shared, tmp_path).skills] == [3, 3]


def test_a_suite_can_change_the_gate_for_itself(tmp_path: Path) -> None:
    shared = "gate: {min_gain: 0.2, confidence: 0.9}\n"
    own = "general:\n  - {name: sums, eval: g.jsonl, gate: {max_forgetting: 0.3}}\n"
    text = GOOD.replace("epochs: 3}", "epochs: 3}\n    gate: {proof: bound}") + own + shared
    first, second = load(text, tmp_path).skills
    [sums] = load(text, tmp_path).general
    assert (first.gate.min_gain, first.gate.confidence, first.gate.proof) == (0.2, 0.9, "bound")
    assert second.gate == load(text, tmp_path).gate
    assert (sums.gate.max_forgetting, sums.gate.min_gain) == (0.3, 0.2)


def test_a_mistake_in_shared_settings_is_named_once(tmp_path: Path) -> None:
    with pytest.raises(BadInput) as error:
        load(GOOD.replace("epochs: 5", "epochs: 0") + "gate: {min_gian: 0.1}\n", tmp_path)
    assert [line.split(":", 1)[1] for line in str(error.value).splitlines()] == [
        "14: training.epochs: Input should be greater than or equal to 1",
        "15: gate.min_gian: is no known key; is it min_gain?",
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("base_model: model", "base_modell: model", "curriculum.yaml:2: base_modell: is no known"),
        ("training: {epochs: 3}", "trainig: {}", r":7: skills\.0\.trainig: is no known key"),
        ("learning_rate: 1.0e-4", "learning_rate: 2", r":13: training\.learning_rate: .*less than"),
        ("scorer: tool_call", "scorer: bleu", r":11: skills\.1\.scorer: .*exact_match"),
        (", revision: abc", "", r":10: skills\.1\.eval: .*needs a revision"),
        ("name: second", "name: first", r":8: skills\.1\.name: two skills .* are named 'first'"),
        ("name: second", "name: 0x10", r":8: skills\.1\.name: must be a text; put it in quotes"),
        ("name: demo", "name: demo\ngeneral: [foo]", r":2: general\.0: must be a mapping of keys"),
        ("name: demo", "name: demo\ngeneral: {a: 1}", r":2: general: must be a list, each on a"),
        ("name: demo", "name: demo\nevaluation: 3", r":2: evaluation: must be a mapping of keys"),
        ("name: demo", "name: demo\nrehersal: 1", r":2: rehersal: .*key; is it rehearsal\?"),
        ("epochs: 5", "\tepochs: 5", r"yaml:14:\d+: is no valid YAML: .*; indent with spaces"),
        ("name: second", "name: ../x", r":8: skills\.1\.name: '\.\./x' is no safe name"),
        ("name: second", f"name: {'x' * 300}", "is no safe name"),
        ("name: second", "name: fırst", "is no safe name"),
        ("epochs: 5", "epochs: 5\n  epochs: 6", "given twice"),
        ("epochs: 5", "epochs: 0", r"training\.epochs: .*greater than or equal to 1"),
        ("name: demo\n", "", "name: is required and missing"),
        ("name: demo", "name: demo\ngate: {min_gain: 1.5}", r":2: gate\.min_gain: .*less than"),
        (
            "training: {epochs: 3}",
            "gate: {band: 2}",
            r":7: skills\.0\.gate\.band: .*less than",
        ),
        (
            "training: {epochs: 3}",
            "gate: {bnd: 0.1}",
            r":7: skills\.0\.gate\.bnd: is no known key",
        ),
        ("name: demo", "name: demo\ngate: {confidence: 0.5}", r"gate\.confidence: .*greater than"),
        ("name: demo", "name: demo\ngate: {proof: maybe}", r"gate\.proof: .*estimate"),
        ("epochs: 5", "teacher_template: 'no placeholders'", "exactly the placeholders"),
        ("epochs: 5", "max_grad_norm: .inf", r"training\.max_grad_norm: .*finite"),
        (
            "epochs: 5",
            "max_new_tokens: 3\n  skip_first_tokens: 3",
            "leaves nothing of max_new_tokens",
        ),
        ("skills:", "skills: []\nother:", ":3: skills: .*at least 1"),
        *(
            ("name: demo", f"name: {text}", rf"yaml:1:\d+: .*'{value}' cannot be read as {kind}")
            for text, value, kind in [
                ("2024-13-45", "2024-13-45", "timestamp"),
                ("0x_", "0x_", "int"),
                ("!!bool perhaps", "perhaps", "bool"),
                ("!!timestamp noon", "noon", "timestamp"),
            ]
        ),
    ],
)
def test_mistakes_are_named_with_their_line(
    old: str, new: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=message):
        load(GOOD.replace(old, new), tmp_path)


@pytest.mark.parametrize("text", ["", "- a", "a: [", "name: \x00", "? [a, b]\n: c", "a: &x [*x]"])
def test_what_is_no_mapping_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"curriculum\.yaml"):
        load(text, tmp_path)


@pytest.mark.parametrize("name", ["..", "a/b", "A", "", "a.", "-a", "a\n", "con ", "é", "a" * 64])
def test_names_that_could_leave_their_folder_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no safe name"):
        check_name(name)


def test_teacher_templates_show_the_demonstration_and_leave_data_alone() -> None:
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "q {demonstration}"}]
    for template in TEMPLATES:
        shown = teacher_messages(turns, "a {prompt}", None, template)
        text = "\n".join(turn["content"] for turn in shown)
        assert shown[0] == turns[0]
        assert shown[-1]["role"] == "user"
        assert text.count("a {prompt}") == 1, template
        assert "q {demonstration}" in text
    with_source = teacher_messages(turns, "a", "SOURCE", "compact")
    assert with_source[-1]["content"].startswith("SOURCE\n\nq ")
    assert len(teacher_messages(turns, "a", None, "dialogue")) == 4
    check_template("{prompt} | {demonstration}")


def test_the_refused_example_teaches_the_quickstart_by_other_training() -> None:
    quickstart, refused = (
        load_curriculum(QUICKSTART / name) for name in ("curriculum.yaml", "refused.yaml")
    )
    assert (quickstart.training.method, refused.training.method) == ("sdft", "sft")
    other = {"method": "sft", "learning_rate": refused.training.learning_rate}

    alike = {"training": refused.training}
    skills = tuple(
        skill.model_copy(update={"training": skill.training.model_copy(update=other)})
        for skill in quickstart.skills
    )
    assert quickstart.model_copy(update=alike | {"skills": skills}) == refused


@pytest.mark.parametrize("there", ["base_model", "train", "eval", "general", "anchors", None])
def test_the_hub_is_open_only_where_something_comes_from_it(
    there: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = {"path": "hub:org/name", "revision": "abc"}
    data = dict.fromkeys(("train", "eval", "general", "anchors"), "own.jsonl")
    own = data | ({there: hub} if there else {})
    content = {
        "name": "demo",
        "base_model": "hub:org/name@abc" if there == "base_model" else "model",
        "skills": [{"name": "first", "train": own["train"], "eval": own["eval"]}],
        "general": [{"name": "sums", "eval": own["general"]}],
        "anchors": own["anchors"],
    }
    (tmp_path / "curriculum.yaml").write_text(json.dumps(content))
    (tmp_path / "own.jsonl").touch()
    opened = list[bool]()
    monkeypatch.setattr(Home, "activate", lambda _, offline: opened.append(offline))
    open_curriculum(tmp_path / "curriculum.yaml", tmp_path / "home")
    assert opened == [there is None]


def test_all_files_that_are_missing_are_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "curriculum.yaml"
    path.write_text(
        "name: demo\nbase_model: model\nskills: [{name: a, train: t.jsonl, eval: e.jsonl}]\n"
    )
    with pytest.raises(BadInput) as error:
        open_curriculum(path, tmp_path / "home")
    assert str(error.value).splitlines() == [
        f"{tmp_path / name}: there is no such file" for name in ("e.jsonl", "t.jsonl")
    ]
    assert not (tmp_path / "home").exists()
    with pytest.raises(BadInput, match="is a directory; name the YAML file in it"):
        open_curriculum(tmp_path, tmp_path / "home")
