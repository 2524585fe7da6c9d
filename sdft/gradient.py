"""The gradient of one step: teacher and student score the same answers, some sequences at a time.

Shapes: B sequences, R loss rows (completion tokens of a micro-batch, sequence after sequence), D
hidden width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from schemas.base import BadInput
from schemas.stage import StageSpec
from sdft.divergence import RowScore, row_loss, teacher_score, token_score
from sdft.drawing import Sampling
from sdft.kept import KeptPrompts
from sdft.linear import quick_linears
from sdft.model import LanguageModel
from sdft.prefix import Prefix, shared_prefix
from sdft.process import StageFailed, is_of_memory
from sdft.ranks import ALONE, Ranks
from sdft.rollout import Completion
from sdft.sampler import Sampler, sequence_weights
from sdft.schedule import micro_batches
from sdft.scoring import can_pack, completion_hidden
from sdft.sharding import is_sharded
from sdft.teacher import Teacher

DEFAULT_TOKENS = {"cpu": 768, "cuda": 2**17}
"""Tokens of a micro-batch: on a CPU what keeps its cores busy; on a GPU more than most can hold,
which running out of memory halves."""
SHARDED_TOKENS = 2**13
"""The same where the model is sharded: there nothing can be halved, for all ranks work together."""


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
    answers of a sampler that is not the student are weighted. Each rank takes a part of a step's
    sequences, of like length; the mean is over all of them.
    """

    def __init__(
        self,
        lm: LanguageModel,
        teacher: Teacher | None,
        sampler: Sampler,
        examples: list[Example],
        spec: StageSpec,
        ranks: Ranks = ALONE,
        kept: KeptPrompts | None = None,
    ) -> None:
        self._lm, self._teacher, self._kept, self._ranks = lm, teacher, kept, ranks
        self._models = [lm.model] if teacher is None else [lm.model, teacher.model]
        if spec.runtime.compile:  # the compiler lays products out itself
            self._models = []
        self._settings = spec.training
        self._corrects = teacher is not None and not sampler.is_student
        wanted = spec.runtime.gradient_checkpointing
        can_recompute = lm.model.supports_gradient_checkpointing
        if wanted and not can_recompute:
            raise BadInput(
                f"runtime.gradient_checkpointing is true, which a {type(lm.model).__name__} cannot "
                "do; leave it out"
            )
        default = lm.device.type == "cuda" and can_recompute
        self._recomputes = default if wanted is None else wanted
        if self._recomputes:
            lm.model.gradient_checkpointing_enable({"use_reentrant": False})
        self._sharded = is_sharded(lm.model)
        usual = DEFAULT_TOKENS[lm.device.type]
        most = min(usual, SHARDED_TOKENS) if self._sharded else usual
        self._budget = spec.runtime.micro_batch_tokens or most
        # Tokens that all prompts begin with.
        self._before_student, self._before_teacher = list[int](), list[int]()
        if not can_pack(lm.model):
            self._before_teacher = shared_prefix(lm.model, [one.teacher_prompt for one in examples])
            # With checkpointing a layer runs twice and would find its own keys in the cache; one
            # that is sharded has released its weights when backward reaches it only by the cache.
            if not self._recomputes and not self._sharded:
                prompts = [one.student_prompt for one in examples]
                self._before_student = shared_prefix(lm.model, prompts)
        self._teacher_prefix: Prefix | None = None

    def accumulate(
        self, chosen: list[Example], answers: list[Completion]
    ) -> tuple[list[float], dict[str, float]]:
        """Add a step's gradient, in smaller parts where memory runs out.

        Returns each sequence's divergence, and the step's divergence and student entropy in nats a
        token with the number of tokens that they are of. Raises StageFailed when a single sequence
        is too much.
        """
        skip = self._settings.skip_first_tokens
        rows = [max(0, len(answer.tokens) - skip) for answer in answers]
        while True:
            made, problem = None, ""
            try:
                with quick_linears(*self._models):
                    made = self._accumulate(chosen, answers, rows)
            except RuntimeError as error:
                if not is_of_memory(error):
                    raise
                problem = str(error)
                if self._sharded:  # the others wait for this rank's layers
                    raise StageFailed(
                        f"a micro-batch of {self._budget} tokens does not fit into the device's "
                        f"memory ({error}); set runtime.micro_batch_tokens to less"
                    ) from None
            if not self._ranks.any(made is None):
                break
            lengths = list(map(self._length, chosen, answers))
            dealt = self._micro_batches_by_rank(dict(enumerate(lengths)))
            if all(len(part) == 1 for parts in dealt for part in parts):
                raise StageFailed(
                    f"a single sequence does not fit into the device's memory ({problem}); lower "
                    "training.max_new_tokens or shorten the prompts"
                )
            self._lm.model.zero_grad(set_to_none=True)
            self._budget = min(self._budget, sum(lengths)) // 2
            print(f"out of memory: goes on with {self._budget} tokens at a time", flush=True)
        assert made is not None, "no rank ran out of memory"
        self._ranks.sum_gradients(self._lm.model.parameters())
        divergence, entropy, weight, *losses = self._ranks.sum(made)
        metrics = {"divergence": divergence, "entropy": entropy, "loss_tokens": sum(rows)}
        return losses, metrics | (
            {"sequence_weight": weight} if self._corrects and any(rows) else {}
        )

    def _accumulate(
        self, chosen: list[Example], answers: list[Completion], rows: list[int]
    ) -> list[float]:
        """Add this rank's part of the gradient of all sequences that have rows.

        Returns its part of divergence, entropy and mean sequence weight, then of each sequence's
        divergence.
        """
        skip = self._settings.skip_first_tokens
        losses, divergence, entropy, weight = [0.0] * len(chosen), 0.0, 0.0, 0.0
        counted = [index for index, count in enumerate(rows) if count]
        if not counted:  # every completion is shorter than `skip`: nothing to learn in this step
            return [divergence, entropy, weight, *losses]
        parts, ours = self._own_micro_batches(
            {index: self._length(chosen[index], answers[index]) for index in counted}
        )
        scores = self._scores(parts, chosen, answers)
        with self._lm.computing():
            prefix = Prefix(self._lm.model, self._before_student)
        for place, (indices, score) in enumerate(zip(parts, scores, strict=True)):
            counts = 1.0 if place < ours else 0.0
            said = [answers[index] for index in indices]
            rows_B = torch.tensor([rows[index] for index in indices], device=self._lm.device)
            hidden_RD = self._student([chosen[index] for index in indices], said, prefix)
            weight_B = self._weights(hidden_RD.detach(), said)
            share_R = (counts / (len(counted) * rows_B)).repeat_interleave(rows_B)
            weight_R = share_R * weight_B.repeat_interleave(rows_B)
            student_RD = hidden_RD[_after(skip, said, self._lm.device)]
            loss, loss_R, entropy_R = row_loss(student_RD, self._lm.head(), weight_R, score)
            loss.backward()
            for index, one in zip(indices, loss_R.split(rows_B.tolist()), strict=True):
                losses[index] = counts * one.mean().item()
            divergence += loss.item()
            entropy += (entropy_R * share_R).sum().item()
            weight += counts * weight_B.sum().item() / len(counted)
        prefix.backward()
        return [divergence, entropy, weight, *losses]

    def _own_micro_batches(self, lengths: dict[int, int]) -> tuple[list[list[int]], int]:
        """This rank's micro-batches of the sequences of these lengths, and how many are its own.

        The rest are there because ranks of a sharded model go through it equally often.
        """
        dealt = self._micro_batches_by_rank(lengths)
        parts = dealt[self._ranks.rank]
        most = max(map(len, dealt)) if self._sharded else len(parts)
        shortest = min(lengths, key=lambda index: lengths[index])
        return parts + [[shortest]] * (most - len(parts)), len(parts)

    def _micro_batches_by_rank(self, lengths: dict[int, int]) -> list[list[list[int]]]:
        """The micro-batches of each rank."""
        longest_first = sorted(lengths, key=lambda index: -lengths[index])
        dealt = list[list[list[int]]]()
        for rank in range(self._ranks.world):
            ours = longest_first[rank :: self._ranks.world]
            parts = micro_batches([lengths[index] for index in ours], self._budget)
            dealt.append([[ours[place] for place in part] for part in parts])
        return dealt

    def _length(self, example: Example, answer: Completion) -> int:
        """Tokens of the student's that are passed through the model for this sequence alone."""
        return len(example.student_prompt) - len(self._before_student) + len(answer.tokens)

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
        once a step, and once a stage when it is frozen, then also each prompt where they are kept.
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
            if not self._kept and (teacher.averages or self._teacher_prefix is None):
                self._teacher_prefix = Prefix(teacher.model, self._before_teacher)
            for indices, part, mask in zip(parts, said, masks, strict=True):
                prompts = [chosen[index].teacher_prompt for index in indices]
                tokens = [one.tokens for one in part]
                if self._kept:
                    hidden_RD = self._kept.hidden(prompts, tokens, self._budget)
                else:
                    before = self._teacher_prefix
                    hidden_RD = completion_hidden(teacher.model, prompts, tokens, before)
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
