"""Who samples the student's answers: the model that is trained itself, or an engine beside it.

Shapes: B sequences, R rows (all completion tokens, sequence after sequence), D width.
"""

from typing import Protocol

import torch
from torch import Tensor

from schemas.base import BadInput
from schemas.settings import RuntimeSettings
from sdft.divergence import chunks
from sdft.drawing import Sampling, log_probabilities
from sdft.model import Head, LanguageModel
from sdft.rollout import Completion, generate

MAX_RATIO = 2.0
"""What a token's ratio is capped at, so that no single one rules a step (paper, appendix)."""


class Sampler(Protocol):
    """Answers prompts as the student would, as nearly as it can."""

    is_student: bool
    """Whether its probabilities are the student's own; others are corrected."""

    def take_weights(self) -> None:
        """Become the student as it is now; called before each step's `sample`."""

    def sample(
        self, prompts: list[list[int]], sampling: Sampling, seed: int, first: int = 0
    ) -> list[Completion]:
        """One completion a prompt, in their order, with the log-probability of every token.

        `first` is the place of the first prompt in the step, of which these may be a part.
        """
        ...


class StudentSampler:
    """The model that is trained."""

    is_student = True

    def __init__(self, lm: LanguageModel) -> None:
        self._lm = lm

    def take_weights(self) -> None:
        """Nothing: it is the student."""

    def sample(
        self, prompts: list[list[int]], sampling: Sampling, seed: int, first: int = 0
    ) -> list[Completion]:
        return generate(self._lm, prompts, sampling, seed, first)


def open_sampler(lm: LanguageModel, model_dir: str, runtime: RuntimeSettings) -> Sampler:
    """The sampler that the settings name; raises BadInput where it is not installed."""
    if runtime.sampler == "student":
        return StudentSampler(lm)
    if lm.device.type != "cuda":
        raise BadInput("runtime.sampler is 'vllm', which needs a CUDA device; use 'student'")
    try:
        from sdft.vllm_sampler import VllmSampler
    except ModuleNotFoundError:
        raise BadInput(
            "runtime.sampler is 'vllm', which is not installed; use 'student', or see what "
            "docs/decisions.md says of vLLM's versions"
        ) from None
    return VllmSampler(lm, model_dir, runtime)


@torch.no_grad()
def sequence_weights(
    hidden_RD: Tensor, head: Head, answers: list[Completion], sampling: Sampling
) -> Tensor:
    """[B]: truncated importance weights.

    The product over an answer's tokens of p_student / p_sampler, each ratio capped at MAX_RATIO.
    With them the mean over the sampler's answers is, but for the cap, that over the student's own.
    """
    tokens_R = torch.tensor([t for one in answers for t in one.tokens], device=hidden_RD.device)
    theirs_R = torch.tensor([p for one in answers for p in one.log_probs], device=hidden_RD.device)
    ours_R = torch.cat(
        [
            log_probabilities(head.logits(hidden_RD[rows]), tokens_R[rows], sampling)
            for rows in chunks(len(tokens_R), head)
        ]
    )
    ratio_R = (ours_R - theirs_R).clamp(max=torch.tensor(MAX_RATIO).log().item())
    lengths = [len(one.tokens) for one in answers]
    return torch.stack([one.sum() for one in ratio_R.split(lengths)]).exp()
