"""Completions from a model: sampled for training, greedy for evaluation.

Shapes: B prompts, S tokens that may be drawn.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sdft.decoding import masked_attention, open_batch
from sdft.drawing import Sampling
from sdft.layout import laid_out_linears
from sdft.model import LanguageModel
from sdft.process import StageFailed, is_of_memory


@dataclass(frozen=True)
class Completion:
    """The tokens of an answer, with the end-of-sequence token where there is one."""

    tokens: list[int]
    finished: bool
    finite: bool = True
    """False where a step's logits held NaN, +inf or nothing but -inf: the answer means nothing."""
    log_probs: list[float] = field(default_factory=list[float], compare=False)
    """Of each token, in nats, under the distribution that it was drawn from; none if given."""


@torch.no_grad()
def generate(
    lm: LanguageModel, prompts: list[list[int]], sampling: Sampling, seed: int = 0, first: int = 0
) -> list[Completion]:
    """One completion a prompt, in the order of the prompts.

    The random numbers of a completion depend on `seed` and its place in the list alone, not on when
    others end; `first` is the place of the first prompt, where these are part of a longer list.
    Raises ValueError when a prompt leaves no room for `max_new_tokens`.
    """
    room = lm.max_positions - sampling.max_new_tokens
    if (longest := max(map(len, prompts))) > room:
        raise ValueError(
            f"a prompt has {longest} tokens, but with max_new_tokens {sampling.max_new_tokens} "
            f"only {room} of the model's {lm.max_positions} positions are left for it"
        )
    draws_BS = torch.rand(
        first + len(prompts), sampling.max_new_tokens, generator=torch.Generator().manual_seed(seed)
    )[first:].to(lm.device)
    # A compiled model decodes without: for every length of the cache it would be compiled anew.
    plainly = torch.compiler.set_stance("force_eager")
    with laid_out_linears(lm), masked_attention(lm.model), lm.computing(), plainly:
        return _in_parts(lm, prompts, sampling, draws_BS)


def _in_parts(
    lm: LanguageModel, prompts: list[list[int]], sampling: Sampling, draws_BS: Tensor
) -> list[Completion]:
    """Halves the prompts for as long as they do not fit into memory together."""
    try:
        return _decode(lm, prompts, sampling, draws_BS)
    except RuntimeError as error:
        if not is_of_memory(error):
            raise
        if len(prompts) == 1:
            raise StageFailed(
                f"sampling a single answer does not fit into the device's memory ({error}); lower "
                "max_new_tokens or shorten the prompts"
            ) from None
    print(f"out of memory: samples {len(prompts) // 2} answers at a time", flush=True)
    half = slice(len(prompts) // 2), slice(len(prompts) // 2, None)
    parts = [_in_parts(lm, prompts[one], sampling, draws_BS[one]) for one in half]
    return [*parts[0], *parts[1]]


def _decode(
    lm: LanguageModel, prompts: list[list[int]], sampling: Sampling, draws_BS: Tensor
) -> list[Completion]:
    outputs: list[list[int]] = [[] for _ in prompts]
    log_probs: list[list[float]] = [[] for _ in prompts]
    finished = [False] * len(prompts)
    finite = [True] * len(prompts)

    running = list(range(len(prompts)))  # index into `prompts` of each row of the batch
    batch = open_batch(lm, prompts, draws_BS, sampling)
    for _ in range(sampling.max_new_tokens):
        for index, (token, log_prob, sound) in zip(running, batch.next().rows(), strict=True):
            if not finished[index]:
                outputs[index].append(token)
                log_probs[index].append(log_prob)
                finished[index] = token in lm.eos_ids
                finite[index] &= sound
        alive = [row for row, index in enumerate(running) if not finished[index]]
        if not alive:
            break
        if batch.is_worth(len(alive)):
            batch.keep(alive)
            running = [running[row] for row in alive]
    return [
        Completion(*answer) for answer in zip(outputs, finished, finite, log_probs, strict=True)
    ]
