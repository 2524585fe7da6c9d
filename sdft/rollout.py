"""Completions from a model: sampled for training, greedy for evaluation.

Shapes: B sequences still running, T tokens so far, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sdft.model import LanguageModel
from sdft.packing import packed_linears
from sdft.prefix import Prefix, shared_prefix


@dataclass(frozen=True)
class Completion:
    """The tokens of an answer, with the end-of-sequence token where there is one."""

    tokens: list[int]
    finished: bool
    finite: bool = True
    """False where a step's logits held NaN, +inf or nothing but -inf: the answer means nothing."""


@dataclass(frozen=True)
class Sampling:
    """How to draw the next token; temperature 0 is greedy."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0


@torch.no_grad()
def generate(
    lm: LanguageModel, prompts: list[list[int]], sampling: Sampling, seed: int = 0
) -> list[Completion]:
    """One completion a prompt, in the order of the prompts.

    The random numbers of a completion depend on `seed` and its place in the list alone, not on when
    others end. Raises ValueError when a prompt leaves no room for `max_new_tokens`.
    """
    room = lm.max_positions - sampling.max_new_tokens
    if (longest := max(map(len, prompts))) > room:
        raise ValueError(
            f"a prompt has {longest} tokens, but with max_new_tokens {sampling.max_new_tokens} "
            f"only {room} of the model's {lm.max_positions} positions are left for it"
        )
    draws_BT = torch.rand(
        len(prompts), sampling.max_new_tokens, generator=torch.Generator().manual_seed(seed)
    ).to(lm.device)
    with packed_linears(lm.model):
        return _decode(lm, prompts, sampling, draws_BT)


def _decode(
    lm: LanguageModel, prompts: list[list[int]], sampling: Sampling, draws_BT: Tensor
) -> list[Completion]:
    outputs: list[list[int]] = [[] for _ in prompts]
    finished = [False] * len(prompts)
    finite = [True] * len(prompts)

    running = list(range(len(prompts)))  # index into `prompts` of each row of the batch
    shared = shared_prefix(lm.model, prompts)
    cache = Prefix(lm.model, shared).cache(len(prompts))
    ids_BT, mask_BT = _left_padded([prompt[len(shared) :] for prompt in prompts], lm)
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
        next_B = _choose(logits_BV, draws_BT[running, step], sampling)
        sound_B = logits_BV.amax(-1).isfinite()  # the largest of a row with a NaN is NaN
        for index, token, sound in zip(running, next_B.tolist(), sound_B.tolist(), strict=True):
            if not finished[index]:
                outputs[index].append(token)
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
    return [Completion(*answer) for answer in zip(outputs, finished, finite, strict=True)]


def _left_padded(prompts: list[list[int]], lm: LanguageModel) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    pad = lm.tokenizer.pad_token_id
    ids = [[pad] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=lm.device), torch.tensor(mask, device=lm.device)


def _choose(logits_BV: Tensor, draw_B: Tensor, sampling: Sampling) -> Tensor:
    """The next token of each row, by inverting the cumulative distribution at a uniform draw."""
    if sampling.temperature == 0.0:
        return logits_BV.argmax(-1)
    probability_BV = (logits_BV / sampling.temperature).softmax(-1)
    if sampling.top_p < 1.0:
        sorted_BV, order_BV = probability_BV.sort(-1, descending=True)
        beyond_BV = sorted_BV.cumsum(-1) - sorted_BV >= sampling.top_p
        dropped_BV = torch.zeros_like(beyond_BV).scatter(-1, order_BV, beyond_BV)
        probability_BV = probability_BV.masked_fill(dropped_BV, 0.0)
    cumulative_BV = probability_BV.double().cumsum(-1)
    target_B1 = draw_B.double()[:, None] * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, target_B1, right=True).squeeze(-1)
