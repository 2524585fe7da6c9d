"""The command line as a user meets it: exit codes, messages, Ctrl-C, and running again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, save_tiny_model
from test_learn import write_curriculum

SDFT = [sys.executable, "-c", "from flows.start import main; main()"]
IN_A_TERMINAL = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
"""Where the tests run in the background, a shell has made them ignore Ctrl-C."""


def run(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    for name in [name for name in environment if name.startswith(("PREFECT_", "MLFLOW_", "SDFT_"))]:
        del environment[name]
    return subprocess.run(
        [*SDFT, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["learn", "nowhere.yaml"], "there is no such file"),
        (["learn", "broken.yaml"], "broken.yaml:2: modell: is no known key"),
        (["learn", "curriculum.yaml", "--home", "broken.yaml/home"], "cannot be used as home"),
        (["plan", "nowhere.yaml"], "there is no such file"),
        (["status", "--home", "none"], "there is no such home"),
        (["matrix", "demo", "--home", "none"], "there is no such home"),
        (["learn"], "Missing argument"),
        (["lern"], "No such command"),
    ],
)
def test_users_mistakes_are_exit_code_2_and_leave_nothing(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    write_curriculum(tmp_path, ["alpha"])
    (tmp_path / "broken.yaml").write_text("name: demo\nmodell: x\n")
    result = run(*arguments, cwd=tmp_path)
    assert result.returncode == 2, result.stdout + result.stderr
    assert message in result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert not (tmp_path / ".sdft").exists()
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_signals_for_the_whole_group_save_and_the_same_command_finishes(tmp_path: Path) -> None:
    """As a terminal's Ctrl-C and `timeout` send them: to the trainer and the servers as well."""
    save_tiny_model(tmp_path / "model")
    path = write_curriculum(tmp_path, ["alpha"])
    content = yaml.safe_load(path.read_text())
    content["training"]["epochs"] = 200
    content["gate"]["min_gain"] = 0.9
    path.write_text(yaml.safe_dump(content))

    planned = run("plan", path, cwd=tmp_path)
    assert planned.returncode == 0, planned.stdout + planned.stderr
    assert "learned" in planned.stdout
    assert not (tmp_path / ".sdft" / "stages").exists()

    for sent, code in [(signal.SIGINT, 130), (signal.SIGTERM, 143)]:
        process = subprocess.Popen(
            [SDFT[0], "-c", f"{IN_A_TERMINAL} {SDFT[2]}", "learn", str(path)],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        stage = trained_further(tmp_path)
        began = time.monotonic()
        os.killpg(process.pid, sent)
        output, _ = process.communicate(timeout=120)
        assert time.monotonic() - began < 60, "something that is gone was waited for"
        assert process.returncode == code, output
        assert "the same command goes on" in output
        assert not (stage / "record.json").exists()
        assert list((stage / "checkpoints").glob("step-*"))

    finished = run("learn", path, cwd=tmp_path)
    assert finished.returncode == 3, finished.stdout + finished.stderr
    assert "alpha: gained" in finished.stdout
    lines = (stage.with_suffix("") / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == list(range(1, 401))

    matrix = run("matrix", "demo", "--json", cwd=tmp_path)
    assert [row["skill"] for row in json.loads(matrix.stdout)["rows"]] == [None, "alpha"]
    status = run("status", cwd=tmp_path)
    assert "refuse" in status.stdout
    assert "candidate" in status.stdout
    assert run("matrix", "other", cwd=tmp_path).returncode == 2


def trained_further(place: Path) -> Path:
    """The folder of the only stage, once its metrics are some steps longer than now."""
    before, deadline = 0, time.monotonic() + 120
    for file in place.glob(".sdft/stages/*/metrics.jsonl"):
        before = file.stat().st_size
    while time.monotonic() < deadline:
        for file in place.glob(".sdft/stages/*/metrics.jsonl"):
            if file.stat().st_size > before + 2000:
                return file.parent
        time.sleep(0.2)
    raise AssertionError("the trainer did not start")


@pytest.mark.parametrize("after_s", [0.15, 0.3, 0.45, 0.6])
@pytest.mark.parametrize(
    ("sent", "codes"),
    [(signal.SIGINT, {130}), (signal.SIGTERM, {143, -signal.SIGTERM})],  # a shell says 143 for both
)
def test_a_signal_while_it_starts_is_no_traceback(
    sent: signal.Signals, codes: set[int], after_s: float, tmp_path: Path
) -> None:
    write_curriculum(tmp_path, ["alpha"])
    began = IN_A_TERMINAL + "print('began', flush=True);"
    command = [sys.executable, "-c", began + SDFT[2], "plan", "curriculum.yaml"]
    process = subprocess.Popen(
        command, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(after_s)
    process.send_signal(sent)
    _, said = process.communicate(timeout=100)
    assert process.returncode in codes, said
    assert "Traceback" not in said


WAITING = """
import time
from flows.cli import app

@app.command()
def wait() -> None:
    try:
        print("began", flush=True)
        time.sleep(100)
    finally:
        print("tidied up")
"""


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_any_command_with_its_exit_code(sent: signal.Signals, code: int) -> None:
    command = [sys.executable, "-c", f"{IN_A_TERMINAL}{WAITING}{SDFT[2]}", "wait"]
    process = subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "began\n"
    process.send_signal(sent)
    said, _ = process.communicate(timeout=100)
    word = {130: "interrupted", 143: "terminated"}[code]
    assert (process.returncode, said) == (code, f"tidied up\nerror: {word}\n")
