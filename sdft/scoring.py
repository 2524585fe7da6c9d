"""Hidden states of the rows that the loss uses: those that predict a completion's tokens.

Shapes: B sequences, T tokens after the prefix, R rows (all completion tokens, sequence after
sequence), D width.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sdft.prefix import Prefix


def completion_hidden(
    model: PreTrainedModel,
    prompts: list[list[int]],
    completions: list[list[int]],
    skip: int = 0,
    prefix: Prefix | None = None,
) -> Tensor:
    """[R, D]: one row a completion token, without each completion's first `skip` tokens.

    The row of a token is the last hidden state at the position before it. Every prompt begins with
    the prefix, if one is given. Sequences are padded on the right, where no token looks.
    """
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
        rows_BT[index, len(prompt) - known - 1 + skip : length] = True
    cache = prefix.cache(len(sequences)) if prefix else None
    hidden_BTD = model.base_model(
        input_ids=ids_BT.to(model.device), past_key_values=cache, use_cache=cache is not None
    ).last_hidden_state
    return hidden_BTD[rows_BT.to(model.device)]
