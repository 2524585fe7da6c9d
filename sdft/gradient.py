"""The gradient of one step: teacher and student score the same answers, some sequences at a time.

Shapes: R loss rows (completion tokens of a micro-batch, sequence after sequence), D hidden width.
"""

from dataclasses import dataclass

import torch

from schemas.stage import StageSpec
from sdft.divergence import RowScore, row_loss, teacher_score, token_score
from sdft.model import LanguageModel
from sdft.prefix import Prefix, shared_prefix
from sdft.process import StageFailed
from sdft.rollout import Completion
from sdft.schedule import micro_batches
from sdft.scoring import completion_hidden
from sdft.teacher import Teacher

DEFAULT_TOKENS = {"cpu": 1024, "cuda": 2**17}
"""Tokens of a micro-batch: on a CPU what keeps its cores busy, on a GPU more than most hold, since
there too many are found out and halved."""


@dataclass(frozen=True)
class Example:
    """A demonstration as the two models see it."""

    id: str
    student_prompt: list[int]
    teacher_prompt: list[int]
    demonstration: Completion


class StepGradient:
    """Adds each step's gradient to the student's parameters.

    The loss is the mean over sequences of the mean over a sequence's tokens (paper, equation 1).
    """

    def __init__(
        self,
        lm: LanguageModel,
        teacher: Teacher | None,
        examples: list[Example],
        spec: StageSpec,
    ) -> None:
        self._lm, self._teacher = lm, teacher
        self._settings = spec.training
        self._budget = spec.runtime.micro_batch_tokens or DEFAULT_TOKENS[lm.device.type]
        self._student_begins = shared_prefix(lm.model, [one.student_prompt for one in examples])
        self._teacher_begins = shared_prefix(lm.model, [one.teacher_prompt for one in examples])
        self._teacher_prefix: Prefix | None = None

    def add(
        self, chosen: list[Example], answers: list[Completion]
    ) -> tuple[list[float], dict[str, float]]:
        """Add a step's gradient, in smaller parts where memory runs out.

        Returns each sequence's divergence, and the step's divergence and student entropy in nats a
        token with the number of tokens that they are of. Raises StageFailed when a single sequence
        is too much.
        """
        while True:
            try:
                return self._add(chosen, answers)
            except torch.OutOfMemoryError as error:
                lengths = list(map(_length, chosen, answers))
                if self._budget <= max(lengths):
                    raise StageFailed(
                        f"a single sequence does not fit into the device's memory ({error}); lower "
                        "training.max_new_tokens or shorten the prompts"
                    ) from None
            self._lm.model.zero_grad(set_to_none=True)
            self._budget = min(self._budget, sum(lengths)) // 2
            print(f"out of memory: goes on with {self._budget} tokens at a time", flush=True)

    def _add(
        self, chosen: list[Example], answers: list[Completion]
    ) -> tuple[list[float], dict[str, float]]:
        skip = self._settings.skip_first_tokens
        rows = [max(0, len(answer.tokens) - skip) for answer in answers]
        counted = [index for index, count in enumerate(rows) if count]
        losses, entropy = [0.0] * len(chosen), 0.0
        if not counted:  # every completion is shorter than `skip`: nothing to learn in this step
            return losses, {"divergence": 0.0, "entropy": 0.0, "loss_tokens": 0}
        self._pass_teacher_prefix()
        prefix = Prefix(self._lm.model, self._student_begins)
        lengths = [_length(chosen[index], answers[index]) for index in counted]
        for part in micro_batches(lengths, self._budget):
            indices = [counted[place] for place in part]
            examples = [chosen[index] for index in indices]
            tokens = [answers[index].tokens for index in indices]
            rows_B = torch.tensor([rows[index] for index in indices], device=self._lm.device)
            weight_R = (1.0 / (len(counted) * rows_B)).repeat_interleave(rows_B)
            score = self._score(examples, tokens)
            prompts = [example.student_prompt for example in examples]
            student_RD = completion_hidden(self._lm.model, prompts, tokens, skip, prefix)
            loss, loss_R, entropy_R = row_loss(student_RD, self._lm.head(), weight_R, score)
            loss.backward()
            for index, one in zip(indices, loss_R.split(rows_B.tolist()), strict=True):
                losses[index] = one.mean().item()
            entropy += (entropy_R * weight_R).sum().item()
        prefix.backward()
        divergence = sum(losses) / len(counted)
        return losses, {"divergence": divergence, "entropy": entropy, "loss_tokens": sum(rows)}

    @torch.no_grad()
    def _pass_teacher_prefix(self) -> None:
        """Once a step, and for a frozen teacher once a stage."""
        if self._teacher and (self._teacher.rate or self._teacher_prefix is None):
            self._teacher_prefix = Prefix(self._teacher.model, self._teacher_begins)

    def _score(self, examples: list[Example], tokens: list[list[int]]) -> RowScore:
        """How the student's rows are scored: by the teacher, or by the demonstrations' tokens."""
        settings, skip = self._settings, self._settings.skip_first_tokens
        if self._teacher is None:
            targets = [token for one in tokens for token in one[skip:]]
            return token_score(torch.tensor(targets, device=self._lm.device))
        prompts = [example.teacher_prompt for example in examples]
        with torch.no_grad():
            teacher_RD = completion_hidden(
                self._teacher.model, prompts, tokens, skip, self._teacher_prefix
            )
        head = self._lm.head(self._teacher.model)
        return teacher_score(settings.divergence, settings.jsd_beta, teacher_RD, head)


def _length(example: Example, answer: Completion) -> int:
    return len(example.student_prompt) + len(answer.tokens)
