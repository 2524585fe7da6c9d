"""Several processes a stage: what comes out is what one process makes of it."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT, make_tokenizer, save_tiny_model, tiny_llama
from pydantic import ValidationError
from stages import BASIC, Case, StopAfter, assert_weights_close
from test_train import limit_memory
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from schemas.base import BadInput
from schemas.settings import RuntimeSettings
from schemas.stage import EXIT_BAD_INPUT, EXIT_ERROR, EXIT_STOPPED, StageSpec
from sdft.drawing import Sampling
from sdft.launch import _not_finished
from sdft.model import load_model
from sdft.process import Stop
from sdft.ranks import open_ranks
from sdft.rollout import generate
from sdft.stagelog import read_metrics
from sdft.train import train

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["sdft.train", "torch.distributed.tensor", "pytest", "psutil"])
WAIT_S = 300
LONG = BASIC.model_copy(update={"epochs": 8})
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
@pytest.mark.parametrize(
    ("way", "world", "sharding"),
    [
        *[(way, 2, "none") for way in WAYS],
        *[(way, 4, "full") for way in WAYS],
        ("frozen", 4, "none"),
        ("frozen", 2, "full"),
    ],
)
def test_several_ranks_give_what_one_gives(case: Case, way: str, world: int, sharding: str) -> None:
    """The last batch of an epoch has two rows: of four ranks two have nothing to do in it."""
    training = BASIC.model_validate(BASIC.model_dump() | WAYS[way])
    spec = case.spec(training, micro_batch_tokens=100, sharding=sharding)
    _, _, one = case.run("one", spec)
    run_ranks(world, spec, case.folder / "several")
    assert_equal_but_for_rounding(one, case.folder / "several")


@pytest.mark.slow
def test_a_sharded_model_with_a_head_of_its_own_computes_activations_again(tmp_path: Path) -> None:
    config = tiny_llama(make_tokenizer())
    config.tie_word_embeddings = False
    case = Case(save_tiny_model(tmp_path / "untied", config), tmp_path)
    spec = case.spec(BASIC, sharding="full", gradient_checkpointing=True)
    _, _, one = case.run("one", spec)
    run_ranks(2, spec, tmp_path / "several")
    assert_equal_but_for_rounding(one, tmp_path / "several")


@pytest.mark.slow
@pytest.mark.parametrize(
    "legs",
    [
        [(2, "full"), (4, "full"), (1, "none")],
        [(1, "none"), (2, "full"), (4, "none")],
    ],
)
def test_a_stage_goes_on_with_another_number_of_ranks(
    case: Case, legs: list[tuple[int, str]]
) -> None:
    """Two steps each, then to the end; one rank is told to stop, and all do."""
    training = BASIC.model_copy(update={"teacher": "ema", "ema_rate": 0.1})
    _, _, one = case.run("one", case.spec(training))
    directory = case.folder / "several"
    for number, (world, sharding) in enumerate(legs, start=1):
        spec = case.spec(training, sharding=sharding)
        stop = StopAfter(2) if number < len(legs) else Stop()
        run_ranks(world, spec, directory, stop=stop)
        if number < len(legs):
            checkpoint = directory / "checkpoints" / f"step-{2 * number:06d}"
            parts = list(checkpoint.rglob("*.safetensors"))
            assert len(parts) == 3 * (world if sharding == "full" else 1)
            assert not (directory / "record.json").exists()
    assert_equal_but_for_rounding(one, directory)


@pytest.mark.slow
def test_where_one_ranks_memory_runs_out_all_go_on_in_smaller_parts(case: Case) -> None:
    spec = case.spec()
    _, _, one = case.run("one", spec)
    run_ranks(2, spec, case.folder / "several", prepare=take_memory_of_the_last)
    assert_equal_but_for_rounding(one, case.folder / "several")


def take_memory_of_the_last(rank: int, world: int) -> None:
    if rank == world - 1:
        limit_memory(pytest.MonkeyPatch(), tokens=50)


@pytest.mark.parametrize(
    "settings",
    [
        {"processes": 2, "sampler": "vllm"},
        {"sharding": "full", "compile": True},
        {"sharding": "full", "offload_teacher": True},
    ],
)
def test_what_does_not_go_together_is_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="go(es)? with"):
        RuntimeSettings.model_validate(settings)


def test_a_part_of_the_prompts_is_answered_as_in_the_whole(case: Case) -> None:
    lm = load_model(case.model_dir, torch.device("cpu"))
    prompts = [lm.prompt_ids([{"role": "user", "content": f"number {n}"}]) for n in range(5)]
    sampling = Sampling(max_new_tokens=12, temperature=1.0)
    whole = generate(lm, prompts, sampling, seed=3)
    parts = [
        generate(lm, prompts[ours], sampling, 3, ours.start) for ours in (slice(0, 2), slice(2, 5))
    ]
    assert [*parts[0], *parts[1]] == whole


@pytest.mark.slow
def test_what_a_rank_refuses_is_said_once_and_by_the_exit_code(case: Case) -> None:
    spec = case.spec(BASIC.model_copy(update={"max_prompt_tokens": 10}), processes=2)
    with started(spec, case.folder / "refused") as program:
        output, _ = program.communicate(timeout=WAIT_S)
    assert program.returncode == EXIT_BAD_INPUT, output
    assert output.count("error: row alpha-0: the student's prompt has 14") == 1, output


def test_a_rank_that_is_killed_while_it_ends_keeps_what_it_said(tmp_path: Path) -> None:
    """The others end it as soon as the first has ended; its exit code is then the signal's."""
    file = tmp_path / "error.json"
    file.write_text('{"message": "row alpha-0: is bad", "exit_code": 2}')
    killed = ProcessFailure(0, 1, -signal.SIGTERM, str(file))
    refused = ProcessFailure(1, 2, EXIT_BAD_INPUT, str(file))
    with pytest.raises(BadInput, match="row alpha-0: is bad"):
        _not_finished({0: killed, 1: refused}, 2)


@pytest.mark.slow
def test_when_a_rank_is_killed_the_stage_stops_as_a_whole_and_goes_on(case: Case) -> None:
    spec = case.spec(LONG, checkpoint_every_steps=1, processes=2)
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
    spec = case.spec(LONG, checkpoint_every_steps=1, processes=2)
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


def nothing(rank: int, world: int) -> None:
    """What a rank does before it trains."""


def run_ranks(
    world: int,
    spec: StageSpec,
    directory: Path,
    stop: Stop | None = None,
    prepare: Callable[[int, int], None] = nothing,
) -> None:
    """Train in so many processes, as torchrun would start them; `stop` is the last one's."""
    directory.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    stops = [Stop()] * (world - 1) + [stop or Stop()]
    ranks = [
        CONTEXT.Process(
            target=be_rank, args=(rank, world, port, spec, directory, stops[rank], prepare)
        )
        for rank in range(world)
    ]
    for one in ranks:
        one.start()
    for one in ranks:
        one.join(WAIT_S)
    assert [one.exitcode for one in ranks] == [0] * world


def be_rank(
    rank: int,
    world: int,
    port: int,
    spec: StageSpec,
    directory: Path,
    stop: Stop,
    prepare: Callable[[int, int], None],
) -> None:
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
    prepare(rank, world)
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
        time.sleep(0.05)  # the ranks need the processor
