"""A frozen teacher's prompts, read once a stage: their keys and values are kept over its epochs.

They depend on nothing that a stage changes. What is kept lies in a file without a name, which goes
with its process; a stage that is resumed reads prompts again as it comes to them. A prompt is
always read with the same others, of its step of the first epoch, so that its states have the same
bits whenever that is.

Shapes: B sequences, S tokens of the prefix that all prompts share, P tokens of a prompt between it
and the last one, T tokens of an answer, L all of these, R rows (all completion tokens, sequence
after sequence), K heads, D width.
"""

import inspect
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from schemas.stage import StageSpec
from sdft.files import disk_errors
from sdft.model import LanguageModel
from sdft.prefix import Prefix, has_plain_cache, shared_prefix
from sdft.schedule import micro_batches, order
from sdft.sharding import is_sharded
from sdft.teacher import Teacher

MOST_BYTES = 2**32
"""What a stage may keep on its disk; larger ones keep nothing."""
Prompt = tuple[int, ...]


def can_keep(model: PreTrainedModel) -> bool:
    """Whether a model takes states of prompts of several lengths, and their positions."""
    takes = inspect.signature(model.base_model.forward).parameters
    return has_plain_cache(model) and "position_ids" in takes


def open_kept(
    lm: LanguageModel, teacher: Teacher, prompts: list[list[int]], spec: StageSpec, folder: Path
) -> "KeptPrompts | None":
    """The teacher's prompts of a stage; None where it would read none of them twice, or cannot.

    Raises OSError where the folder's disk has no room for what is to be kept.
    """
    settings, model = spec.training, teacher.model
    changes = bool(teacher.averages) or spec.runtime.compile or is_sharded(model)
    if settings.epochs == 1 or changes or lm.device.type != "cpu" or not can_keep(model):
        return None
    shared = shared_prefix(model, prompts)
    rows, together = order(len(prompts), spec.seed, 0), settings.prompts_per_step
    steps = (rows[at : at + together] for at in range(0, len(rows), together))
    groups = ([prompts[row] for row in step] for step in steps)
    with torch.no_grad(), teacher.speaking(), lm.computing():
        size_bytes = _token_bytes(model) * sum(len(one) - len(shared) - 1 for one in prompts)
        return KeptPrompts(model, shared, groups, folder) if size_bytes <= MOST_BYTES else None


def _token_bytes(model: PreTrainedModel) -> int:
    """What the keys and values of a token take in all layers."""
    return sum(one.nbytes for pair in Prefix(model, [0]).pairs() for one in pair)


class KeptPrompts:
    """Prompts that all begin with `shared`, in groups: a prompt is read with others of its own.

    Raises OSError where the folder's disk has no room for their states.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        shared: list[int],
        groups: Iterable[Sequence[list[int]]],
        folder: Path,
    ) -> None:
        self._model, self._shared = model, len(shared)
        pairs = Prefix(model, shared or [0]).pairs()
        self._ahead = [[one[:, :, : len(shared)] for one in pair] for pair in pairs]
        """The prefix's keys and values in each layer, [1, K, S, D]; S may be 0."""
        self._groups: dict[Prompt, list[Prompt]] = {}
        for group in groups:
            new = [one for one in dict.fromkeys(map(tuple, group)) if one not in self._groups]
            self._groups |= dict.fromkeys(new, new)
        self._places: dict[Prompt, list[list[int]]] = {}
        """Where the keys and values of a prompt's own tokens are, in each layer."""
        self._scratch = _Scratch(folder, _token_bytes(model) * sum(map(self._own, self._groups)))

    def hidden(self, prompts: list[list[int]], answers: list[list[int]], budget: int) -> Tensor:
        """[R, D]: what `completion_hidden` gives; what was not read is, `budget` tokens a pass."""
        asked = [tuple(prompt) for prompt in prompts]
        for prompt in asked:
            if prompt not in self._places:
                self._read(prompt, budget)
        lengths_B = torch.tensor([*map(self._own, asked)])
        width, rows = int(lengths_B.max()), max(map(len, answers))
        ids_BT = torch.zeros(len(asked), rows, dtype=torch.long)
        rows_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
        for index, (prompt, answer) in enumerate(zip(asked, answers, strict=True)):
            ids_BT[index, : len(answer)] = torch.tensor([prompt[-1], *answer[:-1]])
            rows_BT[index, : len(answer)] = True
        columns = torch.arange(self._shared + width + rows)  # padding, prefix, prompt, answer
        hidden_BTD = self._model.base_model(
            input_ids=ids_BT,
            attention_mask=columns >= width - lengths_B[:, None],
            position_ids=self._shared + lengths_B[:, None] + torch.arange(rows),
            past_key_values=self._cache(width, partial(self._kept, asked, width)),
            use_cache=True,
        ).last_hidden_state
        return hidden_BTD[rows_BT]

    def _own(self, prompt: Prompt) -> int:
        """Tokens of a prompt whose states are kept."""
        return len(prompt) - self._shared - 1

    def _read(self, prompt: Prompt, budget: int) -> None:
        """Have the states of a prompt in the file, with those of its group that share its pass.

        Which these are does not depend on when it is asked for: products round by the rows that
        they have.
        """
        group = self._groups[prompt]
        parts = micro_batches([*map(self._own, group)], budget)
        [part] = [part for part in parts if group.index(prompt) in part]
        prompts = [group[index] for index in part]
        width = self._own(prompts[0])
        ids_BP = torch.zeros(len(part), width, dtype=torch.long)
        for row, one in zip(ids_BP, prompts, strict=True):
            row[: self._own(one)] = torch.tensor(one[self._shared : -1])
        places = [[[0, 0] for _ in self._ahead] for _ in prompts]
        if width:
            cache = self._cache(0, partial(self._keep, prompts, places))
            self._model.base_model(input_ids=ids_BP, past_key_values=cache, use_cache=True)
        self._places |= zip(prompts, places, strict=True)

    def _cache(self, tokens: int, ahead: Callable[..., Tensor]) -> DynamicCache:
        """A cache of the prefix and so many tokens more, which `ahead` gives."""
        cache = DynamicCache(config=self._model.config)
        layers: list[Any] = [
            _Lent(self._shared + tokens, partial(ahead, number))
            for number in range(len(self._ahead))
        ]
        cache.layers = layers
        return cache

    def _keep(
        self,
        prompts: list[Prompt],
        places: list[list[list[int]]],
        layer: int,
        kind: int,
        states_BKPD: Tensor,
    ) -> Tensor:
        """[B, K, S, D]: the prefix, for a pass that reads prompts; writes what states it made."""
        for prompt, place, states_KPD in zip(prompts, places, states_BKPD, strict=True):
            place[layer][kind] = self._scratch.write(states_KPD[:, : self._own(prompt)])
        return self._ahead[layer][kind].expand(len(prompts), -1, -1, -1)

    def _kept(
        self, prompts: list[Prompt], width: int, layer: int, kind: int, states_BKTD: Tensor
    ) -> Tensor:
        """[B, K, S + width, D]: prefix and prompts, for a pass over answers; padded on the left."""
        _, heads, _, size = states_BKTD.shape
        ahead_KSD = self._ahead[layer][kind][0]
        kept_BKPD = states_BKTD.new_zeros(len(prompts), heads, self._shared + width, size)
        for row, prompt in zip(kept_BKPD, prompts, strict=True):
            length = self._own(prompt)
            row[:, width - length :][:, : self._shared] = ahead_KSD
            if length:
                states_KPD = row.new_empty(heads, length, size)
                self._scratch.read(self._places[prompt][layer][kind], states_KPD)
                row[:, -length:] = states_KPD
        return kept_BKPD


class _Lent(DynamicLayer):
    """Has others say what is ahead of a pass's states, as it makes them; keeps nothing."""

    def __init__(self, tokens: int, ahead: Callable[[int, Tensor], Tensor]) -> None:
        super().__init__()
        self._tokens, self._ahead = tokens, ahead

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = (
            torch.cat([self._ahead(kind, own), own], dim=-2)
            for kind, own in enumerate((key_states, value_states))
        )
        return keys, values

    def get_seq_length(self) -> int:
        return self._tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._tokens + query_length, 0


class _Scratch:
    """A file without a name, so that nothing is left of it whatever becomes of the process.

    Its room is taken at once, so that a full disk is met before any work. Raises OSError then.
    """

    def __init__(self, folder: Path, size_bytes: int) -> None:
        self._folder, self._end = folder, 0
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (for the whole stage)
        if size_bytes and sys.platform == "linux":
            with disk_errors(folder):
                os.posix_fallocate(self._file.fileno(), 0, size_bytes)

    def write(self, states: Tensor) -> int:
        """Write a tensor behind what was written; returns its place. Raises OSError."""
        place = self._file.seek(self._end)
        with disk_errors(self._folder):
            self._file.write(_bytes(states.contiguous()))
            self._file.flush()
        self._end = self._file.tell()
        return place

    def read(self, place: int, states: Tensor) -> None:
        """Fill a tensor that is contiguous with what was written there."""
        self._file.seek(place)
        self._file.readinto(_bytes(states))


def _bytes(states: Tensor) -> memoryview:
    return states.view(-1).view(torch.uint8).numpy().data
