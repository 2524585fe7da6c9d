"""Hidden states of the rows that the loss uses: those that predict a completion's tokens.

Shapes: B sequences, T tokens, R rows (all completion tokens, sequence after sequence), D width.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel


def completion_hidden(
    model: PreTrainedModel, prompts: list[list[int]], completions: list[list[int]], skip: int = 0
) -> Tensor:
    """[R, D]: one row a completion token, without each completion's first `skip` tokens.

    The row of a token is the last hidden state at the position before it.
    """
    sequences = [prompt + answer for prompt, answer in zip(prompts, completions, strict=True)]
    width = max(map(len, sequences)) - 1  # nothing is predicted after the last token
    device = model.device
    ids_BT = torch.zeros(len(sequences), width, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    rows_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    for index, (prompt, sequence) in enumerate(zip(prompts, sequences, strict=True)):
        length = len(sequence) - 1
        ids_BT[index, :length] = torch.tensor(sequence[:length])
        mask_BT[index, :length] = 1
        rows_BT[index, len(prompt) - 1 + skip : length] = True
    hidden_BTD = model.base_model(
        input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device), use_cache=False
    ).last_hidden_state
    return hidden_BTD[rows_BT.to(device)]
