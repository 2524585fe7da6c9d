"""Stages that train adapters: what they leave, what they hold in memory, what they refuse."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from stages import BASIC, Case, StopAfter
from transformers import AutoModelForCausalLM

from schemas.base import BadInput
from schemas.settings import LoraSettings, TrainingSettings
from schemas.stage import StageRecord
from sdft.drawing import Sampling, log_probabilities
from sdft.lora import add_adapter, merged_weights, stacked
from sdft.model import LanguageModel, load_model
from sdft.modelfiles import model_files, model_hash
from sdft.record import verified_record
from sdft.rollout import generate
from sdft.scoring import completion_hidden
from sdft.stagelog import read_metrics
from sdft.teacher import open_teacher
from sdft.train import train

LORA = BASIC.model_copy(update={"lora": LoraSettings(rank=4, alpha=8)})
AVERAGED = LORA.model_copy(update={"teacher": "ema", "ema_rate": 0.1})
CPU = torch.device("cpu")


@pytest.mark.parametrize("training", [LORA, AVERAGED])
def test_the_model_is_the_parent_with_the_adapter_byte_for_byte(
    case: Case, training: TrainingSettings, tmp_path: Path
) -> None:
    """What plain peft makes of the two has the recorded hash; the adapter holds little else."""
    record, _, directory = case.run("stage", case.spec(training))
    parent = AutoModelForCausalLM.from_pretrained(case.model_dir)
    again = PeftModel.from_pretrained(parent, str(directory / "adapter")).merge_and_unload()
    again.save_pretrained(tmp_path / "again")
    for file in (directory / "model").iterdir():
        if not (tmp_path / "again" / file.name).exists():
            (tmp_path / "again" / file.name).write_bytes(file.read_bytes())
    assert model_hash(model_files(tmp_path / "again")) == record.model_hash
    assert {file.path for file in record.adapter} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    weights = next(one for one in record.adapter if one.path.endswith(".safetensors"))
    full = next(one for one in record.files if one.path == "model.safetensors")
    assert weights.size_bytes < full.size_bytes
    assert str(case.model_dir) not in (directory / "adapter" / "adapter_config.json").read_text()


def test_an_adapter_that_is_not_as_recorded_is_found(case: Case) -> None:
    _, _, directory = case.run("stage", case.spec(LORA))
    assert verified_record(directory) is not None
    weights = directory / "adapter" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BadInput, match=r"adapter/adapter_model\.safetensors: is not as"):
        verified_record(directory)


def test_stages_chain_and_the_next_starts_from_what_the_last_became(case: Case) -> None:
    first, losses, directory = case.run("first", case.spec(LORA))
    parent = {"parent_dir": str(directory / "model"), "parent_hash": first.model_hash}
    second, later, _ = case.run("second", case.spec(LORA).model_copy(update=parent))
    assert second.model_hash != first.model_hash
    assert later[0] < losses[0]  # the same data: its teacher is where the first stage led


@pytest.mark.parametrize("training", [LORA, AVERAGED])
def test_the_same_seed_gives_the_same_bytes_and_another_one_others(
    case: Case, training: TrainingSettings
) -> None:
    spec = case.spec(training)
    first, _, _ = case.run("first", spec)
    again, _, _ = case.run("again", spec)
    other, _, _ = case.run("other", spec.model_copy(update={"seed": 2}))
    assert (first.model_hash, first.adapter) == (again.model_hash, again.adapter)
    config = json.loads((case.folder / "first" / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"]), "in any process"
    assert other.model_hash != first.model_hash


@pytest.mark.parametrize("training", [LORA, AVERAGED])
def test_a_stopped_and_resumed_stage_equals_an_undisturbed_one(
    case: Case, training: TrainingSettings
) -> None:
    spec = case.spec(training)
    whole, losses, _ = case.run("whole", spec)
    (directory := case.folder / "stopped").mkdir()
    assert train(spec, directory, StopAfter(3)) is None
    saved = next((directory / "checkpoints").glob("step-*")) / "model.safetensors"
    assert saved.stat().st_size < (case.model_dir / "model.safetensors").stat().st_size
    resumed, again, _ = case.run("stopped", spec)
    assert (resumed.model_hash, again) == (whole.model_hash, losses)
    steps = [line.step for line in read_metrics(directory / "metrics.jsonl")]
    assert steps == list(range(1, whole.steps + 1))


def test_accumulating_4x1_equals_1x4(case: Case) -> None:
    _, whole, _ = case.run("whole", case.spec(AVERAGED))
    _, parts, _ = case.run("parts", case.spec(AVERAGED, micro_batch_tokens=1))
    assert parts == pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize(("training", "adapters"), [(LORA, 1), (AVERAGED, 2)])
def test_the_teacher_is_no_second_model(
    case: Case, training: TrainingSettings, adapters: int
) -> None:
    """Every parameter that student and teacher hold, counted once by where it lies."""
    lm = load_model(case.model_dir, CPU)
    weights = sum(one.numel() for one in lm.model.parameters())
    assert training.lora is not None
    student = add_adapter(lm.model, training.lora, seed=1)
    trained = sum(one.numel() for one in lm.model.parameters() if one.requires_grad)
    teacher = open_teacher(lm, student, case.spec(training))
    held = [*lm.model.parameters(), *teacher.model.parameters(), *teacher.averages.values()]
    unique = {one.data_ptr(): one.numel() for one in held}
    assert trained > 0
    assert sum(unique.values()) == weights + adapters * trained


def test_a_frozen_teacher_is_the_parent_whatever_the_student_became(case: Case) -> None:
    lm, ids = load_model(case.model_dir, CPU), torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        parent = lm.model(ids).logits
        student = add_adapter(lm.model, LoraSettings(rank=4), seed=1)
        teacher = open_teacher(lm, student, case.spec(LORA))
        learn(lm)
        assert not torch.allclose(lm.model(ids).logits, parent)
        with teacher.speaking():
            torch.testing.assert_close(teacher.model(ids).logits, parent)
        assert not torch.allclose(lm.model(ids).logits, parent)
    assert all(one.requires_grad for name, one in lm.model.named_parameters() if "lora_" in name)


def test_an_averaged_teacher_has_the_product_right(case: Case) -> None:
    """What it adds to a weight moves as the average of what the student adds: by its whole share.

    Averaging both factors from zero would move it by about the share's square.
    """
    rate, steps = 0.1, 5
    lm = load_model(case.model_dir, CPU)
    student = add_adapter(lm.model, LoraSettings(rank=4), seed=1)
    before = dict(merged_weights(lm.model))
    teacher = open_teacher(lm, student, case.spec(AVERAGED))
    learn(lm)
    after = dict(merged_weights(lm.model))
    trained = {name: one for name, one in lm.model.named_parameters() if one.requires_grad}
    for _ in range(steps):
        teacher.update(trained)
    share = 1 - (1 - rate) ** steps
    layer = "model.layers.0.self_attn.q_proj"
    averaged = student.get_submodule(f"base_model.model.{layer}").get_delta_weight("teacher")
    expected = share * (after[f"{layer}.weight"] - before[f"{layer}.weight"])
    assert (averaged - expected).norm() < 0.02 * expected.norm()


def test_answers_are_drawn_from_the_model_with_its_adapter(case: Case) -> None:
    """Decoding merges it into packed weights; the probabilities are those that scoring finds."""
    lm = load_model(case.model_dir, CPU)
    add_adapter(lm.model, LoraSettings(rank=4), seed=1)
    prompt, sampling = lm.prompt_ids([{"role": "user", "content": "hello"}]), Sampling(12, 0.7, 0.9)
    [plain] = generate(lm, [prompt], sampling, seed=3)
    learn(lm)
    [answer] = generate(lm, [prompt], sampling, seed=3)
    with torch.no_grad():
        logits = lm.head().logits(completion_hidden(lm.model, [prompt], [answer.tokens]))
    expected = log_probabilities(logits, torch.tensor(answer.tokens), sampling)
    torch.testing.assert_close(torch.tensor(answer.log_probs), expected, rtol=1e-3, atol=1e-3)
    assert answer.log_probs != pytest.approx(plain.log_probs, rel=1e-2)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_proj", "qq_proj"), "has no module 'qq_proj'; its linear layers are down_proj, gate_"),
        (("lm_head",), "'lm_head' is no linear layer below the output head; those are down_proj"),
        (("embed_tokens",), "'model.embed_tokens' is no linear layer"),
        (("self_attn",), "'model.layers.0.self_attn' is no linear layer"),
    ],
)
def test_targets_that_cannot_be_adapted_are_refused(
    case: Case, targets: tuple[str, ...], message: str
) -> None:
    training = BASIC.model_copy(update={"lora": LoraSettings(targets=targets)})
    with pytest.raises(BadInput, match=message):
        case.run("bad", case.spec(training))
    assert not (case.folder / "bad" / "metrics.jsonl").exists()


def test_only_the_named_layers_are_trained(case: Case) -> None:
    training = BASIC.model_copy(update={"lora": LoraSettings(targets=("q_proj",))})
    _, _, directory = case.run("stage", case.spec(training))
    before = load_model(case.model_dir, CPU).model.state_dict()
    after = load_model(directory / "model", CPU).model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("q_proj" in name for name in changed)


def test_stages_without_adapters_keep_the_form_that_they_had(case: Case) -> None:
    record, _, directory = case.run("stage", case.spec())
    assert "lora" not in record.spec.training.model_dump()
    assert '"adapter"' not in (directory / "record.json").read_text()
    assert case.spec(LORA).key != case.spec().key
    with_adapter, _, other = case.run("other", case.spec(LORA))
    assert StageRecord.read(other / "record.json") == with_adapter


def learn(lm: LanguageModel) -> None:
    """Move B, and A by little, as training does."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, one in lm.model.named_parameters():
            if ".default." in name:
                size = 0.3 if "lora_B" in name else 0.001
                one += size * torch.randn_like(one)


def test_adapters_of_several_stages_stack_to_what_their_merges_became(
    case: Case, tmp_path: Path
) -> None:
    """Also where the stages differ in rank, scale and layers."""
    first, _, below = case.run("first", case.spec(LORA))
    other = LoraSettings(rank=2, alpha=6, targets=("q_proj", "down_proj"))
    parent = {"parent_dir": str(below / "model"), "parent_hash": first.model_hash}
    training = BASIC.model_copy(update={"lora": other})
    second, _, above = case.run("second", case.spec(training).model_copy(update=parent))
    assert second.model_hash != first.model_hash

    adapters = [below / "adapter", above / "adapter"]
    stacked(case.model_dir, adapters).save_pretrained(str(tmp_path / "stack"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "stack")  # finds its base by itself
    models = [loaded, *(AutoModelForCausalLM.from_pretrained(d / "model") for d in (above, below))]
    with torch.no_grad():
        ids = torch.tensor([[5, 17, 200, 31, 8]])
        stack, after_second, after_first = (model(ids).logits for model in models)
    torch.testing.assert_close(stack, after_second, rtol=1e-4, atol=1e-4)
    assert (after_first - after_second).abs().max() > 1e-2
