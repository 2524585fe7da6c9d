"""One stage of self-distillation fine-tuning, or of the SFT baseline: the trainer process.

    python -m sdft.train SPEC.json STAGE_DIRECTORY

reads a `StageSpec`, writes metrics.jsonl, rollouts/, checkpoints/, model/ and, last, record.json.
Run again after any interruption it goes on from the last good checkpoint; a finished stage is left
as it is. It starts itself as often as `runtime.processes` says; so does

    torchrun --nproc-per-node N -m sdft.train SPEC.json STAGE_DIRECTORY
"""

import math
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import torch
from peft import PeftModel

from schemas.base import BadInput
from schemas.settings import TrainingSettings
from schemas.stage import StageRecord, StageSpec, StepMetrics
from schemas.templates import teacher_messages
from sdft.checkpoint import Checkpoints
from sdft.data import Demonstration, read_demonstrations
from sdft.drawing import Sampling
from sdft.gradient import Example, StepGradient
from sdft.health import Health, artifact_share
from sdft.kept import open_kept
from sdft.lora import add_adapter
from sdft.model import LanguageModel, gpu_memory, load_model, pick_compute, pick_device
from sdft.process import StageFailed, Stop, exclusive, run_program
from sdft.ranks import ALONE, Ranks, is_rank, leads, open_ranks, whole
from sdft.record import RECORD, Finished, environment, finish_stage
from sdft.rollout import Completion
from sdft.sampler import Sampler, open_sampler
from sdft.schedule import batch, learning_rate, step_seed, total_steps
from sdft.sharding import fill, gather, gathered, shard
from sdft.stagelog import StageLog
from sdft.teacher import open_teacher


class Diverged(StageFailed):
    """Logits, the loss or its gradient are not finite; the last checkpoint is untouched."""

    def __init__(self, step: int, problem: str, settings: TrainingSettings) -> None:
        super().__init__(
            f"step {step}: {problem}; try a learning rate below {settings.learning_rate} or a "
            "longer warm-up"
        )


class Unhealthy(StageFailed):
    """The stage goes wrong in a way that more steps do not mend."""


def train(spec: StageSpec, directory: Path, stop: Stop, ranks: Ranks = ALONE) -> StageRecord | None:
    """Train one stage; returns its record, or None when `stop` was asked for and a checkpoint made.

    All ranks of a stage do this together. Raises BadInput before the first step for settings or
    data that do not fit the model, and Diverged for logits, a loss or a gradient that are not
    finite.
    """
    settings, runtime, started = spec.training, spec.runtime, time.monotonic()
    sharded = runtime.sharding == "full" and ranks.world > 1
    device = pick_device(runtime.device)
    lm, adapter = _open(spec, device, torch.device("cpu") if sharded else device)
    examples = [_example(lm, row, settings) for row in read_demonstrations(Path(spec.train_file))]
    check_lengths(lm, examples, settings)
    steps = total_steps(settings, len(examples))
    teacher = open_teacher(lm, adapter, spec) if settings.method == "sdft" else None
    if sharded:
        teacher = shard(lm, teacher, device, ranks)
    if runtime.compile:
        for model in {lm.model, teacher.model if teacher else lm.model}:
            model.base_model.compile(dynamic=True)
    trained = _trained(lm, spec)
    optimizer = torch.optim.AdamW(trained.values(), weight_decay=settings.weight_decay, fused=True)
    checkpoints = Checkpoints(
        directory / "checkpoints", spec.key, runtime, trained, optimizer, teacher, ranks
    )
    sampler = open_sampler(lm, spec.parent_dir, runtime)
    asked = [example.teacher_prompt for example in examples]
    kept = open_kept(lm, teacher, asked, spec, directory) if teacher and ranks.world == 1 else None
    gradient = StepGradient(lm, teacher, sampler, examples, spec, ranks, kept)
    first, known = checkpoints.load()
    print(f"goes on after step {first}", flush=True)
    log = StageLog(directory, known, writes=ranks.leads)
    health = Health(settings, runtime)
    for line in log.curve:
        health.look(line)

    for step in range(first, steps):
        began = time.monotonic()
        chosen = [examples[row] for row in batch(settings, len(examples), spec.seed, step)]
        torch.manual_seed(seed := step_seed(spec.seed, step))
        if teacher:
            with gathered(lm.model):
                answers = rollouts(sampler, chosen, settings, seed, ranks)
            if not all(answer.finite for answer in answers):
                raise Diverged(step + 1, "the student's logits are not finite", settings)
        else:
            answers = [example.demonstration for example in chosen]
        # teacher forward, student forward, divergence, backward: sdft/gradient.py
        losses, metrics = gradient.accumulate(chosen, answers)
        norm = whole(torch.nn.utils.clip_grad_norm_(trained.values(), settings.max_grad_norm))
        if ranks.any(not math.isfinite(metrics["divergence"] + norm.item())):
            problem = f"divergence {metrics['divergence']}, gradient norm {norm}"
            raise Diverged(step + 1, problem, settings)
        rate = learning_rate(settings, step, steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if teacher:
            teacher.update(trained)

        metrics |= {"grad_norm": norm.item(), "learning_rate": rate, **gpu_memory(lm)}
        metrics |= _answer_metrics(lm, answers, time.monotonic() - began)
        line = log.step(step + 1, metrics)
        for one in islice(zip(chosen, answers, losses, strict=True), runtime.rollouts_a_step):
            log.rollout(_rollout_row(lm, step + 1, *one))
        warn_or_stop(health, line, log)
        stopped = ranks.any(stop.requested)  # asked once: it may be set between two looks
        if ranks.from_first(checkpoints.due(step + 1)) or stopped:
            log.flush_rollouts(step + 1)
            checkpoints.save(step + 1, log.lines)
        if stopped:
            return None
    log.flush_rollouts(steps)
    seconds = time.monotonic() - started
    finished = Finished(steps, seconds, checkpoints.seconds, environment(lm))
    weights = gather(trained, ranks) if sharded else {}
    if ranks.leads:
        if sharded:
            lm, adapter = _open(spec, device, torch.device("cpu"))
            fill(lm.model, weights)
        finish_stage(spec, directory, lm, adapter, finished)
    ranks.meet()
    return StageRecord.read(directory / RECORD)


def warn_or_stop(health: Health, line: StepMetrics, log: StageLog) -> None:
    """Print what a step shows of the stage's health.

    Where it is to stop, writes the rollouts for people to look at and raises Unhealthy.
    """
    for finding in health.look(line):
        if finding.stops:
            log.flush_rollouts(line.step)
            raise Unhealthy(
                f"step {finding.step}: {finding.message} (or set runtime.health to warn)"
            )
        print(f"warning: step {finding.step}: {finding.message}", flush=True)


def rollouts(
    sampler: Sampler, chosen: list[Example], settings: TrainingSettings, seed: int, ranks: Ranks
) -> list[Completion]:
    """The student's own answers, sampled without the demonstration (paper, algorithm 1).

    Each rank samples a part of them; the random numbers of each do not depend on how many there
    are.
    """
    sampler.take_weights()
    ours = ranks.share(len(chosen))
    prompts = [chosen[place].student_prompt for place in ours]
    answers = sampler.sample(prompts, Sampling.of(settings), seed, ours.start) if prompts else []
    return [Completion(**one) for one in ranks.gather([asdict(one) for one in answers])]


def _open(
    spec: StageSpec, device: torch.device, place: torch.device
) -> tuple[LanguageModel, PeftModel | None]:
    """The parent, and what is trained of it if that is an adapter, to be computed on the device.

    Weights that learn are in fp32, those that stay as they are in the compute dtype.
    """
    compute = pick_compute(spec.runtime.compute, device)
    lora = spec.training.lora
    lm = load_model(Path(spec.parent_dir), place, compute, compute if lora else torch.float32)
    return lm, add_adapter(lm.model, lora, spec.seed) if lora else None


def _trained(lm: LanguageModel, spec: StageSpec) -> dict[str, torch.nn.Parameter]:
    """The weights that learn, by name; raises BadInput where there are none."""
    trained = {name: one for name, one in lm.model.named_parameters() if one.requires_grad}
    if not trained:
        raise BadInput(
            f"{spec.parent_dir}: none of its weights can be trained (are they quantised?); use a "
            "model in fp32 or bf16, or training.lora"
        )
    return trained


def _answer_metrics(
    lm: LanguageModel, answers: list[Completion], seconds: float
) -> dict[str, float]:
    """Metrics of a step's answers: their length in tokens, what they look like, and the pace."""
    tokens = sum(len(answer.tokens) for answer in answers)
    return {
        "completion_tokens": tokens / len(answers),
        "clipped_share": sum(not answer.finished for answer in answers) / len(answers),
        "artifact_share": artifact_share([lm.text(answer.tokens) for answer in answers]),
        "tokens_per_s": tokens / seconds,
    }


def _rollout_row(
    lm: LanguageModel, step: int, example: Example, answer: Completion, loss: float
) -> dict[str, object]:
    """What the student said to a prompt in a step, for people to read."""
    return {
        "step": step,
        "id": example.id,
        "prompt": lm.text(example.student_prompt),
        "completion": lm.text(answer.tokens),
        "tokens": len(answer.tokens),
        "finished": answer.finished,
        "divergence": loss,
    }


def _example(lm: LanguageModel, row: Demonstration, settings: TrainingSettings) -> Example:
    """A row as the two models see it; without an answer, an anchor, both see the same."""
    taught, response = row.messages, list[int]()
    if row.response is not None:
        template = settings.teacher_template
        taught = teacher_messages(row.messages, row.response, row.context, template)
        response = lm.tokenizer.encode(row.response, add_special_tokens=False)
    elif settings.method == "sft":
        raise BadInput(f"row {row.id}: has no response; SFT learns nothing else")
    return Example(
        id=row.id,
        student_prompt=lm.prompt_ids(row.messages),
        teacher_prompt=lm.prompt_ids(taught),
        demonstration=Completion([*response, lm.end_of_turn], finished=True),
    )


def check_lengths(lm: LanguageModel, examples: list[Example], settings: TrainingSettings) -> None:
    """Raise BadInput, naming the row, for whatever would not fit; nothing is ever cut."""
    room = lm.max_positions - settings.max_new_tokens
    limit = min(settings.max_prompt_tokens or room, room)
    why, change = f"{lm.max_positions} positions less max_new_tokens", "lower max_new_tokens"
    if limit < room:
        why, change = "max_prompt_tokens", "raise it"
    for example in examples:
        prompts = {"student": example.student_prompt}
        if settings.method == "sdft":
            prompts["teacher"] = example.teacher_prompt
        for who, prompt in prompts.items():
            if len(prompt) > limit:
                raise BadInput(
                    f"row {example.id}: the {who}'s prompt has {len(prompt)} tokens, the limit is "
                    f"{limit} ({why}); shorten the row or {change}"
                )
        if len(example.demonstration.tokens) > settings.max_new_tokens:
            raise BadInput(
                f"row {example.id}: the response has {len(example.demonstration.tokens)} tokens, "
                f"so no answer like it fits into max_new_tokens {settings.max_new_tokens}; raise it"
            )


def main(spec_file: Path, directory: Path, stop: Stop) -> bool:
    """Train unless the stage is finished; returns False when it was stopped before the end."""
    spec = StageSpec.read(spec_file)
    if spec.runtime.processes > 1 and not is_rank():
        from sdft.launch import launch

        return launch("sdft.train", sys.argv[1:], spec.runtime.processes, stop)
    with exclusive(directory) if leads() else nullcontext(), open_ranks(spec.runtime) as ranks:
        if (directory / RECORD).is_file():
            print(f"stage {spec.key[:12]} is finished; nothing to do", flush=True)
            return True
        return train(spec, directory, stop, ranks) is not None


if __name__ == "__main__":
    run_program(main, smaller="runtime.micro_batch_tokens")
