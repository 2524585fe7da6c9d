"""Sequences that a model continues together, a token at a time.

Shapes: B sequences, T tokens so far, S tokens that may be drawn, V vocabulary.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import is_flash_attention_requested

from sdft.attention import ATTENTION
from sdft.drawing import Drawn, Sampling, draw
from sdft.model import LanguageModel
from sdft.prefix import Prefix, has_plain_cache, shared_prefix
from sdft.sharding import is_sharded

LEAST_STEPS = 64
"""With CUDA graphs, finished sequences are dropped only after this many steps: recording again
costs more than the smaller batch would save."""


class Batch:
    """Prompts and what follows them, with the keys and values of all tokens so far.

    `draws_BS` has a uniform number for each token that may be drawn.
    """

    def __init__(
        self, lm: LanguageModel, prompts: list[list[int]], draws_BS: Tensor, sampling: Sampling
    ) -> None:
        self._lm, self._sampling, self._draws_BS, self._step = lm, sampling, draws_BS, 0
        shared = shared_prefix(lm.model, prompts)
        self._ids_BT, mask_BT = _left_padded([prompt[len(shared) :] for prompt in prompts], lm)
        self._room = len(shared) + self._ids_BT.shape[1] + sampling.max_new_tokens
        self._cache: Any = Prefix(lm.model, shared).cache(len(prompts), self._room)
        self._mask_BT = torch.cat([mask_BT.new_ones(len(prompts), len(shared)), mask_BT], dim=-1)
        self._positions_BT = (self._mask_BT.cumsum(-1) - 1).clamp(min=0)[:, len(shared) :]

    def next(self) -> Drawn:
        """Draw a token for each sequence, to be followed by the next one."""
        drawn = draw(self._logits(self._mask_BT), self._draws_BS[:, self._step], self._sampling)
        self._step += 1
        self._ids_BT, self._positions_BT = drawn.tokens_B[:, None], self._positions_BT[:, -1:] + 1
        self._mask_BT = nn.functional.pad(self._mask_BT, (0, 1), value=True)
        return drawn

    def is_worth(self, alive: int) -> bool:
        """Whether to go on with so many sequences alone: copying the cache costs about one step."""
        return alive <= len(self._ids_BT) * 3 // 4

    def keep(self, rows: list[int]) -> None:
        """Go on with these sequences alone."""
        kept = torch.tensor(rows, device=self._lm.device)
        self._cache.reorder_cache(kept)
        self._ids_BT, self._mask_BT = self._ids_BT[kept], self._mask_BT[kept]
        self._positions_BT, self._draws_BS = self._positions_BT[kept], self._draws_BS[kept]

    def _logits(self, mask: Tensor) -> Tensor:
        """[B, V], in fp32, after the newest token."""
        state = self._lm.model(
            input_ids=self._ids_BT,
            attention_mask=mask,
            position_ids=self._positions_BT,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._cache = state.past_key_values
        return state.logits[:, -1].float()


class RecordedBatch(Batch):
    """The same on a GPU, where a step is recorded and replayed (CUDA graphs).

    A GPU would mostly wait for Python to start one kernel after the other. Once the prompts are
    read, all shapes stay as they are: attention sees all the memory that there will be, and a mask.
    The next step is made plainly, so that whatever a GPU sets up once is there, and the one after
    is recorded. The weights must not change meanwhile. On a CPU nothing is recorded.
    """

    def __init__(
        self, lm: LanguageModel, prompts: list[list[int]], draws_BS: Tensor, sampling: Sampling
    ) -> None:
        super().__init__(lm, prompts, draws_BS, sampling)
        self._place_1 = torch.zeros(1, dtype=torch.long, device=lm.device)
        """Where the cache takes the next token."""
        self._graph: torch.cuda.CUDAGraph | None = None
        self._drawn: Drawn | None = None
        self._unchanged = 0
        """Steps since the prompts were read or a sequence left."""

    def next(self) -> Drawn:
        if self._step == 0:
            return self._begin()
        self._unchanged += 1
        if self._unchanged == 1 or self._lm.device.type == "cpu":
            return self._advance()
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._drawn = self._advance()
        self._graph.replay()
        assert self._drawn is not None, "recorded with the graph"
        return self._drawn

    def is_worth(self, alive: int) -> bool:
        return alive <= len(self._ids_BT) // 2 and self._unchanged >= LEAST_STEPS

    def keep(self, rows: list[int]) -> None:
        super().keep(rows)
        self._graph, self._drawn, self._unchanged = None, None, 0

    def _begin(self) -> Drawn:
        """Read the prompts; then give every tensor the shape and the place that it keeps."""
        drawn = super().next()
        self._ids_BT = self._ids_BT.clone()
        self._place_1 += self._mask_BT.shape[1] - 1
        room = self._room - self._mask_BT.shape[1]
        self._mask_BT = nn.functional.pad(self._mask_BT, (0, room), value=False)
        # Column t now belongs to the token that comes after the one which is written at t.
        read = self._room - self._draws_BS.shape[1]
        self._draws_BS = nn.functional.pad(self._draws_BS, (read - 1, 1))
        for layer in self._cache.layers:
            layer.write_at(self._place_1)
        return drawn

    def _advance(self) -> Drawn:
        """A step of operations on the device alone."""
        self._mask_BT.index_fill_(1, self._place_1, True)
        logits_BV = self._logits(self._mask_BT[:, None, None])
        draw_B = self._draws_BS.index_select(1, self._place_1)[:, 0]
        drawn = draw(logits_BV, draw_B, self._sampling)
        self._ids_BT.copy_(drawn.tokens_B[:, None])
        self._positions_BT += 1
        self._place_1 += 1
        return drawn


def open_batch(
    lm: LanguageModel, prompts: list[list[int]], draws_BS: Tensor, sampling: Sampling
) -> Batch:
    """The batch that is fastest on the model's device; for use inside `masked_attention`."""
    kind = RecordedBatch if lm.device.type == "cuda" and _can_record(lm.model) else Batch
    return kind(lm, prompts, draws_BS, sampling)


@contextmanager
def masked_attention(model: PreTrainedModel) -> Generator[None]:
    """Inside, flash attention, which takes no mask of a fixed shape, gives way to torch's own."""
    config, usual = model.config, getattr(model.config, ATTENTION)
    if is_flash_attention_requested(config) and has_plain_cache(model):
        setattr(config, ATTENTION, "sdpa")
    try:
        yield
    finally:
        setattr(config, ATTENTION, usual)


def _can_record(model: PreTrainedModel) -> bool:
    """Whether a step is the same kernels on the same memory, but for what is in it."""
    masked = getattr(model.config, ATTENTION) == "sdpa"
    fixed = has_plain_cache(model) and not is_sharded(model)
    return masked and fixed and not any(map(_asks_the_device, model.modules()))


def _asks_the_device(module: nn.Module) -> bool:
    """Whether a layer waits for what is computed on a GPU, which no recording can.

    For the length, to choose rotary frequencies by; or for how many tokens each expert has, where
    the GPU has no product of groups for the weights' dtype.
    """
    kinds = getattr(module, "rope_type", None)  # of the layers' types, where they have several
    named = kinds.values() if isinstance(kinds, dict) else [kinds]
    by_length = any(kind == "longrope" or "dynamic" in str(kind) for kind in named)
    return by_length or hasattr(module, "num_experts")


def _left_padded(prompts: list[list[int]], lm: LanguageModel) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    pad = lm.tokenizer.pad_token_id
    ids = [[pad] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[False] * (width - len(prompt)) + [True] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=lm.device), torch.tensor(mask, device=lm.device)
