"""The trainer on a tiny model: what it must reproduce, and what it must not depend on."""

import itertools
import json
import os
import pkgutil
import shutil
import signal
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from conftest import train_rows
from stages import BASIC, OUT_OF_MEMORY, Case, StopAfter, assert_weights_close
from torch.nn import Parameter

from schemas.base import BadInput
from schemas.settings import LoraSettings, RuntimeSettings, TrainingSettings
from schemas.stage import StageRecord
from sdft.checkpoint import Checkpoints, is_due
from sdft.data import train_table, write_table
from sdft.lora import add_adapter
from sdft.model import LanguageModel, load_model
from sdft.process import StageFailed, Stop
from sdft.rollout import Completion, generate
from sdft.scoring import completion_hidden
from sdft.stagelog import read_metrics
from sdft.teacher import Teacher, open_teacher
from sdft.train import Diverged, Unhealthy, train

GOLDEN = json.loads((Path(__file__).parent / "golden_trajectory.json").read_text())


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_trajectory(case: Case, name: str) -> None:
    """A change that moves these must raise ALGORITHM_VERSION and say why."""
    training = BASIC.model_copy(update=GOLDEN[name]["settings"])
    _, losses, _ = case.run("golden", case.spec(training))
    assert losses == pytest.approx(GOLDEN[name]["losses"], rel=2e-3)


def test_the_same_seed_gives_the_same_bytes(case: Case) -> None:
    first, losses, one = case.run("first", case.spec())
    second, again, other = case.run("second", case.spec())
    assert first.model_hash == second.model_hash
    assert losses == again
    names = ["model/model.safetensors", "model/tokenizer.json", "model/config.json"]
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in names)
    other_seed = case.spec().model_copy(update={"seed": 2})
    assert case.run("third", other_seed)[0].model_hash != first.model_hash


@pytest.mark.parametrize("method", ["sdft", "sft"])
def test_accumulating_4x1_equals_1x4(case: Case, method: str) -> None:
    training = BASIC.model_copy(update={"method": method})
    _, whole, one = case.run("whole", case.spec(training))
    _, parts, other = case.run("parts", case.spec(training, micro_batch_tokens=1))
    assert parts == pytest.approx(whole, rel=1e-3)
    assert_weights_close(one, other)


def test_an_anchor_teaches_the_student_to_stay(case: Case) -> None:
    """Both see the same, so at first there is nothing to learn of it; later there is."""
    rows = [*train_rows(2), *({"id": f"anchor-{n}", "prompt": f"Name {n}"} for n in range(2))]
    table = train_table(rows)
    write_table(table, case.file)
    training = BASIC.model_copy(update={"epochs": 4, "prompts_per_step": 4, "warmup_steps": 0})
    spec = case.spec(training, rollouts_a_step=4)
    _, _, directory = case.run("anchored", spec)
    found = [
        row
        for path in sorted((directory / "rollouts").iterdir())
        for row in pq.read_table(path).to_pylist()
    ]
    by_step: dict[int, dict[str, float]] = {}
    for row in found:
        by_step.setdefault(row["step"], {})[row["id"]] = row["divergence"]
    first, last = by_step[1], by_step[max(by_step)]
    assert [abs(first[f"anchor-{n}"]) < 1e-6 for n in range(2)] == [True, True]
    assert min(first["alpha-0"], first["alpha-1"]) > 1e-3
    assert min(last["anchor-0"], last["anchor-1"]) > 1e-6, "the student has moved"

    sft = spec.model_copy(update={"training": training.model_copy(update={"method": "sft"})})
    with pytest.raises(BadInput, match="row anchor-0: has no response; SFT learns nothing else"):
        case.run("sft", sft)


def test_what_prompts_share_takes_no_room_in_a_micro_batch(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long system message must not leave one sequence a pass."""
    passes = list[tuple[int, int]]()  # own tokens, and how many were shared

    def hidden(model: Any, prompts: Any, completions: Any, prefix: Any) -> Any:
        if torch.is_grad_enabled():
            shared = len(prompts) * len(prefix.tokens)
            passes.append((sum(map(len, [*prompts, *completions])) - shared, shared))
        return completion_hidden(model, prompts, completions, prefix)

    monkeypatch.setattr("sdft.gradient.completion_hidden", hidden)
    record, _, _ = case.run("whole", case.spec(micro_batch_tokens=80))
    assert len(passes) == record.steps
    assert max(own for own, _ in passes) <= 80 < max(map(sum, passes))


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
def test_where_memory_runs_out_the_step_goes_on_in_smaller_parts(
    case: Case,
    error: RuntimeError,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, whole, one = case.run("whole", case.spec())
    limit_memory(monkeypatch, tokens=40, error=error)
    _, parts, other = case.run("parts", case.spec())
    assert "out of memory: goes on with 30 tokens at a time" in capsys.readouterr().out
    assert parts == pytest.approx(whole, rel=1e-3)
    assert_weights_close(one, other)


def test_a_sequence_that_is_too_much_by_itself_is_said(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_memory(monkeypatch, tokens=1)
    with pytest.raises(StageFailed, match=r"a single sequence .* lower training\.max_new_tokens"):
        case.run("whole", case.spec())


def test_a_stage_that_learns_from_no_token_is_stopped_and_says_what_to_change(
    case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def says_nothing(lm: LanguageModel, prompts: list[list[int]], *_: object) -> list[Completion]:
        return [Completion([lm.end_of_turn], finished=True)] * len(prompts)

    monkeypatch.setattr("sdft.sampler.generate", says_nothing)
    training = BASIC.model_copy(update={"epochs": 3, "skip_first_tokens": 1})
    with pytest.raises(Unhealthy, match=r"step 5: no completion .*skip_first_tokens 1,.* lower it"):
        case.run("stopped", case.spec(training))
    assert (case.folder / "stopped" / "rollouts" / "step-000005.parquet").is_file()
    record, _, _ = case.run("warned", case.spec(training, health="warn"))
    assert record.steps == 9
    assert capsys.readouterr().out.count("warning: step 5: no completion") == 1


def test_short_questions_with_long_teachers_are_taken_apart_to_the_last(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Micro-batches hold so many of the student's tokens; it is the teacher's that are too many."""
    rows = [row | {"context": f"{number}" * 80} for number, row in enumerate(train_rows(4))]
    rows[0]["prompt"] += "0" * 30
    write_table(train_table(rows), case.file)
    spec = case.spec(BASIC.model_copy(update={"epochs": 1}))
    _, losses, _ = case.run("whole", spec)
    limit_memory(monkeypatch, tokens=200, of="teacher")
    _, again, _ = case.run("parts", spec)
    assert again == pytest.approx(losses, rel=1e-4)


def limit_memory(
    monkeypatch: pytest.MonkeyPatch,
    tokens: int,
    of: str = "student",
    error: RuntimeError = OUT_OF_MEMORY[0],
) -> None:
    """A device on which so many tokens of one of the two can be computed at once."""

    def hidden(model: Any, prompts: Any, completions: Any, prefix: Any) -> Any:
        length = sum(map(len, [*prompts, *completions])) - len(prompts) * len(prefix.tokens)
        if torch.is_grad_enabled() == (of == "student") and length > tokens:
            raise error
        return completion_hidden(model, prompts, completions, prefix)

    monkeypatch.setattr("sdft.gradient.completion_hidden", hidden)


@pytest.mark.parametrize("teacher", ["frozen", "ema"])
def test_a_stopped_and_resumed_stage_equals_an_undisturbed_one(case: Case, teacher: str) -> None:
    spec = case.spec(BASIC.model_copy(update={"teacher": teacher}))
    record, losses, _ = case.run("whole", spec)
    directory = case.folder / "stopped"
    directory.mkdir()
    stop = StopAfter(3)
    assert train(spec, directory, stop) is None
    assert not (directory / "record.json").exists()
    resumed, again, _ = case.run("stopped", spec)
    assert resumed.model_hash == record.model_hash
    assert again == losses
    steps = [line.step for line in read_metrics(directory / "metrics.jsonl")]
    assert steps == list(range(1, record.steps + 1))


def test_a_stage_that_is_stopped_before_its_first_gradient_goes_on(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No answer of the first steps is longer than what is skipped, so there is no optimizer yet."""
    calls = itertools.count()

    def says_nothing_at_first(lm: LanguageModel, *args: Any) -> list[Completion]:
        answers = generate(lm, *args)
        short = [Completion([lm.end_of_turn], finished=True)] * len(answers)
        return short if next(calls) < 2 else answers

    monkeypatch.setattr("sdft.sampler.generate", says_nothing_at_first)
    spec = case.spec(BASIC.model_copy(update={"skip_first_tokens": 1}))
    record, losses, _ = case.run("whole", spec)
    calls = itertools.count()
    (directory := case.folder / "stopped").mkdir()
    assert train(spec, directory, StopAfter(2)) is None
    resumed, again, _ = case.run("stopped", spec)
    assert (resumed.model_hash, again) == (record.model_hash, losses)


def test_answers_that_are_not_finite_end_the_stage(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a step that was too long; they are sampled, for no draw may go beyond the words."""
    real, calls = Checkpoints.due, itertools.count()

    def damaged(self: Checkpoints, step: int) -> bool:
        if next(calls) == 1:
            with torch.no_grad():
                next(iter(self.trained.values())).fill_(torch.nan)
        return real(self, step)

    monkeypatch.setattr(Checkpoints, "due", damaged)
    with pytest.raises(Diverged, match=r"step 3: .* logits are not finite; try a learning rate be"):
        case.run("diverged", case.spec())


def flip(newest: Path) -> None:
    content = bytearray((newest / "model.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (newest / "model.safetensors").write_bytes(content)


def cut(newest: Path) -> None:
    content = (newest / "optimizer.safetensors").read_bytes()
    (newest / "optimizer.safetensors").write_bytes(content[: len(content) // 2])


def swap_manifests(newest: Path) -> None:
    older = newest.with_name("step-000002")
    for name in ("manifest.json", "metrics.jsonl"):
        (newest / name).write_bytes((older / name).read_bytes())


DAMAGE = {
    "a flipped bit": flip,
    "a file cut short": cut,
    "the manifest of another": swap_manifests,
    "no manifest": lambda newest: (newest / "manifest.json").unlink(),
    "no mark": lambda newest: (newest / "COMPLETE").unlink(),
    "a file too many": lambda newest: (newest / "more.safetensors").touch(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(
    case: Case, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = case.spec(checkpoint_every_steps=1)
    record, _, _ = case.run("whole", spec)
    directory = case.folder / "damaged"
    directory.mkdir()
    assert train(spec, directory, StopAfter(3)) is None
    newest = directory / "checkpoints" / "step-000003"
    DAMAGE[damage](newest)
    resumed, _, _ = case.run("damaged", spec)
    said = capsys.readouterr().out
    assert "checkpoint step-000003 is set aside: " in said
    assert "goes on after step 2" in said
    assert resumed.model_hash == record.model_hash
    assert list((directory / "checkpoints").glob("bad-*"))


@pytest.mark.parametrize(
    ("settings", "step", "since_s", "elapsed_s", "saving_s", "due"),
    [
        ({"checkpoint_every_steps": 3}, 6, 0, 0, 1000, True),
        ({"checkpoint_every_steps": 3}, 7, 10, 10, 0, False),
        ({}, 1000, 299, 299, 0, False),
        ({}, 1000, 301, 301, 0, True),  # the first one, whose cost nobody knows
        ({}, 1000, 301, 610, 30, True),
        ({}, 1000, 301, 610, 31, False),  # 31 s in 610 s would be more than 5%
        ({}, 1000, 311, 620, 31, True),
        ({"checkpoint_every_steps": 3, "checkpoint_every_s": 5}, 7, 6, 6, 0.1, True),
    ],
)
def test_when_a_checkpoint_is_due(
    settings: dict[str, float],
    step: int,
    since_s: float,
    elapsed_s: float,
    saving_s: float,
    due: bool,
) -> None:
    runtime = RuntimeSettings.model_validate(settings)
    assert is_due(runtime, step, since_s, elapsed_s, saving_s) is due


def test_sdft_learns_from_the_teacher_and_keeps_its_record(case: Case) -> None:
    training = BASIC.model_copy(update={"epochs": 8, "learning_rate": 1e-2})
    record, losses, directory = case.run("long", case.spec(training))
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    assert record.steps == 24
    rollouts = pq.read_table(directory / "rollouts")
    assert set(rollouts["step"].to_pylist()) == set(range(1, 25))
    assert StageRecord.read(directory / "record.json") == record
    load_model(directory / "model", torch.device("cpu"))


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=4)])
def test_ema_follows_its_closed_form(case: Case, lora: LoraSettings | None) -> None:
    """After t updates towards a fixed student: student - (student - start) (1 - rate)^t."""
    training = TrainingSettings(teacher="ema", ema_rate=0.02, lora=lora)
    trained, teacher = opened(case, training)
    start = {name: value.clone() for name, value in trained.items()}
    with torch.no_grad():
        for value in trained.values():
            value += 1.0
    for _ in range(10):
        teacher.update(trained)
    assert teacher.averages.keys() == trained.keys()
    for name, average in teacher.averages.items():
        expected = start[name] + 1.0 - (1 - 0.02) ** 10
        torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-5)


def test_a_frozen_teacher_stays_as_it_was(case: Case) -> None:
    trained, teacher = opened(case, TrainingSettings())
    before = [value.clone() for value in teacher.model.parameters()]
    with torch.no_grad():
        for value in trained.values():
            value += 1.0
    teacher.update(trained)
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.model.parameters(), strict=True))
    assert not teacher.averages


def opened(case: Case, training: TrainingSettings) -> tuple[dict[str, Parameter], Teacher]:
    """What is trained, and the teacher."""
    spec = case.spec(training)
    lm = load_model(case.model_dir, torch.device("cpu"))
    adapter = add_adapter(lm.model, training.lora, spec.seed) if training.lora else None
    teacher = open_teacher(lm, adapter, spec)
    return {n: one for n, one in lm.model.named_parameters() if one.requires_grad}, teacher


def test_every_setting_that_changes_the_result_changes_the_key(case: Case) -> None:
    spec = case.spec()
    changes: dict[str, object] = {
        "method": "sft",
        "divergence": "jsd",
        "learning_rate": 1e-4,
        "temperature": 0.5,
        "teacher_template": "paper",
        "skip_first_tokens": 1,
    }
    settings = [BASIC.model_copy(update={name: value}) for name, value in changes.items()]
    keys = {spec.model_copy(update={"training": one}).key for one in settings}
    assert len(keys | {spec.key}) == len(changes) + 1
    assert spec.model_copy(update={"seed": 7}).key != spec.key
    runtime = RuntimeSettings(micro_batch_tokens=1)
    moved = {"train_file": "/elsewhere", "parent_dir": "/other", "runtime": runtime}
    assert spec.model_copy(update=moved).key == spec.key


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"max_prompt_tokens": 10},
            r"the student's prompt has 14 .* limit is 10 \(max_prompt_tokens\); .*or raise it",
        ),
        (
            {"max_new_tokens": 220},
            r"the teacher's prompt has .* \(256 positions less max_new_tokens\); .* lower max_new",
        ),
        ({"max_new_tokens": 3}, "the response has 9 tokens"),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_the_numbers(
    case: Case, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        case.run("bad", case.spec(BASIC.model_copy(update=settings)))
    assert not (case.folder / "bad" / "record.json").exists()


def test_no_teachers_prompt_limits_plain_fine_tuning(case: Case) -> None:
    case.run("sft", case.spec(BASIC.model_copy(update={"method": "sft", "max_prompt_tokens": 14})))


def test_weights_in_other_formats_do_not_go_on_to_the_stages_model(
    case: Case, tmp_path: Path
) -> None:
    parent = shutil.copytree(case.model_dir, tmp_path / "parent")
    for name in ("model.onnx", "tf_model.h5", "consolidated.00.pth", "NOTICE.txt"):
        (parent / name).write_text("as it was")
    moved = {"parent_dir": str(parent)}
    _, _, directory = case.run("stage", case.spec().model_copy(update=moved))
    known = {path.name for path in case.model_dir.iterdir()} | {"NOTICE.txt"}
    assert {path.name for path in (directory / "model").iterdir()} == known


def test_a_model_of_which_nothing_can_be_trained_is_refused(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_quantised(*args: Any) -> LanguageModel:
        lm = load_model(*args)
        lm.model.requires_grad_(False)
        return lm

    monkeypatch.setattr("sdft.train.load_model", as_quantised)
    with pytest.raises(BadInput, match=r"none of its weights can be trained .*training\.lora"):
        case.run("bad", case.spec())
    assert not (case.folder / "bad" / "metrics.jsonl").exists()


AFTER_THE_LAST_STEP = {
    "sdft.train:finish_stage",
    "sdft.record:model_files",
    "sdft.record:code_version",
}


@pytest.mark.parametrize(
    ("place", "turn"),
    [
        ("sdft.sampler:generate", 2),
        ("sdft.stagelog:StageLog.step", 2),
        ("sdft.stagelog:StageLog.flush_rollouts", 1),
        ("sdft.checkpoint:Checkpoints.save", 1),
        ("sdft.tensorfiles:save_file", 1),
        ("sdft.tensorfiles:save_file", 2),
        ("sdft.checkpoint:all_files", 1),
        ("sdft.checkpoint:sync", 1),
        *((place, 1) for place in sorted(AFTER_THE_LAST_STEP)),
    ],
)
def test_sigterm_at_every_save_boundary_loses_nothing(
    case: Case, place: str, turn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = case.spec(checkpoint_every_steps=2)
    undisturbed, losses, _ = case.run("undisturbed", spec)
    real, calls = pkgutil.resolve_name(place), itertools.count(1)

    def terminated(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == turn:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(place.replace(":", "."), terminated)
    (directory := case.folder / "terminated").mkdir()
    with listening(Stop()) as stop:
        ended = train(spec, directory, stop)
    assert stop.requested
    assert (ended is None) == (place not in AFTER_THE_LAST_STEP)
    record, again, _ = case.run("terminated", spec)
    assert (record.model_hash, again) == (undisturbed.model_hash, losses)


@contextmanager
def listening(stop: Stop) -> Generator[Stop]:
    """Signals go to `stop` for a while."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    stop.listen()
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
