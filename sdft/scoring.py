"""Hidden states of the rows that the loss uses: those that predict a completion's tokens.

Shapes: B sequences, T tokens after the prefix, R rows (all completion tokens, sequence after
sequence), D width, V vocabulary.
"""

from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.generic import is_flash_attention_requested

from sdft.prefix import Prefix

ROUNDING = 0.05
"""By what share hidden states in bf16 may differ; those that saw another sequence differ more."""


def completion_hidden(
    model: PreTrainedModel,
    prompts: list[list[int]],
    completions: list[list[int]],
    prefix: Prefix | None = None,
) -> Tensor:
    """[R, D]: one row a completion token.

    The row of a token is the last hidden state at the position before it. Every prompt begins with
    the prefix, if one is given. Without one, and where attention keeps sequences in a row apart for
    nothing, they are packed; elsewhere they are padded on the right, where no token looks.
    """
    if can_pack(model) and not (prefix and prefix.tokens):
        return _packed_hidden(model, prompts, completions)
    known = len(prefix.tokens) if prefix else 0
    sequences = [
        prompt[known:] + answer for prompt, answer in zip(prompts, completions, strict=True)
    ]
    width = max(map(len, sequences)) - 1  # nothing is predicted after the last token
    ids_BT = torch.zeros(len(sequences), width, dtype=torch.long)
    rows_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    for index, (prompt, sequence) in enumerate(zip(prompts, sequences, strict=True)):
        length = len(sequence) - 1
        ids_BT[index, :length] = torch.tensor(sequence[:length])
        rows_BT[index, len(prompt) - known - 1 : length] = True
    with prefix.ahead_of(len(sequences)) if prefix else nullcontext() as cache:
        hidden_BTD = model.base_model(
            input_ids=ids_BT.to(model.device), past_key_values=cache, use_cache=cache is not None
        ).last_hidden_state
    return hidden_BTD[rows_BT.to(model.device)]


def can_pack(model: PreTrainedModel) -> bool:
    """Whether attention costs nothing between the sequences of a packed row."""
    return is_flash_attention_requested(model.config)


@torch.no_grad()
def keeps_apart(model: PreTrainedModel) -> bool:
    """Whether sequences of a packed row get the hidden states that each gets alone.

    Not where a model's class does not hand the positions on to its attention.
    """
    prompts, answers = [[0], [8]], [[*range(1, 8)], [*range(9, 16)]]
    packed_RD = _packed_hidden(model, prompts, answers).float()
    pairs = zip(prompts, answers, strict=True)
    alone_RD = torch.cat([_packed_hidden(model, [one], [other]) for one, other in pairs]).float()
    return bool((packed_RD - alone_RD).norm() < ROUNDING * alone_RD.norm())


def _packed_hidden(
    model: PreTrainedModel, prompts: list[list[int]], completions: list[list[int]]
) -> Tensor:
    """One row of all sequences; positions that begin anew keep them apart."""
    ids, positions, rows = list[int](), list[int](), list[bool]()
    for prompt, answer in zip(prompts, completions, strict=True):
        length = len(prompt) + len(answer) - 1
        ids += [*prompt, *answer][:length]
        positions += range(length)
        rows += [False] * (len(prompt) - 1) + [True] * len(answer)
    hidden_1TD = model.base_model(
        input_ids=torch.tensor([ids], device=model.device),
        position_ids=torch.tensor([positions], device=model.device),
        use_cache=False,
    ).last_hidden_state
    return hidden_1TD[:, torch.tensor(rows, device=model.device)][0]
