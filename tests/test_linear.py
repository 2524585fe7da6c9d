"""Linear layers through oneDNN: the numbers of torch's own, forward and backward."""

import pytest
import torch
from torch import Tensor, nn

from sdft.linear import linear, quick_linears


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_values_and_gradients_are_those_of_float64(bias: bool, transposed: bool) -> None:
    torch.manual_seed(0)
    rows, bias_V = torch.randn(3, 5, 16), torch.randn(24) if bias else None
    weight = torch.randn(16, 24).T if transposed else torch.randn(24, 16)
    given = [one for one in (rows, weight, bias_V) if one is not None]

    def made(leaves: list[Tensor]) -> list[Tensor]:
        out = linear(leaves[0], leaves[1], leaves[2] if bias else None)
        weights = torch.linspace(-1, 1, 24, dtype=out.dtype)
        return [out, *torch.autograd.grad((out * weights).sum(), leaves)]

    narrow = made([one.clone().requires_grad_() for one in given])
    wide = made([one.double().requires_grad_() for one in given])
    assert "_Linear" in str(linear(rows.requires_grad_(), weight, bias_V).grad_fn)
    for mine, exact in zip(narrow, wide, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=1e-5)


def test_only_what_learns_gets_a_gradient() -> None:
    rows, weight = torch.randn(2, 4), torch.randn(3, 4).requires_grad_()
    linear(rows, weight, None).sum().backward()
    torch.testing.assert_close(weight.grad, rows.sum(0).expand(3, 4))
    assert rows.grad is None


def test_no_rows_and_other_dtypes_take_the_plain_way() -> None:
    layer = nn.Linear(4, 3)
    with quick_linears(layer):
        assert layer(torch.zeros(0, 4)).shape == (0, 3)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(torch.zeros(2, 4)).dtype == torch.bfloat16
        assert layer.double()(torch.zeros(2, 4, dtype=torch.float64)).dtype == torch.float64


def test_layers_are_themselves_again_afterwards() -> None:
    """Also after an error, and where a model is named twice, as an adapter's teacher is."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    rows = torch.randn(3, 4)
    plain = model(rows)
    with pytest.raises(KeyError), quick_linears(model, model):
        assert "_Linear" in str(model(rows).grad_fn)
        torch.testing.assert_close(model(rows), plain)
        raise KeyError
    assert torch.equal(model(rows), plain)
    assert "_Linear" not in str(model(rows).grad_fn)
