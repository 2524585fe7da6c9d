"""Checkpoints of a stage: all that the next step depends on, as safetensors, verified on loading.

Order of batches and random numbers are functions of (seed, step), so they need no state here.
"""

import shutil
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

from schemas.base import BadInput, Sealed, sync
from schemas.settings import RuntimeSettings
from schemas.stage import FileDigest
from sdft.files import placed
from sdft.modelfiles import all_files
from sdft.ranks import ALONE, Ranks
from sdft.stagelog import METRICS, ROLLOUTS
from sdft.teacher import Teacher
from sdft.tensorfiles import read_tensors, tensor_names, write_tensors

_MANIFEST = "manifest.json"
_COMPLETE = "COMPLETE"
MAX_SHARE = 0.05
"""What saving by the clock may take of the time."""


class Manifest(Sealed):
    """What a checkpoint holds."""

    key: str
    step: int
    files: tuple[FileDigest, ...]
    rollouts: tuple[FileDigest, ...]
    """Of the stage's rollouts/ so far, which a checkpoint has no copy of."""


@dataclass
class Checkpoints:
    """The checkpoints of one stage: `folder`/step-N, the newest `runtime.keep_checkpoints`."""

    folder: Path
    key: str
    runtime: RuntimeSettings
    trained: dict[str, Parameter]
    optimizer: torch.optim.Optimizer
    teacher: Teacher | None
    ranks: Ranks = ALONE
    seconds: float = 0.0
    """What saving has cost since the start."""
    _cost_s: float = 0.0
    _began_at: float = field(default_factory=time.monotonic)
    _saved_at: float = field(default_factory=time.monotonic)

    def due(self, step: int) -> bool:
        now = time.monotonic()
        since_s, elapsed_s = now - self._saved_at, now - self._began_at
        return is_due(self.runtime, step, since_s, elapsed_s, self.seconds + self._cost_s)

    def save(self, step: int, metrics: bytes) -> None:
        """Write the state after `step` steps, whole or not at all; `metrics` are its curve so far.

        Files, then the manifest with their hashes, then the name, then the mark that all is there;
        only then are older ones removed. The leading rank does that, and all write their parts.
        """
        began = time.monotonic()
        target = self.folder / f"step-{step:06d}"
        with self._placed(target) as partial:
            contents = {
                "model": self.trained,
                "optimizer": self._optimizer_tensors(),
                "teacher": self.teacher.averages if self.teacher else {},
            }
            for name, tensors in contents.items():
                if tensors:
                    write_tensors(tensors, partial / name, self.ranks)
            self.ranks.meet()
            if self.ranks.leads:
                (partial / METRICS).write_bytes(metrics)
                manifest = Manifest(
                    key=self.key,
                    step=step,
                    files=all_files(partial),
                    rollouts=all_files(self._rollouts),
                )
                manifest.seal().write(partial / _MANIFEST)
        if self.ranks.leads:
            (target / _COMPLETE).touch()
            sync(target)
            for old in sorted(self.folder.glob("step-*"))[: -self.runtime.keep_checkpoints]:
                shutil.rmtree(old)
        self.ranks.meet()  # before any of them may end
        self._saved_at = time.monotonic()
        self._cost_s = self._saved_at - began
        self.seconds += self._cost_s

    @contextmanager
    def _placed(self, target: Path) -> Generator[Path]:
        """As placed() does it, by the leading rank, for all."""
        if not self.ranks.leads:
            yield Path(self.ranks.from_first(None))
            return
        self.folder.mkdir(exist_ok=True)
        with placed(target) as partial:
            self.ranks.from_first(str(partial))
            yield partial

    def load(self) -> tuple[int, bytes]:
        """Load the newest checkpoint of this stage whose hashes verify.

        Returns its step and the metrics up to it, 0 and none where there is no checkpoint. One that
        does not verify is set aside under another name, with a message; rollouts, which no step
        depends on, are left out where they are not what was saved.
        """
        name = self.ranks.from_first(self._newest() if self.ranks.leads else None)
        if name is None:
            return 0, b""
        path = self.folder / name
        read_tensors(self.trained, path / "model")
        if self.teacher and self.teacher.averages:
            read_tensors(self.teacher.averages, path / "teacher")
        self._load_optimizer(path / "optimizer")
        return Manifest.read(path / _MANIFEST).step, (path / METRICS).read_bytes()

    def _newest(self) -> str | None:
        """The name of the newest one that verifies; whatever does not is set aside."""
        for path in sorted(self.folder.glob("step-*"), reverse=True):
            try:
                manifest = self._verified(path)
            except BadInput as problem:
                print(f"checkpoint {path.name} is set aside: {problem}", flush=True)
                shutil.rmtree(self.folder / f"bad-{path.name}", ignore_errors=True)
                path.rename(self.folder / f"bad-{path.name}")
                continue
            self._leave_out_altered(manifest.rollouts)
            return path.name
        return None

    def _verified(self, path: Path) -> Manifest:
        """The manifest of a checkpoint that is whole; raises BadInput with what is not."""
        if not (path / _COMPLETE).is_file():
            raise BadInput("it was not finished")
        if not (path / _MANIFEST).is_file():
            raise BadInput("it has no manifest")
        manifest = Manifest.read(path / _MANIFEST)
        if manifest.key != self.key:
            raise BadInput("it belongs to another stage")
        if all_files(path, lambda name: name.name not in (_MANIFEST, _COMPLETE)) != manifest.files:
            raise BadInput("its files are not those that were saved")
        return manifest

    @property
    def _rollouts(self) -> Path:
        return self.folder.parent / ROLLOUTS

    def _leave_out_altered(self, saved: tuple[FileDigest, ...]) -> None:
        there = all_files(self._rollouts)
        for file in saved:
            if file not in there:
                print(f"{ROLLOUTS}/{file.path} is left out: it is not what was saved", flush=True)
                (self._rollouts / file.path).unlink(missing_ok=True)

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}/{field}": value
            for name, parameter in self.trained.items()
            for field, value in self.optimizer.state.get(parameter, {}).items()
        }

    def _load_optimizer(self, stem: Path) -> None:
        keys = tensor_names(stem)
        if not keys:  # saved before the first gradient
            return
        for key in keys:
            name, field = key.rsplit("/", 1)
            parameter = self.trained[name]
            count = torch.zeros((), device=parameter.device)
            place = count if field == "step" else torch.zeros_like(parameter)
            self.optimizer.state[parameter][field] = place
        read_tensors(self._optimizer_tensors(), stem)


def is_due(
    runtime: RuntimeSettings, step: int, since_s: float, elapsed_s: float, saving_s: float
) -> bool:
    """Whether to save after `step` steps: every so many of them exactly, and by the clock.

    `since_s` have passed since the last time and `elapsed_s` since the start. By the clock only
    where saving, which would then have taken `saving_s` in all, stays within MAX_SHARE of that.
    """
    every = runtime.checkpoint_every_steps
    exactly = every is not None and step % every == 0
    affordable = saving_s <= MAX_SHARE * elapsed_s
    return exactly or (affordable and since_s >= runtime.checkpoint_every_s)
