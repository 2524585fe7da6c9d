"""What each step sees, as functions of (settings, seed, step): batches, learning rate, seeds."""

import math

import numpy as np

from schemas.settings import TrainingSettings


def total_steps(settings: TrainingSettings, rows: int) -> int:
    """Steps of a stage: every row once an epoch, the last batch of an epoch may be smaller."""
    return settings.epochs * math.ceil(rows / settings.prompts_per_step)


def short_of_steps(settings: TrainingSettings, rows: int) -> str | None:
    """What is to be said of a stage that ends before it has warmed up; None where it does not."""
    steps, warmup = total_steps(settings, rows), settings.warmup_steps
    if steps > warmup:
        return None
    return (
        f"{steps} steps, none of them after the warm-up (training.warmup_steps {warmup}), so it "
        "learns little; set more epochs, fewer prompts_per_step or fewer warmup_steps"
    )


def batch(settings: TrainingSettings, rows: int, seed: int, step: int) -> list[int]:
    """The rows of step `step` (from 0): each epoch is its own permutation."""
    per_epoch = math.ceil(rows / settings.prompts_per_step)
    epoch, place = divmod(step, per_epoch)
    start = place * settings.prompts_per_step
    return order(rows, seed, epoch)[start : start + settings.prompts_per_step]


def order(rows: int, seed: int, epoch: int) -> list[int]:
    """The rows of an epoch, from 0, as its steps take them."""
    return np.random.default_rng([seed, epoch]).permutation(rows).tolist()


def learning_rate(settings: TrainingSettings, step: int, steps: int) -> float:
    """Linear warm-up, then constant or a cosine to 0 at the end."""
    warm = min(1.0, (step + 1) / max(1, settings.warmup_steps))
    if settings.schedule == "constant":
        return settings.learning_rate * warm
    return settings.learning_rate * warm * 0.5 * (1.0 + math.cos(math.pi * step / steps))


def step_seed(seed: int, step: int) -> int:
    """The seed of all random numbers of one step, so that resuming needs no generator state."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1)


def micro_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices of sequences that go through the model together, the longest ones first.

    Sequences of like length come together, so that little is padding; no more than `budget` tokens
    with the padding, except for a sequence that is longer by itself.
    """
    longest_first = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    parts: list[list[int]] = []
    for index in longest_first:
        if not parts or (len(parts[-1]) + 1) * lengths[parts[-1][0]] > budget:
            parts.append([])
        parts[-1].append(index)
    return parts
