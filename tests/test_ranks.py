"""Several processes a stage: what comes out is what one process makes of it."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from conftest import ROOT
from stages import BASIC, Case, assert_weights_close

from schemas.stage import EXIT_ERROR, EXIT_STOPPED, StageSpec
from sdft.model import load_model
from sdft.process import Stop
from sdft.ranks import open_ranks
from sdft.rollout import Sampling, generate
from sdft.stagelog import read_metrics
from sdft.train import train

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["learning", "sdft.train"])
WAIT_S = 120
UNLIKE = {"tokens_per_s"}
"""What a step measures of the machine."""

LORA = {"lora": {"rank": 4, "alpha": 8}, "learning_rate": 1e-2}
WAYS = {
    "frozen": {},
    "ema": {"teacher": "ema", "ema_rate": 0.1, "skip_first_tokens": 3},
    "sft": {"method": "sft"},
    "lora, frozen": LORA,
    "lora, ema": {**LORA, "teacher": "ema", "ema_rate": 0.1},
}


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("way", WAYS)
def test_several_ranks_give_what_one_gives(case: Case, way: str, world: int) -> None:
    """The last batch of an epoch has two rows: of four ranks two have nothing to do in it."""
    training = BASIC.model_validate(BASIC.model_dump() | WAYS[way])
    spec = case.spec(training, micro_batch_tokens=100)
    _, _, one = case.run("one", spec)
    several = run_ranks(world, spec, case.folder / "several")
    assert_equal_but_for_rounding(one, several)


def test_a_part_of_the_prompts_is_answered_as_in_the_whole(case: Case) -> None:
    import torch

    lm = load_model(case.model_dir, torch.device("cpu"))
    prompts = [lm.prompt_ids([{"role": "user", "content": f"number {n}"}]) for n in range(5)]
    sampling = Sampling(max_new_tokens=12, temperature=1.0)
    whole = generate(lm, prompts, sampling, seed=3)
    parts = [
        generate(lm, prompts[ours], sampling, 3, ours.start) for ours in (slice(0, 2), slice(2, 5))
    ]
    assert [*parts[0], *parts[1]] == whole


@pytest.mark.slow
def test_when_a_rank_is_killed_the_stage_stops_as_a_whole_and_goes_on(case: Case) -> None:
    training = BASIC.model_copy(update={"epochs": 8})
    spec = case.spec(training, checkpoint_every_steps=1, processes=2)
    with started(spec, case.folder / "killed") as program:
        await_checkpoint(case.folder / "killed", program)
        ranks = psutil.Process(program.pid).children()
        [victim] = [one for one in ranks if one.environ()["RANK"] == "1"]
        victim.kill()
        output, _ = program.communicate(timeout=WAIT_S)
    assert program.returncode == EXIT_ERROR
    assert "error: rank 1 of 2 was killed by SIGKILL, and the others were ended with it" in output
    assert not any(one.is_running() for one in ranks)
    assert_goes_on_as_undisturbed(case, spec, "killed", world=1)


@pytest.mark.slow
def test_sigterm_saves_a_checkpoint_that_another_number_of_ranks_goes_on_from(case: Case) -> None:
    training = BASIC.model_copy(update={"epochs": 8})
    spec = case.spec(training, checkpoint_every_steps=1, processes=2)
    with started(spec, case.folder / "stopped") as program:
        await_checkpoint(case.folder / "stopped", program)
        program.send_signal(signal.SIGTERM)
        output, _ = program.communicate(timeout=WAIT_S)
    assert program.returncode == EXIT_STOPPED, output
    assert_goes_on_as_undisturbed(case, spec, "stopped", world=4)


def assert_goes_on_as_undisturbed(case: Case, spec: StageSpec, name: str, world: int) -> None:
    assert not (case.folder / name / "record.json").exists()
    _, _, one = case.run("one", spec)
    assert len(read_metrics(case.folder / name / "metrics.jsonl")) < len(
        read_metrics(one / "metrics.jsonl")
    )
    run_ranks(world, spec, case.folder / name)
    assert_equal_but_for_rounding(one, case.folder / name)


def assert_equal_but_for_rounding(one: Path, several: Path) -> None:
    """Curve and weights. Not the weights alone: Adam forgives a gradient of a wrong length."""
    assert_weights_close(one, several)
    curves = [read_metrics(place / "metrics.jsonl") for place in (one, several)]
    for line, other in zip(*curves, strict=True):
        assert line.step == other.step
        assert line.metrics.keys() == other.metrics.keys()
        for name in line.metrics.keys() - UNLIKE:
            assert other.metrics[name] == pytest.approx(line.metrics[name], rel=1e-4), name


def run_ranks(world: int, spec: StageSpec, directory: Path, stop: Stop | None = None) -> Path:
    """Train in so many processes, which torchrun would have started."""
    directory.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        CONTEXT.Process(target=be_rank, args=(rank, world, port, spec, directory, stop or Stop()))
        for rank in range(world)
    ]
    for one in ranks:
        one.start()
    for one in ranks:
        one.join(WAIT_S)
    assert [one.exitcode for one in ranks] == [0] * world
    return directory


def be_rank(rank: int, world: int, port: int, spec: StageSpec, directory: Path, stop: Stop) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ |= {
        "TORCHELASTIC_RUN_ID": "test",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    with open_ranks(spec.runtime) as ranks:
        train(spec, directory, stop, ranks)


@contextmanager
def started(spec: StageSpec, directory: Path) -> Iterator[subprocess.Popen[str]]:
    """The trainer as a program, as a person starts it."""
    directory.mkdir()
    spec.write(directory / "spec.json")
    program = subprocess.Popen(
        [sys.executable, "-m", "sdft.train", str(directory / "spec.json"), str(directory)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield program
    finally:
        program.kill()


def await_checkpoint(directory: Path, program: subprocess.Popen[str]) -> None:
    while not list(directory.glob("checkpoints/step-*/COMPLETE")):
        assert program.poll() is None, program.stdout and program.stdout.read()
