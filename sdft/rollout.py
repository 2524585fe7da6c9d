"""Completions from a model: sampled for training, greedy for evaluation.

Shapes: B sequences still running, T tokens so far, V vocabulary, N blocks of K tokens of it.
"""

from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor, nn

from schemas.settings import TrainingSettings
from sdft.model import LanguageModel
from sdft.packing import packed_linears
from sdft.prefix import Prefix, shared_prefix
from sdft.process import StageFailed

BLOCK = 128
"""Tokens of the vocabulary whose probabilities are summed first when one is drawn."""


@dataclass(frozen=True)
class Completion:
    """The tokens of an answer, with the end-of-sequence token where there is one."""

    tokens: list[int]
    finished: bool
    finite: bool = True
    """False where a step's logits held NaN, +inf or nothing but -inf: the answer means nothing."""
    log_probs: list[float] = field(default_factory=list[float], compare=False)
    """Of each token, in nats, under the distribution that it was drawn from; none if given."""


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
    draws_BT = torch.rand(
        first + len(prompts), sampling.max_new_tokens, generator=torch.Generator().manual_seed(seed)
    )[first:].to(lm.device)
    # A compiled model decodes without: for every length of the cache it would be compiled anew.
    with packed_linears(lm), lm.computing(), torch.compiler.set_stance("force_eager"):
        return _in_parts(lm, prompts, sampling, draws_BT)


def _in_parts(
    lm: LanguageModel, prompts: list[list[int]], sampling: Sampling, draws_BT: Tensor
) -> list[Completion]:
    """Halves the prompts for as long as they do not fit into memory together."""
    try:
        return _decode(lm, prompts, sampling, draws_BT)
    except torch.OutOfMemoryError as error:
        if len(prompts) == 1:
            raise StageFailed(
                f"sampling a single answer does not fit into the device's memory ({error}); lower "
                "max_new_tokens or shorten the prompts"
            ) from None
    print(f"out of memory: samples {len(prompts) // 2} answers at a time", flush=True)
    half = slice(len(prompts) // 2), slice(len(prompts) // 2, None)
    parts = [_in_parts(lm, prompts[one], sampling, draws_BT[one]) for one in half]
    return [*parts[0], *parts[1]]


def _decode(
    lm: LanguageModel, prompts: list[list[int]], sampling: Sampling, draws_BT: Tensor
) -> list[Completion]:
    outputs: list[list[int]] = [[] for _ in prompts]
    finished = [False] * len(prompts)
    finite = [True] * len(prompts)
    log_probs: list[list[float]] = [[] for _ in prompts]

    running = list(range(len(prompts)))  # index into `prompts` of each row of the batch
    shared = shared_prefix(lm.model, prompts)
    ids_BT, mask_BT = _left_padded([prompt[len(shared) :] for prompt in prompts], lm)
    room = len(shared) + ids_BT.shape[1] + sampling.max_new_tokens
    cache = Prefix(lm.model, shared).cache(len(prompts), room)
    mask_BT = torch.cat([mask_BT.new_ones(len(prompts), len(shared)), mask_BT], dim=-1)
    positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)[:, len(shared) :]
    for step in range(sampling.max_new_tokens):
        state = lm.model(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            position_ids=positions_BT,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = state.past_key_values
        logits_BV = state.logits[:, -1].float()
        next_B, log_prob_B = _choose(logits_BV, draws_BT[running, step], sampling)
        sound_B = logits_BV.amax(-1).isfinite()  # the largest of a row with a NaN is NaN
        chosen = zip(running, next_B.tolist(), log_prob_B.tolist(), sound_B.tolist(), strict=True)
        for index, token, log_prob, sound in chosen:
            if not finished[index]:
                outputs[index].append(token)
                log_probs[index].append(log_prob)
                finished[index] = token in lm.eos_ids
                finite[index] &= sound
        alive = [row for row, index in enumerate(running) if not finished[index]]
        if not alive:
            break
        ids_BT, positions_BT = next_B[:, None], positions_BT[:, -1:] + 1
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(mask_BT), 1)], dim=-1)
        if len(alive) <= len(running) * 3 // 4:  # copying the cache costs about one step
            keep = torch.tensor(alive, device=lm.device)
            cache.batch_select_indices(keep)
            ids_BT, positions_BT, mask_BT = ids_BT[keep], positions_BT[keep], mask_BT[keep]
            running = [running[row] for row in alive]
    return [
        Completion(*answer) for answer in zip(outputs, finished, finite, log_probs, strict=True)
    ]


def _left_padded(prompts: list[list[int]], lm: LanguageModel) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    pad = lm.tokenizer.pad_token_id
    ids = [[pad] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=lm.device), torch.tensor(mask, device=lm.device)


def _choose(logits_BV: Tensor, draw_B: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The next token of each row and its log-probability.

    Drawn by inverting the cumulative distribution at a uniform number: first that of blocks of
    tokens, then that of the tokens in one block, so that little has to be wide.
    """
    if sampling.temperature == 0.0:
        return logits_BV.argmax(-1), torch.zeros_like(draw_B)
    probability_BV = _probabilities(logits_BV, sampling)
    padded_BV = nn.functional.pad(probability_BV, (0, -probability_BV.shape[1] % BLOCK))
    blocks_BNK = padded_BV.unflatten(-1, (-1, BLOCK))
    upto_BN = blocks_BNK.sum(-1).double().cumsum(-1)
    total_B1 = upto_BN[:, -1:]
    target_B1 = draw_B.double()[:, None] * total_B1
    block_B1 = torch.searchsorted(upto_BN, target_B1, right=True)
    chosen_BK = blocks_BNK.take_along_dim(block_B1[..., None], 1)[:, 0].double().cumsum(-1)
    before_B1 = nn.functional.pad(upto_BN, (1, 0)).gather(-1, block_B1)
    # The same sum in another order may differ in its last bits; a token must still be found.
    within_B1 = (target_B1 - before_B1).minimum(chosen_BK[:, -1:] * (1 - 2**-50))
    next_B1 = block_B1 * BLOCK + torch.searchsorted(chosen_BK, within_B1, right=True)
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
