"""Matrix products of linear layers through oneDNN, where a CPU computes them in fp32.

torch takes its plain product there, which is slower: by a tenth with a thousand rows, by half
where few rows meet a whole vocabulary.
"""

from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What `torch.nn.functional.linear` gives, and its gradient, but for rounding."""
    exact = rows.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    here = rows.device.type == weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
    if exact and here and rows.numel():
        return _Linear.apply(rows, weight, bias)
    return nn.functional.linear(rows, weight, bias)


@contextmanager
def quick_linears(*models: nn.Module) -> Generator[None]:
    """Inside, the linear layers of models on a CPU go through `linear`.

    A backward pass may come after; one that runs layers again must come inside.
    """
    found = {one for model in models for one in model.modules() if type(one) is nn.Linear}
    layers = [one for one in found if one.weight.device.type == "cpu"]
    for layer in layers:
        forward = partial(_forward, layer)
        layer.forward = forward  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own is behind it


def _forward(layer: nn.Linear, rows: Tensor) -> Tensor:
    return linear(rows, layer.weight, layer.bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return product(rows, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        rows_learn, weight_learns, bias_learns = ctx.needs_input_grad
        grad = grads[0].contiguous()
        flat = grad.view(-1, len(weight))
        return (
            product(grad, weight.T) if rows_learn else None,
            flat.T @ rows.reshape(-1, weight.shape[1]) if weight_learns else None,
            flat.sum(0) if bias_learns else None,
        )


def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """oneDNN's rows @ weight.T + bias; the weight may be in a layout of its own."""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
