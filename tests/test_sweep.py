"""The sweep over arms, rates and seeds, on the shipped model with a dozen rows a skill."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from learning import LONG_S, write_curriculum

pytestmark = pytest.mark.slow


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    program = str(ROOT / "benchmarks" / "retention_sweep.py")
    return subprocess.Popen(
        [sys.executable, program, str(folder / "curriculum.yaml"), str(folder / "work"), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def first_table(output: str) -> dict[tuple[str, str], list[str]]:
    """Its cells, by arm and rate."""
    lines = output[output.index("| arm") :].split("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {(row[0], row[1]): row[2:] for row in rows}


def test_what_is_finished_is_not_run_again(tmp_path: Path) -> None:
    write_curriculum(tmp_path)
    chains = tmp_path / "work" / "chains"
    settings = ("--training", "epochs=1", "--rehearsal", "0.5")
    options = ("--arms", "sft:1e-3", "sdft-lora:1e-3", "--seeds", "0", *settings)
    record = chains / "sft-0.001-seed0" / "courier" / "record.json"
    killed, end = start(tmp_path, *options), time.monotonic() + LONG_S
    while not record.is_file():
        assert killed.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    first_stage = record.read_bytes()

    output, errors = (on := start(tmp_path, *options)).communicate()
    assert on.returncode == 0, errors
    assert record.read_bytes() == first_stage
    assert [*first_table(output)] == [
        ("arm", "rate"), ("---", "---"), ("base", ""), ("sft", "0.001"), ("sdft-lora", "0.001"),
    ]  # fmt: skip
    assert len(json.loads((chains / "sft-0.001-seed0" / "scores.json").read_text())["rows"]) == 3
    adapted = json.loads((chains / "sdft-lora-0.001-seed0" / "blick" / "record.json").read_text())
    assert adapted["spec"]["training"]["lora"]
    assert adapted["steps"] == 5, "12 rows, and 6 of courier again"
    assert not list(chains.glob("*/*/model")), "weights of finished chains stay"

    output, errors = (more := start(tmp_path, *options, "--seeds", "0", "1")).communicate()
    assert more.returncode == 0, errors
    ran = [line for line in output.splitlines() if ", seed " in line]
    assert ran == ["sft:0.001, seed 1", "sdft-lora:0.001, seed 1"]
    chains_counted, *means = first_table(output)["sft", "0.001"]
    assert chains_counted == "2" and all("±" in mean for mean in means)
    assert (tmp_path / "work" / "sweep.md").read_text() in output

    other = start(tmp_path, "--training", "epochs=1", "divergence=jsd", "--rehearsal", "0.5")
    _, errors = other.communicate()
    assert other.returncode == 1
    assert "its chains differ in settings; give another directory" in errors


def test_anchors_of_the_curriculum_are_learned_where_there_is_a_teacher(tmp_path: Path) -> None:
    file = write_curriculum(tmp_path, skills=("courier",))
    rows = [json.dumps({"prompt": f"Name {n}"}) for n in range(4)]
    (tmp_path / "anchors.jsonl").write_text("\n".join(rows))
    content = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump(content | {"anchors": "anchors.jsonl"}))
    options = ("--seeds", "0", "--training", "epochs=1")
    _, errors = (refused := start(tmp_path, "--arms", "sft:1e-3", *options)).communicate()
    assert refused.returncode == 1
    assert "--arms sft:0.001: has no teacher to learn the curriculum's anchors of" in errors
    _, errors = (ran := start(tmp_path, "--arms", "sdft:1e-3", *options)).communicate()
    assert ran.returncode == 0, errors
    stage = tmp_path / "work" / "chains" / "sdft-0.001-seed0" / "courier"
    assert json.loads((stage / "record.json").read_text())["steps"] == 4, "16 rows, 4 a step"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--arms", "ppo:1e-3"), "'ppo:1e-3' is no arm"),
        (("--rehearsal", "1.5"), "1.5 is not between 0 and 1"),
    ],
)
def test_what_is_no_option_is_refused(
    tmp_path: Path, option: tuple[str, str], message: str
) -> None:
    write_curriculum(tmp_path)
    refused = start(tmp_path, *option)
    _, errors = refused.communicate()
    assert refused.returncode == 2
    assert message in errors


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("epoch=1", "--training epoch=1: Extra inputs are not permitted"),
        ("teacher=student", "--training teacher=student: Input should be 'frozen' or 'ema'"),
        ("epochs", "--training epochs=: Input should be a valid integer"),
        ("learning_rate=1e-4", "--training learning_rate: is given by --arms"),
        ("skip_first_tokens=40", "--training: Value error, skip_first_tokens 40 leaves nothing"),
    ],
)
def test_what_is_no_setting_is_refused(tmp_path: Path, given: str, message: str) -> None:
    write_curriculum(tmp_path)
    refused = start(tmp_path, "--training", given)
    _, errors = refused.communicate()
    assert refused.returncode == 1
    assert message in errors
    assert not (tmp_path / "work").exists()
