"""What a training step takes: memory, where its time goes; and what the machine could do."""

import threading
import time
import timeit
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch import nn


class Memory:
    """A GPU's memory that tensors have; without one the process's, looked at every 3 ms."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self.base = 0
        self.peak = 0

    def begin(self) -> None:
        """What is there by now is the base of what comes."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.base = self.peak = self._now()

    def _now(self) -> int:
        if torch.cuda.is_available():
            return torch.cuda.memory_allocated()
        return self._process.memory_info().rss

    @contextmanager
    def watched(self) -> Iterator[None]:
        """The peak of what happens inside after `begin`."""
        if torch.cuda.is_available():
            yield
            self.peak = torch.cuda.max_memory_allocated()
            return
        ended = threading.Event()

        def look() -> None:
            while not ended.wait(0.003):
                self.peak = max(self.peak, self._now())

        watcher = threading.Thread(target=look, daemon=True)
        watcher.start()
        yield
        ended.set()
        watcher.join()


class Spent:
    """Where the time of our steps goes, and what they compute, by functions of the trainer."""

    def __init__(self) -> None:
        from sdft import gradient, kept, sampler

        self._seconds: Counter[str] = Counter()
        self._tflop, self._steps = 0.0, 0
        self._watch(sampler, "generate", lambda: "sampling")
        self._watch(gradient.StepGradient, "accumulate", lambda: "teacher, student and loss")
        grad = torch.is_grad_enabled
        self._watch(gradient, "completion_hidden", lambda: "student" if grad() else "teacher")
        self._watch(kept.KeptPrompts, "hidden", lambda: "teacher")
        self._watch(gradient, "row_loss", lambda: "loss")

    def _watch(self, owner: Any, name: str, part: Callable[[], str]) -> None:
        real = getattr(owner, name)

        def watched(*args: Any) -> Any:
            label, began = part(), _clock()
            made = real(*args)
            self._seconds[label] += _clock() - began
            if name == "accumulate" and not self._steps:  # in the first step much is set up
                self._seconds.clear()
                self._tflop = 0.0
            self._steps += name == "accumulate"
            if name in ("completion_hidden", "hidden"):
                scored, prompts, completions, prefix = args
                passed = sum(map(len, completions))
                if name == "hidden":  # its prompts were read in the first step
                    model = scored._model
                else:
                    model = scored
                    passed += sum(map(len, prompts)) - len(prompts) * len(prefix.tokens)
                head = model.get_output_embeddings().weight.numel()
                layers = sum(one.numel() for one in model.base_model.parameters()) - head
                rows = sum(map(len, completions))
                passes = 3 if label == "student" else 1  # forward, and twice as much backward
                self._tflop += 2e-12 * passes * (passed * layers + rows * head)
            return made

        setattr(owner, name, watched)

    def a_step(self) -> dict[str, float]:
        """Of all steps but the first."""
        parts, steps = self._seconds, self._steps - 1
        known = ("teacher", "student", "loss")
        parts["backward"] = parts.pop("teacher, student and loss") - sum(parts[k] for k in known)
        shown = {f"{part} s": round(seconds / steps, 2) for part, seconds in parts.items()}
        return {**shown, "TFLOP of scoring": round(self._tflop / steps, 2)}


def _clock() -> float:
    """Seconds, when all that was asked of a GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def machine() -> dict[str, float]:
    """What this machine can do, by shapes of a scoring pass and of a step of decoding."""
    return _gpu() if torch.cuda.is_available() else _cpu()


def _best_s(work: Callable[[], object]) -> float:
    return min(timeit.repeat(work, timer=_clock, number=1, repeat=10))


def _gpu() -> dict[str, float]:
    """Products of 4,096 rows with Qwen2.5-1.5B's largest matrices in bf16, and copying."""
    with torch.device("cuda"):
        rows = torch.randn(4096, 1536, dtype=torch.bfloat16)
        matrix = torch.randn(8960, 1536, dtype=torch.bfloat16)
        large = torch.randn(2**29)
        other = torch.empty_like(large)
    flop, times = 2e-12 * len(rows) * matrix.numel(), 50  # more than it takes to ask for one
    return {
        "TFLOP/s linear": times
        * flop
        / _best_s(lambda: [nn.functional.linear(rows, matrix) for _ in range(times)]),
        "GB/s copying": 8e-9 * large.numel() / _best_s(lambda: other.copy_(large)),
    }


def _cpu() -> dict[str, float]:
    """Products of 1,024 rows with SmolLM2's matrices, and reading."""
    rows, matrix, large = torch.randn(1024, 576), torch.randn(1536, 576), torch.randn(2**27)
    layout = torch.ops.mkldnn._reorder_linear_weight(matrix, len(rows))
    few, many = rows[:16], [matrix.clone() for _ in range(150)]  # more than caches hold
    packed = [torch.ops.mkldnn._reorder_linear_weight(one, 16) for one in many]
    point = torch.ops.mkldnn._linear_pointwise

    flop = 2e-9 * len(rows) * matrix.numel()
    weights = 4e-9 * matrix.numel() * len(many)
    with torch.no_grad():
        found = {
            "GFLOP/s linear": flop / _best_s(lambda: nn.functional.linear(rows, matrix)),
            "GFLOP/s packed": flop / _best_s(lambda: point(rows, layout, None, "none", [], "")),
            "GB/s reading": 4e-9 * large.numel() / _best_s(large.sum),
            "GB/s 16 rows": weights
            / _best_s(lambda: [nn.functional.linear(few, one) for one in many]),
            "GB/s 16 rows packed": weights
            / _best_s(lambda: [point(few, one, None, "none", [], "") for one in packed]),
        }
    return {name: round(value, 1) for name, value in found.items()}
