"""Checkpoints of a stage: all that the next step depends on, as safetensors, verified on loading.

Order of batches and random numbers are functions of (seed, step), so they need no state here.
"""

import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from schemas.base import Contract
from schemas.digest import digest_file
from schemas.stage import FileDigest
from sdft.teacher import Teacher

_MANIFEST = "manifest.json"


class Manifest(Contract):
    """Written last into a checkpoint."""

    key: str
    step: int
    files: tuple[FileDigest, ...]


def save_checkpoint(
    folder: Path,
    step: int,
    key: str,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    teacher: Teacher | None,
    keep: int,
) -> Path:
    """Write the state after `step` steps to folder/step-N, whole or not at all; keep the last."""
    partial = folder / f".partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    contents = {
        "model": dict(model.named_parameters()),
        "optimizer": _optimizer_tensors(model, optimizer),
        "teacher": teacher.state() if teacher else {},
    }
    for name, tensors in contents.items():
        if tensors:
            save_file(
                {k: t.detach().contiguous() for k, t in tensors.items()},
                partial / f"{name}.safetensors",
            )
    files = []
    for path in sorted(partial.iterdir()):
        _fsync(path)
        files.append(
            FileDigest(path=path.name, size_bytes=path.stat().st_size, sha256=digest_file(path))
        )
    Manifest(key=key, step=step, files=tuple(files)).write(partial / _MANIFEST)
    target = folder / f"step-{step:06d}"
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    _fsync(folder)
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old)
    return target


def load_checkpoint(
    folder: Path,
    key: str,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    teacher: Teacher | None,
) -> int:
    """Load the newest checkpoint of this stage whose hashes verify; returns its step, 0 for none.

    One that does not verify is set aside under another name, with a message.
    """
    for path in sorted(folder.glob("step-*"), reverse=True):
        if (problem := _problem(path, key)) is None:
            break
        print(f"checkpoint {path.name} is set aside: {problem}", flush=True)
        shutil.rmtree(folder / f"bad-{path.name}", ignore_errors=True)
        path.rename(folder / f"bad-{path.name}")
    else:
        return 0
    _copy_into(dict(model.named_parameters()), load_file(path / "model.safetensors"))
    if teacher and teacher.state():
        _copy_into(teacher.state(), load_file(path / "teacher.safetensors"))
    _load_optimizer(model, optimizer, load_file(path / "optimizer.safetensors"))
    return Manifest.read(path / _MANIFEST).step


def _problem(path: Path, key: str) -> str | None:
    if not (path / _MANIFEST).is_file():
        return "it has no manifest"
    try:
        manifest = Manifest.read(path / _MANIFEST)
    except ValueError as error:
        return f"its manifest cannot be read: {error}"
    if manifest.key != key:
        return "it belongs to another stage"
    for file in manifest.files:
        if not (path / file.path).is_file() or digest_file(path / file.path) != file.sha256:
            return f"{file.path} is not the file that was saved"
    return None


def _optimizer_tensors(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    return {
        f"{name}/{field}": value
        for name, parameter in model.named_parameters()
        for field, value in optimizer.state.get(parameter, {}).items()
    }


def _load_optimizer(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        name, field = key.rsplit("/", 1)
        parameter = parameters[name]
        place = value if field == "step" else value.to(parameter.device)
        optimizer.state[parameter][field] = place


@torch.no_grad()
def _copy_into(parameters: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(saved[name])


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
