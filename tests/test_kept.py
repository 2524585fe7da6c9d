"""A frozen teacher's prompts over a stage's epochs: read once, and the same numbers."""

import errno
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from conftest import save_tiny_model
from families import save_family
from stages import BASIC, Case, assert_weights_close
from test_prefix import ANSWERS, BEGINS, CPU, PLAIN, PROMPTS, SPECIAL
from transformers import PretrainedConfig

from schemas.settings import LoraSettings
from sdft.kept import KeptPrompts, open_kept
from sdft.model import LanguageModel, load_model
from sdft.scoring import completion_hidden
from sdft.teacher import Teacher


@pytest.mark.parametrize("shared", [BEGINS, []], ids=["shared", "nothing shared"])
@pytest.mark.parametrize("family", ["pocket's", *PLAIN])
def test_hidden_states_are_those_without_it(
    family: str, shared: list[int], tiny_dir: Path, tmp_path: Path
) -> None:
    directory = save_family(family, tmp_path / "model") if family in PLAIN else tiny_dir
    check_that_it_changes_nothing(load_model(directory, CPU), shared, tmp_path)


@pytest.mark.parametrize("config", SPECIAL, ids=lambda config: config.model_type)
def test_models_that_attend_in_a_way_of_their_own(config: PretrainedConfig, tmp_path: Path) -> None:
    lm = load_model(save_tiny_model(tmp_path / "model", config), CPU)
    check_that_it_changes_nothing(lm, BEGINS, tmp_path)


@torch.no_grad()
def check_that_it_changes_nothing(lm: LanguageModel, shared: list[int], folder: Path) -> None:
    lm.model.double()
    prompts = KeptPrompts(lm.model, shared, [PROMPTS[:2], PROMPTS[1:]], folder)
    plain_RD = completion_hidden(lm.model, PROMPTS, ANSWERS)
    for budget in (1, 1000):  # read at first, then kept
        hidden_RD = prompts.hidden(PROMPTS, ANSWERS, budget)
        torch.testing.assert_close(hidden_RD, plain_RD, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_in_bf16_they_differ_by_rounding_alone(tiny_dir: Path, tmp_path: Path) -> None:
    lm = load_model(tiny_dir, CPU, torch.bfloat16)
    with lm.computing():
        prompts = KeptPrompts(lm.model, BEGINS, [PROMPTS], tmp_path)
        plain_RD = completion_hidden(lm.model, PROMPTS, ANSWERS)
        hidden_RD = prompts.hidden(PROMPTS, ANSWERS, 1000)
    assert (hidden_RD - plain_RD).float().norm() < 0.02 * plain_RD.float().norm()


@torch.no_grad()
def test_a_prompt_has_the_same_bits_whenever_it_is_read(tiny_dir: Path, tmp_path: Path) -> None:
    """A stage that is resumed meets them in another order, and must come to the same weights."""
    lm = load_model(tiny_dir, CPU)
    groups = [PROMPTS, [[*BEGINS, number, *range(number % 7)] for number in range(90, 120)]]
    asked, answers = [groups[1][3], PROMPTS[1]], ANSWERS[:2]
    first = KeptPrompts(lm.model, BEGINS, groups, tmp_path)
    for group in groups:
        first.hidden(group, [[1]] * len(group), 64)
    resumed = KeptPrompts(lm.model, BEGINS, groups, tmp_path)
    assert torch.equal(first.hidden(asked, answers, 64), resumed.hidden(asked, answers, 64))


LORA = LoraSettings(rank=4)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_stage_reads_each_of_its_teachers_prompts_once(
    case: Case, lora: LoraSettings | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = BASIC.model_copy(update={"epochs": 3, "lora": lora})
    read = Counter[tuple[int, ...]]()
    real = KeptPrompts._read

    def reading(prompts: KeptPrompts, prompt: tuple[int, ...], budget: int) -> None:
        before = {*prompts._places}
        real(prompts, prompt, budget)
        read.update({*prompts._places} - before or [prompt])

    monkeypatch.setattr(KeptPrompts, "_read", reading)
    _, losses, once = case.run("once", case.spec(training))
    assert set(read.values()) == {1}
    assert len(read) == len(pq.read_table(case.file))
    monkeypatch.setattr("sdft.kept.MOST_BYTES", 0)
    _, again, each_time = case.run("each time", case.spec(training))
    assert set(read.values()) == {1}
    assert losses == pytest.approx(again, rel=1e-3)
    assert_weights_close(once, each_time)


@pytest.mark.parametrize("change", [{"epochs": 1}, {"teacher": "ema"}, {"method": "sft"}], ids=str)
def test_what_is_not_read_again_is_not_kept(
    case: Case, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(KeptPrompts, "__init__")  # nobody can be made: it takes no arguments
    case.run("stage", case.spec(BASIC.model_copy(update=change)))


def test_models_that_have_no_plain_states_do_without(case: Case, tmp_path: Path) -> None:
    lm = load_model(save_family("Gemma 2, soft-capped logits", tmp_path / "model"), CPU)
    assert open_kept(lm, Teacher(lm.model), PROMPTS, case.spec(), tmp_path) is None


def test_a_full_disk_is_met_before_the_first_step(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"No space left on device: ") as error:
        case.run("stage", case.spec())
    assert error.value.filename == str(case.folder / "stage")
    assert not (case.folder / "stage" / "metrics.jsonl").exists()
