"""Our loss of a step beside TRL's full-vocabulary forward KL, on the same rollouts.

    python benchmarks/peer_loss.py

TRL 1.16's own function is given the logits of plain passes, and its mean over sequences of the
mean over tokens is taken; ours comes from the trainer's `StepGradient`, in several micro-batches,
with shared prefixes. Ends with an error where they differ by more than 1e-5.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trl.experimental.sdft.loss_utils import compute_full_logit_self_distillation_loss

from schemas.settings import RuntimeSettings, TrainingSettings
from schemas.stage import StageSpec
from schemas.templates import teacher_messages
from sdft.data import as_messages
from sdft.drawing import Sampling
from sdft.gradient import Example, StepGradient
from sdft.model import LanguageModel, load_model
from sdft.rollout import Completion, generate
from sdft.sampler import StudentSampler
from sdft.teacher import open_teacher

QUICKSTART = Path(__file__).parent.parent / "examples" / "quickstart"
MOST = 1e-5


def main() -> None:
    lm = load_model(QUICKSTART / "pocket", torch.device("cpu"))
    training = TrainingSettings(max_new_tokens=28)
    spec = StageSpec(
        skill="courier",
        parent_dir="",
        parent_hash="",
        train_file="",
        data_hash="",
        seed=0,
        training=training,
        runtime=RuntimeSettings(),
    )
    teacher = open_teacher(lm, None, spec)
    torch.manual_seed(0)
    with torch.no_grad():  # a student that is no longer its teacher, also without a demonstration
        for weight in lm.model.parameters():
            weight += 0.01 * weight.std() * torch.randn_like(weight)
    lines = (QUICKSTART / "skills" / "courier" / "train.jsonl").read_text().splitlines()[:32]
    examples = [example(lm, json.loads(line), training.teacher_template) for line in lines]
    prompts = [one.student_prompt for one in examples]
    answers = generate(lm, prompts, Sampling.of(training), seed=0)
    step = StepGradient(lm, teacher, StudentSampler(lm), examples, spec)
    ours = step.accumulate(examples, answers)[1]["divergence"]
    theirs = peer_loss(lm, teacher.model, examples, answers)
    print(f"ours {ours:.8f}   TRL {theirs:.8f}   difference {abs(ours - theirs):.1e}")
    if abs(ours - theirs) > MOST:
        raise SystemExit(f"they differ by more than {MOST}")


def example(lm: LanguageModel, row: dict[str, Any], template: str) -> Example:
    messages = as_messages(row["prompt"])
    assert messages is not None
    taught = teacher_messages(messages, row["response"], None, template)
    shown = Completion([lm.end_of_turn], finished=True)
    student = lm.prompt_ids(messages)
    return Example("", student, lm.prompt_ids(taught), shown)


@torch.no_grad()
def peer_loss(
    lm: LanguageModel, teacher: Any, examples: list[Example], answers: list[Completion]
) -> float:
    """TRL's per-token loss, aggregated as its trainer does."""
    student_BTV = completion_logits(lm.model, [one.student_prompt for one in examples], answers)
    teacher_BTV = completion_logits(teacher, [one.teacher_prompt for one in examples], answers)
    loss_BT = compute_full_logit_self_distillation_loss(
        student_BTV, teacher_BTV, distillation_alpha=0.0
    )
    mask_BT = pad_sequence([torch.ones(len(one.tokens)) for one in answers], batch_first=True)
    return ((loss_BT * mask_BT).sum(-1) / mask_BT.sum(-1)).mean().item()


def completion_logits(model: Any, prompts: list[list[int]], answers: list[Completion]) -> Tensor:
    """[B, T, V]: what predicts each completion's tokens, sequence by sequence, padded."""
    logits = [
        model(torch.tensor([prompt + answer.tokens])).logits[0, len(prompt) - 1 : -1]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return pad_sequence(logits, batch_first=True)


if __name__ == "__main__":
    main()
