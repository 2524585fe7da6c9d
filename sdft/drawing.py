"""The next token, drawn from logits.

Shapes: B sequences, R rows, V vocabulary, N blocks of K tokens of it.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from schemas.settings import TrainingSettings

BLOCK = 128
"""Tokens of the vocabulary whose probabilities are summed first when one is drawn."""


@dataclass(frozen=True)
class Sampling:
    """How to draw the next token; temperature 0 is greedy."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0

    @classmethod
    def of(cls, settings: TrainingSettings) -> Self:
        """How a stage's rollouts are drawn."""
        return cls(settings.max_new_tokens, settings.temperature, settings.top_p)


@dataclass(frozen=True)
class Drawn:
    """One token for each of B sequences."""

    tokens_B: Tensor
    log_prob_B: Tensor
    """In nats, under the distribution that the token was drawn from; 0 if greedy."""
    finite_B: Tensor
    """False where the logits held NaN, +inf or nothing but -inf."""

    def rows(self) -> list[tuple[int, float, bool]]:
        """By sequence, brought to the CPU together."""
        together = torch.stack([one.double() for one in (self.tokens_B, self.log_prob_B)])
        values = torch.cat([together, self.finite_B[None].double()]).T.tolist()
        return [(int(token), log_prob, bool(finite)) for token, log_prob, finite in values]


def draw(logits_BV: Tensor, draw_B: Tensor, sampling: Sampling) -> Drawn:
    """A token for each row, by a number drawn uniformly from [0, 1)."""
    finite_B = logits_BV.amax(-1).isfinite()  # the largest of a row with a NaN is NaN
    if sampling.temperature == 0.0:
        return Drawn(logits_BV.argmax(-1), torch.zeros_like(draw_B), finite_B)
    return Drawn(*_inverted(_probabilities(logits_BV, sampling), draw_B), finite_B)


def _inverted(probability_BV: Tensor, draw_B: Tensor) -> tuple[Tensor, Tensor]:
    """The token of each row and its log-probability.

    Drawn by inverting the cumulative distribution at a uniform number: first that of blocks of
    tokens, then that of the tokens in one block, so that little has to be wide.
    """
    padded_BV = nn.functional.pad(probability_BV, (0, -probability_BV.shape[1] % BLOCK))
    blocks_BNK = padded_BV.unflatten(-1, (-1, BLOCK))
    upto_BN = blocks_BNK.sum(-1).double().cumsum(-1)
    total_B1 = upto_BN[:, -1:]
    target_B1 = draw_B.double()[:, None] * total_B1
    # Where probabilities are NaN all of them lie before the target; `Drawn` tells of such rows.
    block_B1 = torch.searchsorted(upto_BN, target_B1, right=True).clamp(max=upto_BN.shape[1] - 1)
    chosen_BK = blocks_BNK.take_along_dim(block_B1[..., None], 1)[:, 0].double().cumsum(-1)
    before_B1 = nn.functional.pad(upto_BN, (1, 0)).gather(-1, block_B1)
    # The same sum in another order may differ in its last bits; a token must still be found.
    within_B1 = (target_B1 - before_B1).minimum(chosen_BK[:, -1:] * (1 - 2**-50))
    next_B1 = block_B1 * BLOCK + torch.searchsorted(chosen_BK, within_B1, right=True)
    next_B1 = next_B1.clamp(max=probability_BV.shape[1] - 1)
    return next_B1[:, 0], (probability_BV.gather(-1, next_B1) / total_B1).log()[:, 0]


def log_probabilities(logits_RV: Tensor, tokens_R: Tensor, sampling: Sampling) -> Tensor:
    """[R]: the log-probability with which each token would be drawn, in nats."""
    probability_RV = _probabilities(logits_RV, sampling)
    chosen_R = probability_RV.gather(-1, tokens_R[:, None])[:, 0]
    return (chosen_R / probability_RV.sum(-1)).log()


def _probabilities(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Not normalised where top_p leaves something out."""
    if sampling.temperature != 1.0:
        logits_BV = logits_BV / sampling.temperature
    probability_BV = logits_BV.softmax(-1)
    if sampling.top_p < 1.0:
        sorted_BV, order_BV = probability_BV.sort(-1, descending=True)
        beyond_BV = sorted_BV.cumsum(-1) - sorted_BV >= sampling.top_p
        dropped_BV = torch.zeros_like(beyond_BV).scatter(-1, order_BV, beyond_BV)
        probability_BV = probability_BV.masked_fill(dropped_BV, 0.0)
    return probability_BV
