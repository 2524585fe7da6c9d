"""The processes that train a stage together, and what they have to agree on.

Each holds the same code, data and seed, and knows every answer of a step; only the work on them is
spread. Whatever can end or change a step is decided together: one that went its own way would leave
the others waiting.
"""

import json
import os
from collections.abc import Generator, Iterable
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from schemas.base import BadInput
from schemas.settings import RuntimeSettings


@dataclass(frozen=True)
class Ranks:
    """This process among `world` of them; alone it agrees with itself at no cost."""

    rank: int = 0
    world: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes files and talks."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """The places, of so many in a row, that are this rank's; may be none."""
        return range(count * self.rank // self.world, count * (self.rank + 1) // self.world)

    def gather(self, values: list[Any]) -> list[Any]:
        """Every rank's values, which JSON can hold, in the order of the ranks."""
        if self.world == 1:
            return values
        ours = torch.tensor(bytearray(json.dumps(values).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.long) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([len(ours)]))
        padded = ours.new_zeros(int(max(sizes)))
        padded[: len(ours)] = ours
        theirs = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(theirs, padded)
        texts = [
            one[: int(size)].numpy().tobytes() for one, size in zip(theirs, sizes, strict=True)
        ]
        return [value for text in texts for value in json.loads(text)]

    def any(self, one: bool) -> bool:
        """Whether it holds for at least one rank."""
        return any(self.gather([one]))

    def from_first(self, value: Any) -> Any:
        """What the leading rank says."""
        return self.gather([value] if self.leads else [])[0]

    def meet(self) -> None:
        """Go on when all are here."""
        self.gather([])

    def sum(self, values: list[float]) -> list[float]:
        """Each value summed over the ranks, to the same bits on all of them."""
        everyones = self.gather([values])
        return values if self.world == 1 else [sum(ones) for ones in zip(*everyones, strict=True)]

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Each parameter's gradient summed over the ranks; one that no rank has stays None.

        Those of sharded parameters are sums already.
        """
        if self.world == 1:
            return
        whole_ones = [one for one in parameters if not isinstance(one, DTensor)]
        learning = [one for one in whole_ones if one.requires_grad]
        reached = torch.tensor([one.grad is not None for one in learning], dtype=torch.uint8)
        dist.all_reduce(reached, dist.ReduceOp.MAX)
        under_way: list[Any] = []
        for parameter, has in zip(learning, reached.tolist(), strict=True):
            if has and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if has:
                under_way.append(dist.all_reduce(parameter.grad, async_op=True))
        for one in under_way:
            one.wait()


ALONE = Ranks()


def whole(part: Tensor) -> Tensor:
    """A tensor that may lie in parts on the ranks, put together; its gradient is their sum.

    Whatever is no such tensor is given back.
    """
    return part.full_tensor(grad_placements=[Partial()]) if isinstance(part, DTensor) else part


def is_rank() -> bool:
    """Whether torchrun, or our own start, made this process one of several."""
    return dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1


def leads() -> bool:
    """Whether this process is the leading rank, or alone; known before the ranks have met."""
    return not is_rank() or os.environ["RANK"] == "0"


@contextmanager
def open_ranks(runtime: RuntimeSettings) -> Generator[Ranks]:
    """Meet the other ranks, where there are any; inside, only the leading one prints.

    Raises BadInput where there are fewer GPUs than ranks on this machine.
    """
    if not is_rank():
        yield ALONE
        return
    local = int(os.environ["LOCAL_RANK"])
    on_gpus = runtime.device != "cpu" and torch.cuda.is_available()
    if on_gpus:
        if (there := torch.cuda.device_count()) < (needed := int(os.environ["LOCAL_WORLD_SIZE"])):
            raise BadInput(
                f"{needed} processes need a GPU each, but {there} are here; lower "
                "runtime.processes or set runtime.device to cpu"
            )
        torch.cuda.set_device(local)
    patience = timedelta(seconds=runtime.stall_timeout_s)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo", timeout=patience)
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    try:
        with (
            Path(os.devnull).open("w") as nowhere,
            nullcontext() if ranks.leads else redirect_stdout(nowhere),
        ):
            yield ranks
    finally:
        dist.destroy_process_group()
