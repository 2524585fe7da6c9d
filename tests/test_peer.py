"""Our arms of the benchmark beside TRL; TRL itself is installed for the benchmark only."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow
TOKENS = 28
"""What a rollout of pocket's has at most there."""


def arm(*options: str) -> dict[str, float]:
    program = str(ROOT / "benchmarks" / "peer.py")
    command = [sys.executable, program, "--model", "pocket", "--steps", "2", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_both_arms_learn_answers_of_equal_length() -> None:
    ours, sft = arm("--arm", "ours"), arm("--arm", "ours-sft")
    for found in (ours, sft):
        assert found["step_s"] > 0 and found["working_bytes"] > 0
        assert 0 < found["tokens"] <= 32 * (TOKENS + 1)
    assert sft["tokens"] == pytest.approx(ours["tokens"], rel=0.25)


def test_adapters_and_products_in_bf16_are_measured_too() -> None:
    assert arm("--arm", "ours", "--lora", "--bf16")["tokens"] > 0
