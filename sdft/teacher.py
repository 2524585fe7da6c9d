"""The teacher's weights: the stage's parent, frozen, or an average of the student (paper, 3)."""

import copy

import torch
from torch import Tensor
from transformers import PreTrainedModel

from schemas.settings import TrainingSettings


class Teacher:
    """A copy of the student at the start of the stage that never sees a gradient.

    `frozen` stays as it is. `ema` follows the student, average += rate * (student - average), in
    fp32: a bf16 average at a rate of 0.01 would lose most of each movement to rounding.
    """

    def __init__(self, student: PreTrainedModel, settings: TrainingSettings) -> None:
        self.model = copy.deepcopy(student).requires_grad_(False).eval()
        self.rate = settings.ema_rate if settings.teacher == "ema" else 0.0

    @torch.no_grad()
    def update(self, student: PreTrainedModel) -> None:
        """Move the averages towards the student; call once after every optimizer step."""
        if self.rate:
            pairs = zip(self.model.parameters(), student.parameters(), strict=True)
            for average, parameter in pairs:
                average.lerp_(parameter, self.rate)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must keep; empty when the parent model has it all."""
        return dict(self.model.named_parameters()) if self.rate else {}
