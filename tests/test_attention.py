"""Attention to a prefix and to a sequence's own tokens apart: that to both together."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sdft.attention import ATTENTION, attend_apart, behind_prefix, can_attend_apart
from sdft.model import load_model

SEQUENCES, PREFIX, TOKENS, WIDTH = 3, 11, 5, 8


def states(heads: int, groups: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, own keys and values, and the prefix's."""
    torch.manual_seed(0)
    shapes = [(SEQUENCES, heads * groups, TOKENS)]
    shapes += [(SEQUENCES, heads, TOKENS)] * 2 + [(1, heads, PREFIX)] * 2
    return [torch.randn(*shape, WIDTH).to(dtype).requires_grad_() for shape in shapes]


def together(tensors: list[Tensor], scale: float | None) -> Tensor:
    query, *own = tensors[:3]
    rows = [one.expand(SEQUENCES, -1, -1, -1) for one in tensors[3:]]
    key, value = (torch.cat(pair, -2) for pair in zip(rows, own, strict=True))
    mask = torch.ones(TOKENS, PREFIX + TOKENS, dtype=torch.bool).tril(PREFIX)
    return scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=True)


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (4, 1), (2, 3), (1, 4)])
def test_answers_and_gradients_are_those_of_both_together(
    heads: int, groups: int, scale: float | None
) -> None:
    def made(answer: Tensor, tensors: list[Tensor]) -> list[Tensor]:
        weights = torch.linspace(-1, 1, answer.numel(), dtype=answer.dtype).view_as(answer)
        return [answer, *torch.autograd.grad((answer * weights).sum(), tensors)]

    wide = states(heads, groups, torch.float64)
    exact = made(together(wide, scale), wide)
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        tensors = states(heads, groups, dtype)
        apart = made(attend_apart(tensors, scale), tensors)
        for mine, theirs in zip(apart, exact, strict=True):
            torch.testing.assert_close(mine.double(), theirs, rtol=limit, atol=limit)


def test_where_one_part_is_all_that_counts() -> None:
    """Scores of hundreds: the sums of exponentials overflow, their logarithms do not."""
    tensors = states(2, 1, torch.float32)
    with torch.no_grad():
        for part in (1, 3):
            loud = [*tensors]
            loud[part] = loud[part] * 1000
            answer = attend_apart(loud, None)
            torch.testing.assert_close(answer, together(loud, None), rtol=1e-4, atol=1e-4)


def test_products_are_in_the_dtype_of_autocast() -> None:
    tensors = states(2, 2, torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        answer = attend_apart(tensors, None)
        assert answer.dtype == torch.bfloat16
    exact = together(tensors, None)
    torch.testing.assert_close(answer.float(), exact, rtol=0.05, atol=0.05)


def test_a_model_is_as_it_was_afterwards_whatever_happens(tiny_dir: Path) -> None:
    model = load_model(tiny_dir, torch.device("cpu")).model
    usual = getattr(model.config, ATTENTION)
    with pytest.raises(KeyboardInterrupt), behind_prefix(model, []):
        assert getattr(model.config, ATTENTION) != usual
        raise KeyboardInterrupt
    assert getattr(model.config, ATTENTION) == usual


def test_which_models_can(tiny_dir: Path) -> None:
    model = load_model(tiny_dir, torch.device("cpu")).model
    wide, narrow = torch.zeros(1, 2, 9, 8), torch.zeros(1, 2, 9, 6)
    assert can_attend_apart(model, [(wide, wide)])
    assert not can_attend_apart(model, [(wide, narrow)])
    model.base_model.compile()
    assert not can_attend_apart(model, [(wide, wide)])  # it would be compiled anew for each pass
    eager = load_model(tiny_dir, torch.device("cpu")).model
    eager.set_attn_implementation("eager")
    assert not can_attend_apart(eager, [(wide, wide)])
