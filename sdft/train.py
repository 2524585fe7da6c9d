"""One stage of self-distillation fine-tuning, or of the SFT baseline: the trainer process.

    python -m sdft.train SPEC.json STAGE_DIRECTORY

reads a `StageSpec`, writes metrics.jsonl, rollouts/, checkpoints/, model/ and, last, record.json.
Run again after any interruption it goes on from the last good checkpoint; a finished stage is left
as it is.

Shapes: R loss rows (completion tokens of a micro-batch, sequence after sequence), D hidden width.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from schemas.base import BadInput
from schemas.settings import TrainingSettings
from schemas.stage import StageRecord, StageSpec
from schemas.templates import student_messages, teacher_messages
from sdft.checkpoint import Checkpoints
from sdft.data import Demonstration, read_demonstrations
from sdft.divergence import row_loss, teacher_score, token_score
from sdft.model import LanguageModel, load_model, pick_device
from sdft.process import StageFailed, Stop, exclusive, run_program
from sdft.record import finish_stage
from sdft.rollout import Completion, Sampling, generate
from sdft.schedule import batch, learning_rate, step_seed, total_steps
from sdft.scoring import completion_hidden
from sdft.stagelog import StageLog
from sdft.teacher import Teacher


@dataclass(frozen=True)
class Example:
    """A demonstration as the two models see it."""

    id: str
    student_prompt: list[int]
    teacher_prompt: list[int]
    demonstration: Completion


class Diverged(StageFailed):
    """The loss or its gradient is no longer finite; the last checkpoint is untouched."""


def train(spec: StageSpec, directory: Path, stop: Stop) -> StageRecord | None:
    """Train one stage; returns its record, or None when `stop` was asked for and a checkpoint made.

    Raises BadInput before the first step for settings or data that do not fit the model, and
    Diverged for a loss or gradient that is not finite.
    """
    settings, runtime, started = spec.training, spec.runtime, time.monotonic()
    lm = load_model(Path(spec.parent_dir), pick_device(runtime.device))
    examples = [_example(lm, row, settings) for row in read_demonstrations(Path(spec.train_file))]
    check_lengths(lm, examples, settings)
    steps = total_steps(settings, len(examples))
    optimizer = torch.optim.AdamW(lm.model.parameters(), weight_decay=settings.weight_decay)
    teacher = Teacher(lm.model, settings) if settings.method == "sdft" else None
    checkpoints = Checkpoints(
        directory / "checkpoints", spec.key, runtime, lm.model, optimizer, teacher
    )
    first, known = checkpoints.load()
    print(f"goes on after step {first}", flush=True)
    log = StageLog(directory, known)

    for step in range(first, steps):
        began = time.monotonic()
        chosen = [examples[row] for row in batch(settings, len(examples), spec.seed, step)]
        torch.manual_seed(seed := step_seed(spec.seed, step))
        if teacher:
            answers = rollouts(lm, chosen, settings, seed)
        else:
            answers = [example.demonstration for example in chosen]
        losses, metrics = backward(lm, teacher, chosen, answers, spec)
        norm = torch.nn.utils.clip_grad_norm_(lm.model.parameters(), settings.max_grad_norm)
        if not math.isfinite(metrics["divergence"] + norm.item()):
            raise Diverged(
                f"step {step + 1}: divergence {metrics['divergence']}, gradient norm {norm}; try a "
                f"learning rate below {settings.learning_rate} or a longer warm-up"
            )
        rate = learning_rate(settings, step, steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if teacher:
            teacher.update(lm.model)

        seconds = time.monotonic() - began
        tokens = sum(len(answer.tokens) for answer in answers)
        metrics |= {
            "completion_tokens": tokens / len(answers),
            "clipped_share": sum(not answer.finished for answer in answers) / len(answers),
            "grad_norm": norm.item(),
            "learning_rate": rate,
            "tokens_per_s": tokens / seconds,
        }
        log.step(step + 1, metrics)
        for example, answer, loss in list(zip(chosen, answers, losses, strict=True))[
            : runtime.rollouts_a_step
        ]:
            log.rollout(
                step=step + 1,
                id=example.id,
                prompt=lm.text(example.student_prompt),
                completion=lm.text(answer.tokens),
                tokens=len(answer.tokens),
                finished=answer.finished,
                divergence=loss,
            )
        stopped = stop.requested  # asked once, for it may be set between two looks
        if checkpoints.due(step + 1) or stopped:
            log.flush_rollouts(step + 1)
            checkpoints.save(step + 1, log.lines)
        if stopped:
            return None
    log.flush_rollouts(steps)
    seconds = time.monotonic() - started
    return finish_stage(spec, directory, lm, steps, seconds, checkpoints.seconds)


def rollouts(
    lm: LanguageModel, chosen: list[Example], settings: TrainingSettings, seed: int
) -> list[Completion]:
    """The student's own answers, sampled without the demonstration (paper, algorithm 1)."""
    lm.model.eval()
    sampling = Sampling(settings.max_new_tokens, settings.temperature, settings.top_p)
    return generate(lm, [example.student_prompt for example in chosen], sampling, seed)


def backward(
    lm: LanguageModel,
    teacher: Teacher | None,
    chosen: list[Example],
    answers: list[Completion],
    spec: StageSpec,
) -> tuple[list[float], dict[str, float]]:
    """Add the step's gradient, micro-batch by micro-batch.

    The loss is the mean over sequences of the mean over a sequence's tokens. Returns each
    sequence's divergence, and the step's divergence and student entropy in nats a token.
    """
    settings, skip = spec.training, spec.training.skip_first_tokens
    lengths = [max(0, len(answer.tokens) - skip) for answer in answers]
    counted = sum(length > 0 for length in lengths)
    if not counted:  # every completion is shorter than `skip`: nothing to learn in this step
        return [0.0] * len(chosen), {"divergence": 0.0, "entropy": 0.0}
    lm.model.train()
    losses: list[float] = []
    entropies: list[float] = []
    size = spec.runtime.micro_batch or len(chosen)
    for start in range(0, len(chosen), size):
        part = slice(start, start + size)
        rows = torch.tensor(lengths[part], device=lm.device)
        if not rows.sum():
            losses += [0.0] * len(rows)
            continue
        tokens = [answer.tokens for answer in answers[part]]
        if teacher:
            prompts = [example.teacher_prompt for example in chosen[part]]
            with torch.no_grad():
                teacher_RD = completion_hidden(teacher.model, prompts, tokens, skip)
            head = lm.head(teacher.model)
            score = teacher_score(settings.divergence, settings.jsd_beta, teacher_RD, head)
        else:
            score = token_score(
                torch.tensor([t for one in tokens for t in one[skip:]], device=lm.device)
            )
        prompts = [example.student_prompt for example in chosen[part]]
        student_RD = completion_hidden(lm.model, prompts, tokens, skip)
        weight_R = (1.0 / (counted * rows.clamp(min=1))).repeat_interleave(rows)
        loss, loss_R, entropy_R = row_loss(student_RD, lm.head(), weight_R, score)
        loss.backward()
        losses += [one.mean().item() if len(one) else 0.0 for one in loss_R.split(rows.tolist())]
        entropies.append((entropy_R * weight_R).sum().item())
    return losses, {"divergence": sum(losses) / counted, "entropy": sum(entropies)}


def _example(lm: LanguageModel, row: Demonstration, settings: TrainingSettings) -> Example:
    taught = teacher_messages(row.messages, row.response, row.context, settings.teacher_template)
    response = lm.tokenizer.encode(row.response, add_special_tokens=False)
    return Example(
        id=row.id,
        student_prompt=lm.prompt_ids(student_messages(row.messages)),
        teacher_prompt=lm.prompt_ids(taught),
        demonstration=Completion([*response, lm.end_of_turn], finished=True),
    )


def check_lengths(lm: LanguageModel, examples: list[Example], settings: TrainingSettings) -> None:
    """Raise BadInput, naming the row, for whatever would not fit; nothing is ever cut."""
    room = lm.max_positions - settings.max_new_tokens
    limit = min(settings.max_prompt_tokens or room, room)
    for example in examples:
        for who, prompt in [
            ("student", example.student_prompt),
            ("teacher", example.teacher_prompt),
        ]:
            if len(prompt) > limit:
                raise BadInput(
                    f"row {example.id}: the {who}'s prompt has {len(prompt)} tokens, the limit is "
                    f"{limit} ({lm.max_positions} positions, {settings.max_new_tokens} of them for "
                    "max_new_tokens); shorten the row or lower max_new_tokens"
                )
        if len(example.demonstration.tokens) > settings.max_new_tokens:
            raise BadInput(
                f"row {example.id}: the response has {len(example.demonstration.tokens)} tokens, "
                f"so no answer like it fits into max_new_tokens {settings.max_new_tokens}; raise it"
            )


def main(spec_file: Path, directory: Path, stop: Stop) -> bool:
    """Train unless the stage is finished; returns False when it was stopped before the end."""
    spec = StageSpec.read(spec_file)
    with exclusive(directory):
        if (directory / "record.json").is_file():
            print(f"stage {spec.key[:12]} is finished; nothing to do", flush=True)
            return True
        return train(spec, directory, stop) is not None


if __name__ == "__main__":
    run_program(main)
