"""The gradient of one step: teacher and student score the same answers, some sequences at a time.

Shapes: B sequences, R loss rows (completion tokens of a micro-batch, sequence after sequence), D
hidden width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from schemas.stage import StageSpec
from sdft.divergence import RowScore, row_loss, teacher_score, token_score
from sdft.model import LanguageModel
from sdft.prefix import Prefix, shared_prefix
from sdft.process import StageFailed
from sdft.rollout import Completion, Sampling
from sdft.sampler import Sampler, sequence_weights
from sdft.schedule import micro_batches
from sdft.scoring import can_pack, completion_hidden
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

    The loss is the mean over sequences of the mean over a sequence's tokens (paper, equation 1);
    answers of a sampler that is not the student are weighted.
    """

    def __init__(
        self,
        lm: LanguageModel,
        teacher: Teacher | None,
        sampler: Sampler,
        examples: list[Example],
        spec: StageSpec,
    ) -> None:
        self._lm, self._teacher = lm, teacher
        self._settings = spec.training
        self._corrects = teacher is not None and not sampler.is_student
        wanted = spec.runtime.gradient_checkpointing
        self._recomputes = lm.device.type == "cuda" if wanted is None else wanted
        if self._recomputes:
            lm.model.gradient_checkpointing_enable({"use_reentrant": False})
        self._budget = spec.runtime.micro_batch_tokens or DEFAULT_TOKENS[lm.device.type]
        self._student_begins, self._teacher_begins = list[int](), list[int]()
        if not can_pack(lm.model):
            self._teacher_begins = shared_prefix(lm.model, [one.teacher_prompt for one in examples])
            if (
                not self._recomputes
            ):  # a layer that is run again must find no cache filled by itself
                prompts = [one.student_prompt for one in examples]
                self._student_begins = shared_prefix(lm.model, prompts)
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
        losses, divergence, entropy, trust = [0.0] * len(chosen), 0.0, 0.0, 0.0
        if not counted:  # every completion is shorter than `skip`: nothing to learn in this step
            return losses, {"divergence": 0.0, "entropy": 0.0, "loss_tokens": 0}
        lengths = [_length(chosen[index], answers[index]) for index in counted]
        parts = [
            [counted[place] for place in part] for part in micro_batches(lengths, self._budget)
        ]
        scores = self._scores(parts, chosen, answers)
        with self._lm.computing():
            prefix = Prefix(self._lm.model, self._student_begins)
        for indices, score in zip(parts, scores, strict=True):
            said = [answers[index] for index in indices]
            rows_B = torch.tensor([rows[index] for index in indices], device=self._lm.device)
            hidden_RD = self._student([chosen[index] for index in indices], said, prefix)
            weight_B = self._weights(hidden_RD.detach(), said)
            share_R = (1.0 / (len(counted) * rows_B)).repeat_interleave(rows_B)
            weight_R = share_R * weight_B.repeat_interleave(rows_B)
            student_RD = hidden_RD[_after(skip, said, self._lm.device)]
            loss, loss_R, entropy_R = row_loss(student_RD, self._lm.head(), weight_R, score)
            loss.backward()
            for index, one in zip(indices, loss_R.split(rows_B.tolist()), strict=True):
                losses[index] = one.mean().item()
            divergence += loss.item()
            entropy += (entropy_R * share_R).sum().item()
            trust += weight_B.sum().item() / len(counted)
        prefix.backward()
        metrics = {"divergence": divergence, "entropy": entropy, "loss_tokens": sum(rows)}
        return losses, metrics | ({"sequence_weight": trust} if self._corrects else {})

    def _student(
        self, examples: list[Example], answers: list[Completion], prefix: Prefix
    ) -> Tensor:
        """[R, D], with its graph, of all tokens of the answers."""
        model, prompts = self._lm.model, [example.student_prompt for example in examples]
        model.train(self._recomputes)  # transformers recomputes only what is in training mode
        try:
            with self._lm.computing():
                tokens = [one.tokens for one in answers]
                hidden_RD = completion_hidden(model, prompts, tokens, prefix)
        finally:  # also where memory runs out: the teacher may be the same model
            model.eval()
        return hidden_RD.to(self._lm.compute)

    def _weights(self, hidden_RD: Tensor, answers: list[Completion]) -> Tensor:
        """[B]: what each answer counts; 1 for the student's own."""
        if not self._corrects:
            return torch.ones(len(answers), device=self._lm.device)
        sampling = Sampling.of(self._settings)
        return sequence_weights(hidden_RD, self._lm.head().to(hidden_RD.dtype), answers, sampling)

    @torch.no_grad()
    def _scores(
        self, parts: list[list[int]], chosen: list[Example], answers: list[Completion]
    ) -> list[RowScore]:
        """How each part's student rows are scored: by the teacher, or by the answers' tokens.

        The teacher is asked here, before the student's graph exists. What prompts share it reads
        once a step, and once a stage when it is frozen.
        """
        teacher, settings, device = self._teacher, self._settings, self._lm.device
        said = [[answers[index] for index in indices] for indices in parts]
        masks = [_after(settings.skip_first_tokens, one, device) for one in said]
        if teacher is None:
            return [
                token_score(torch.tensor([t for one in part for t in one.tokens], device=device)[m])
                for part, m in zip(said, masks, strict=True)
            ]
        rows: list[Tensor] = []
        with teacher.speaking(), self._lm.computing():
            if teacher.averages or self._teacher_prefix is None:
                self._teacher_prefix = Prefix(teacher.model, self._teacher_begins)
            for indices, part, mask in zip(parts, said, masks, strict=True):
                prompts = [chosen[index].teacher_prompt for index in indices]
                tokens = [one.tokens for one in part]
                hidden_RD = completion_hidden(teacher.model, prompts, tokens, self._teacher_prefix)
                rows.append(hidden_RD[mask].to(self._lm.compute))
        head = self._lm.head(teacher.model).to(self._lm.compute)
        return [
            teacher_score(settings.divergence, settings.jsd_beta, teacher_RD, head)
            for teacher_RD in rows
        ]


def _after(skip: int, answers: list[Completion], device: torch.device) -> Tensor:
    """[R]: whether a token's row is beyond the first `skip` of its answer."""
    places = [place >= skip for one in answers for place in range(len(one.tokens))]
    return torch.tensor(places, device=device)


def _length(example: Example, answer: Completion) -> int:
    return len(example.student_prompt) + len(answer.tokens)
