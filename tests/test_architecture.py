"""Rules of the project as tests: imports go one way, files stay small, pins work together."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import QUICKSTART, ROOT

from flows import cli
from flows.operate import app as operators
from flows.registry import app as owners

LAYERS = ["schemas", "sdft", "tasks", "infra", "flows"]
FORBIDDEN = {
    "schemas": {"torch", "transformers", "prefect", "mlflow"},
    "sdft": {"prefect", "mlflow", "great_expectations"},
    "tasks": set(),
    "infra": {"torch", "transformers", "prefect", "mlflow", "great_expectations"},
    "flows": {"mlflow", "great_expectations", "torch", "transformers"},
}
SOURCES = [path for layer in LAYERS for path in sorted((ROOT / layer).glob("**/*.py"))]


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_right_only_and_files_have_one_responsibility(path: Path) -> None:
    layer = path.relative_to(ROOT).parts[0]
    above = set(LAYERS[LAYERS.index(layer) + 1 :])
    assert not imported(path) & (above | FORBIDDEN[layer])
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300


def test_nothing_knows_of_the_examples() -> None:
    for path in SOURCES:
        assert "pocket" not in path.read_text(encoding="utf-8").lower(), path


def test_no_pickle_and_no_remote_code() -> None:
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert "torch.load(" not in text, path
        assert not re.search(r"trust_remote_code\W+True", text), path
        if path.name not in ("pretrained.py", "modelfiles.py"):  # the second's GGUF files hold none
            assert not re.search(r"Auto\w+\.from_pretrained", text), f"{path} may ask to run code"
        assert "pickle" not in imported(path), path


def test_the_flow_that_finds_everything_done_needs_no_torch() -> None:
    code = "import sys, flows.learn; print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"


def test_the_command_line_starts_without_the_heavy_libraries() -> None:
    heavy = ("torch", "transformers", "prefect", "mlflow", "datasets", "great_expectations")
    code = f"import sys, flows.cli; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_a_home_is_activated_before_what_it_sets_up_is_imported() -> None:
    """Both read the environment once: telemetry stays off, and no log lines come between ours."""
    file = QUICKSTART / "curriculum.yaml"
    commands = [
        *(["learn", str(file)], ["plan", str(file)], ["replay", "a", "--without", "b"], ["status"]),
        *(["matrix", "a"], ["sync"], ["gc"], ["ui"], ["promote", "a", "1"], ["rollback", "a"]),
        *(["reconcile"], ["ledger", "a"], ["lineage", "a"], ["trace", "a"], ["diff", "a", "b"]),
        *(["answers", "a", "b"], ["export", "a", "b"], ["doctor"]),
        ["deploy", str(file)],
    ]
    code = f"""
import sys
from typer.testing import CliRunner
from flows.cli import app
from tasks.home import Home

def set_environment(*_, **__):
    raise SystemExit(0 if not {{"mlflow", "prefect"}} & {{*sys.modules}} else 9)

Home.set_environment = set_environment
for one in {commands}:
    code = CliRunner().invoke(app, [*one, "--home", "."]).exit_code
    if code:
        print(one, code)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == ""
    apps = (cli.app, owners, operators)
    named = [one.callback for app in apps for one in app.registered_commands]
    assert {one[0] for one in commands} == {one.__name__ for one in named if one}


def test_commands_of_owners_and_auditors_start_without_prefect_and_torch() -> None:
    modules = "tasks.promotion, tasks.proof, tasks.events, tasks.status, flows.show_lineage, "
    modules += "tasks.answers, flows.show_answers, tasks.exporting"
    code = f"import sys, {modules}, flows.show; print({{'prefect', 'torch'}} & {{*sys.modules}})"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"


def test_prefects_server_imports_with_the_pinned_versions() -> None:
    """With an unpinned fastapi this fails while `from prefect import flow` still works."""
    importlib.import_module("prefect.server.api.server")
