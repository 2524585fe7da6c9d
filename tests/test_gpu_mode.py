"""What a GPU is run with, as far as a CPU can show it; the last tests need one."""

import shutil

import pytest
import torch
from stages import BASIC, OUT_OF_MEMORY, Case, assert_weights_close

from schemas.base import BadInput
from schemas.settings import LoraSettings, TrainingSettings
from sdft.divergence import row_loss, teacher_score
from sdft.drawing import Sampling
from sdft.gradient import StepGradient
from sdft.model import Head, LanguageModel, load_model, pick_compute, pick_device
from sdft.rollout import generate
from sdft.sampler import StudentSampler
from sdft.stagelog import read_metrics
from sdft.teacher import Teacher, open_teacher

CPU = torch.device("cpu")
LORA = BASIC.model_copy(update={"lora": LoraSettings(rank=4), "learning_rate": 1e-2})


def test_how_the_settings_resolve() -> None:
    cuda = torch.device("cuda")
    assert pick_compute("auto", CPU) == torch.float32
    assert pick_compute("bf16", CPU) == torch.bfloat16
    assert pick_compute("fp32", cuda) == torch.float32
    here = "cuda" if torch.cuda.is_available() else "cpu"
    assert pick_device("auto").type == here


@pytest.mark.parametrize("teacher", ["frozen", "ema"])
@pytest.mark.parametrize("training", [BASIC, LORA])
def test_bf16_follows_fp32(case: Case, training: TrainingSettings, teacher: str) -> None:
    """The same curve within bf16's rounding, though answers drift apart; what is saved is fp32."""
    training = training.model_copy(update={"teacher": teacher, "temperature": 0.01})
    _, exact, _ = case.run("fp32", case.spec(training))
    _, rounded, directory = case.run("bf16", case.spec(training, compute="bf16"))
    assert rounded[0] == pytest.approx(exact[0], rel=0.05)
    assert sum(rounded) == pytest.approx(sum(exact), rel=0.2)  # by CPU: 0.02 to over 0.1
    assert rounded != exact
    saved = load_model(directory / "model", CPU).model
    assert {one.dtype for one in saved.parameters()} == {torch.float32}


def test_a_frozen_teacher_is_kept_in_the_compute_dtype_and_averages_in_fp32(case: Case) -> None:
    lm = load_model(case.model_dir, CPU, torch.bfloat16)
    frozen = open_teacher(lm, None, case.spec())
    assert {one.dtype for one in frozen.model.parameters()} == {torch.bfloat16}
    assert {one.dtype for one in frozen.model.buffers()} == {torch.float32}  # rotary frequencies
    assert {one.dtype for one in lm.model.parameters()} == {torch.float32}
    averaged = open_teacher(lm, None, case.spec(BASIC.model_copy(update={"teacher": "ema"})))
    assert {one.dtype for one in averaged.averages.values()} == {torch.float32}


def test_averages_need_not_lie_where_the_student_is() -> None:
    on_another = {"weight": torch.zeros(2, device="meta")}
    Teacher(torch.nn.Linear(1, 1), rate=0.5, averages=on_another).update({"weight": torch.ones(2)})


def test_in_bf16_the_heads_gradient_is_summed_in_fp32() -> None:
    """64 rows of which each adds less than bf16 could add to the sum of those before."""
    torch.manual_seed(0)
    hidden = torch.randn(512, 16, dtype=torch.bfloat16)
    weight = torch.randn(40, 16, requires_grad=True)
    other = Head(torch.randn(40, 16, dtype=torch.bfloat16), None, None)
    share = torch.full((512,), 1 / 512)

    def gradient(rows: torch.Tensor, head: Head, teacher: Head) -> torch.Tensor:
        weight.grad = None
        score = teacher_score("forward_kl", 0.5, rows, teacher)
        row_loss(rows, head, share, score, chunk_rows=4)[0].backward()
        assert weight.grad is not None
        return weight.grad

    rounded = weight.detach().bfloat16().float()
    found = gradient(hidden, Head(weight, None, None), other)
    with torch.no_grad():
        weight.copy_(rounded)
    exact = gradient(hidden.float(), Head(weight, None, None), other.to(torch.float32))
    assert found.dtype == torch.float32
    assert (found - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("training", [BASIC, LORA])
def test_gradient_checkpointing_changes_nothing(case: Case, training: TrainingSettings) -> None:
    _, plain, one = case.run("plain", case.spec(training))
    _, again, other = case.run("again", case.spec(training, gradient_checkpointing=True))
    assert again == pytest.approx(plain, rel=1e-3)
    assert_weights_close(one, other)


def test_gradient_checkpointing_runs_layers_twice(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    real, passes = LlamaMLP.forward, list[bool]()

    def counted(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        passes.append(torch.is_grad_enabled())
        return real(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    case.run("plain", case.spec(gradient_checkpointing=False))
    plain = sum(passes)
    passes.clear()
    case.run("again", case.spec(gradient_checkpointing=True))
    assert sum(passes) > 0.9 * plain  # with gradients only in the second pass
    assert len(passes) > 1.2 * plain


@pytest.mark.parametrize(("supports", "device"), [(False, "cuda"), (True, "cpu"), (True, "cuda")])
def test_layers_are_run_again_by_default_on_a_gpu_where_the_class_can(
    case: Case, supports: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = load_model(case.model_dir, CPU)
    monkeypatch.setattr(type(lm.model), "supports_gradient_checkpointing", supports)
    monkeypatch.setattr(LanguageModel, "device", torch.device(device))
    StepGradient(lm, None, StudentSampler(lm), [], case.spec())
    assert lm.model.is_gradient_checkpointing is (supports and device == "cuda")


def test_a_class_that_cannot_run_layers_again_is_refused_where_it_is_asked_to(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = load_model(case.model_dir, CPU)
    monkeypatch.setattr(type(lm.model), "supports_gradient_checkpointing", False)
    with pytest.raises(BadInput, match=r"gradient_checkpointing is true, which a LlamaForC.* out$"):
        case.run("again", case.spec(gradient_checkpointing=True))


def test_an_offloaded_teacher_teaches_the_same(case: Case) -> None:
    record, losses, _ = case.run("beside", case.spec())
    other, again, _ = case.run("offloaded", case.spec(offload_teacher=True))
    assert (other.model_hash, again) == (record.model_hash, losses)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
def test_where_memory_runs_out_answers_are_sampled_in_smaller_parts(
    case: Case,
    error: RuntimeError,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lm = load_model(case.model_dir, CPU)
    prompts = [lm.prompt_ids([{"role": "user", "content": "a" * size}]) for size in range(1, 6)]
    whole = generate(lm, prompts, Sampling(8, 1.0), seed=1)
    real = lm.model.forward

    def small(*args: object, **kwargs: object) -> object:
        ids = kwargs["input_ids"]
        assert isinstance(ids, torch.Tensor)
        if len(ids) > 2:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(lm.model, "forward", small)
    assert generate(lm, prompts, Sampling(8, 1.0), seed=1) == whole
    assert "out of memory: samples 2 answers at a time" in capsys.readouterr().out


def test_an_error_that_is_not_of_memory_is_no_reason_to_go_on(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = load_model(case.model_dir, CPU)

    def broken(*_: object, **__: object) -> object:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(lm.model, "forward", broken)
    with pytest.raises(RuntimeError, match="device-side assert"):
        generate(lm, [[1, 2], [3, 4]], Sampling(8, 1.0), seed=1)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_model_learns_the_same(case: Case) -> None:
    _, plain, one = case.run("plain", case.spec())
    _, again, other = case.run("compiled", case.spec(compile=True))
    assert again == pytest.approx(plain, rel=1e-3)
    assert_weights_close(one, other)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("training", [BASIC, LORA])
def test_a_stage_on_a_gpu(case: Case, training: TrainingSettings) -> None:
    """bf16, checkpointing and the fused optimizer are on by themselves; its memory is told."""
    _, exact, _ = case.run("cpu", case.spec(training))
    _, losses, directory = case.run("gpu", case.spec(training, device="cuda"))
    assert losses == pytest.approx(exact, rel=0.2)
    last = read_metrics(directory / "metrics.jsonl")[-1].metrics
    assert last["gpu_peak_bytes"] > 0
