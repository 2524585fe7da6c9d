"""The chunked loss and its hand-made gradient against an independent float64 reference."""

from itertools import accumulate

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from sdft.divergence import row_loss, teacher_score, token_score
from sdft.model import Head

R, D, V = 23, 8, 50
BETA = 0.3


def reference(kind: str, p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """Straight from the definitions, with autograd for the gradient."""
    p, q = p_logits.softmax(-1), q_logits.softmax(-1)
    if kind == "forward_kl":
        return (p * (p.log() - q.log())).sum(-1)
    if kind == "reverse_kl":
        return (q * (q.log() - p.log())).sum(-1)
    m = BETA * p + (1 - BETA) * q
    left, right = (p * (p.log() - m.log())).sum(-1), (q * (q.log() - m.log())).sum(-1)
    return BETA * left + (1 - BETA) * right


def inputs(bias: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    found = {
        "student": draw(R, D),
        "weight": draw(V, D),
        "teacher": draw(R, D),
        "other": draw(V, D),
    }
    found["rows"] = draw(R).exp()
    if bias:
        found["bias"] = draw(V)
    return found


def leaves(found: dict[str, Tensor]) -> list[Tensor]:
    names = [name for name in ("student", "weight", "bias") if name in found]
    return [found[name].clone().requires_grad_() for name in names]


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("chunk", [1, 7, R, 1000])
@pytest.mark.parametrize(("bias", "softcap"), [(False, None), (True, None), (False, 2.0)])
def test_loss_and_gradient_equal_the_float64_reference(
    kind: str, chunk: int, bias: bool, softcap: float | None
) -> None:
    found = inputs(bias)
    expected_leaves, actual_leaves = leaves(found), leaves(found)

    def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        raw = torch.nn.functional.linear(hidden, weight, bias)
        return raw if softcap is None else softcap * torch.tanh(raw / softcap)

    teacher_logits = logits(found["teacher"], found["other"])
    expected = (reference(kind, teacher_logits, logits(*expected_leaves)) * found["rows"]).sum()
    expected.backward()

    teacher_head = Head(found["other"], None, softcap)
    score = teacher_score(kind, BETA, found["teacher"], teacher_head)
    student, weight, *rest = actual_leaves
    head = Head(weight, rest[0] if rest else None, softcap)
    actual, _, _ = row_loss(student, head, found["rows"], score, chunk)
    actual.backward()

    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    for mine, theirs in zip(actual_leaves, expected_leaves, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_float32_is_within_1e_6_of_float64(kind: str) -> None:
    found = inputs(bias=False)
    wide = leaves(found)
    narrow = [leaf.detach().float().requires_grad_() for leaf in wide]
    losses = []
    for (student, weight), dtype in ((wide, torch.float64), (narrow, torch.float32)):
        teacher, other = found["teacher"].to(dtype), found["other"].to(dtype)
        score = teacher_score(kind, BETA, teacher, Head(other, None, None))
        weight_R = torch.full((R,), 1 / R, dtype=dtype)
        loss, _, _ = row_loss(student, Head(weight, None, None), weight_R, score, 5)
        loss.backward()
        losses.append(loss.double())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(narrow, wide, strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_memory_is_a_tenth_of_one_tensor_of_all_logits(kind: str) -> None:
    """At 2,048 rows and a vocabulary of 152,064, beyond the gradients themselves."""
    rows, vocabulary, width = 2048, 152_064, 4
    student, teacher = torch.randn(2, rows, width)
    weight = torch.randn(vocabulary, width)
    for leaf in (student, weight):
        leaf.requires_grad_()
    score = teacher_score(kind, BETA, teacher, Head(weight.detach(), None, None))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        weight_R = torch.full((rows,), 1 / rows)
        row_loss(student, Head(weight, None, None), weight_R, score)[0].backward()
    assert profiled.profiler is not None
    events = profiled.profiler.kineto_results.events()
    events = sorted((one for one in events if one.name() == "[memory]"), key=lambda e: e.start_ns())
    peak = max(accumulate(one.nbytes() for one in events))
    extra = peak - 4 * (student.numel() + weight.numel())
    assert 0 < extra <= 0.10 * 4 * rows * vocabulary


def test_a_row_far_outside_the_students_belief_still_has_a_gradient() -> None:
    """Full vocabulary: the teacher's token is found even if the student ranks it last."""
    student = torch.zeros(1, 1, requires_grad=True)
    weight = torch.zeros(200, 1)
    bias = torch.linspace(20, -20, 200).requires_grad_()
    teacher_bias = torch.zeros(200)
    teacher_bias[150] = 40.0
    score = teacher_score("forward_kl", 0.5, torch.zeros(1, 1), Head(weight, teacher_bias, None))
    row_loss(student, Head(weight, bias, None), torch.ones(1), score)[0].backward()
    assert bias.grad is not None
    assert bias.grad[150] < -0.99


def test_sft_is_cross_entropy_and_entropy_is_that_of_the_student() -> None:
    found = inputs(bias=False)
    targets = torch.arange(R) % V
    student, weight = leaves(found)
    loss, loss_R, entropy_R = row_loss(
        student, Head(weight, None, None), torch.full((R,), 1 / R), token_score(targets), 4
    )
    loss.backward()
    plain, plain_weight = leaves(found)
    logits = plain @ plain_weight.T
    expected = torch.nn.functional.cross_entropy(logits, targets)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(student.grad, plain.grad)
    torch.testing.assert_close(weight.grad, plain_weight.grad)
    torch.testing.assert_close(loss_R.mean(), expected.detach())
    torch.testing.assert_close(
        entropy_R, torch.distributions.Categorical(logits=logits.detach()).entropy()
    )
