"""Named tensors on disk, as safetensors: whole in one file, or in parts, as the ranks have them.

Parts go through torch.distributed.checkpoint, so that another number of ranks, or a single
process, finds its own among them.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from sdft.ranks import Ranks


def write_tensors(tensors: Mapping[str, Tensor], stem: Path, ranks: Ranks) -> None:
    """Write stem.safetensors, or a folder of that name with each rank's parts.

    All ranks must call it; who goes on must not take it for done before they have met.
    """
    saved = {name: one.detach().contiguous() for name, one in tensors.items()}
    if any(isinstance(one, DTensor) for one in saved.values()):
        writer = HuggingFaceStorageWriter(str(stem), save_distributed=True)
        dcp.save(_with_dimensions(saved), storage_writer=writer)
    elif ranks.leads:
        save_file(saved, stem.with_suffix(".safetensors"))


def tensor_names(stem: Path) -> list[str]:
    """The names of all tensors that were written; none where nothing was."""
    names = set[str]()
    for file in _files(stem):
        with safe_open(file, framework="pt") as opened:
            names |= set(opened.keys())
    return sorted(names)


@torch.no_grad()
def read_tensors(into: Mapping[str, Tensor], stem: Path) -> None:
    """Fill tensors, whole or in parts, with what was written of them, whole or in parts."""
    if stem.is_dir():
        parts = _with_dimensions({name: one.detach() for name, one in into.items()})
        with warnings.catch_warnings():  # that a single process reads
            warnings.filterwarnings("ignore", "torch.distributed is")
            dcp.load(parts, storage_reader=HuggingFaceStorageReader(str(stem)))
        return
    saved = load_file(stem.with_suffix(".safetensors"))
    for name, tensor in into.items():
        value = saved[name]
        if isinstance(tensor, DTensor):
            mesh, placements = tensor.device_mesh, tensor.placements
            value = distribute_tensor(value.to(tensor.device), mesh, placements, src_data_rank=None)
        tensor.copy_(value)


def _files(stem: Path) -> list[Path]:
    whole_file = stem.with_suffix(".safetensors")
    return [whole_file] if whole_file.is_file() else list(stem.glob("*.safetensors"))


def _with_dimensions(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same memory; the reader of parts cannot read a number without dimensions."""
    return {name: one if one.dim() else one.view(1) for name, one in tensors.items()}
