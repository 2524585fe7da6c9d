"""The teacher's weights: the stage's parent, frozen, or an average of the student (paper, 3)."""

import copy
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from schemas.settings import RuntimeSettings, TrainingSettings
from schemas.stage import StageSpec
from sdft.lora import STUDENT, TEACHER, add_average
from sdft.model import LanguageModel, move, output_head


@dataclass(frozen=True)
class Teacher:
    """The student at the start of the stage, which never sees a gradient.

    `frozen` stays as it is. `ema` follows the student, average += rate * (student - average), in
    fp32: a bf16 average at a rate of 0.01 would lose most of each movement to rounding.
    """

    model: PreTrainedModel
    speaking: Callable[[], AbstractContextManager[object]] = nullcontext
    """Only inside such a context is `model` the teacher, and on the student's device."""
    rate: float = 0.0
    averages: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """By the names of the student's parameters; empty when frozen, as the parent has it all."""

    @torch.no_grad()
    def update(self, trained: Mapping[str, Tensor]) -> None:
        """Move the averages towards the student; call once after every optimizer step."""
        for name, average in self.averages.items():
            average.lerp_(trained[name].to(average.device), self.rate)


def open_teacher(lm: LanguageModel, adapter: PeftModel | None, spec: StageSpec) -> Teacher:
    """The stage's teacher, as the student is at its start; `adapter` is what is trained of it."""
    if adapter is None:
        return _copy(lm, spec.training, spec.runtime)
    return _without_copy(lm, adapter, spec.training)


def _copy(lm: LanguageModel, settings: TrainingSettings, runtime: RuntimeSettings) -> Teacher:
    """One more copy of the model: in the compute dtype when frozen, in fp32 when averaged."""
    model = copy.deepcopy(lm.model).requires_grad_(False).eval()
    if settings.teacher == "frozen":
        for weight in model.parameters():  # not its buffers: rotary frequencies stay in fp32
            weight.data = weight.data.to(lm.compute)

    def rest_on_the_cpu() -> None:
        move(model, torch.device("cpu"))
        output_head(model).to(lm.device)  # the loss asks it later

    @contextmanager
    def from_the_cpu() -> Generator[None]:
        move(model, lm.device)
        try:
            yield
        finally:
            rest_on_the_cpu()

    speaking = nullcontext
    if runtime.offload_teacher:
        rest_on_the_cpu()
        speaking = from_the_cpu
    if settings.teacher == "frozen":
        return Teacher(model, speaking)
    return Teacher(model, speaking, settings.ema_rate, dict(model.named_parameters()))


def _without_copy(lm: LanguageModel, student: PeftModel, settings: TrainingSettings) -> Teacher:
    """The student's own weights, with its adapter off or with the average of it in its place."""
    if settings.teacher == "frozen":
        return Teacher(lm.model, student.disable_adapter)
    averages = add_average(student)

    @contextmanager
    def average() -> Generator[None]:
        student.set_adapter(TEACHER)
        try:
            yield
        finally:
            student.set_adapter(STUDENT)

    return Teacher(lm.model, average, settings.ema_rate, dict(averages))
