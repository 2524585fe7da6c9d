"""The per-token divergence of teacher and student over the full vocabulary, row by row.

Shapes: R loss rows (completion tokens of all sequences, one after the other), C rows of a chunk,
D hidden width, V vocabulary. `log_p` is the teacher, `log_q` the student.

The loss is made from hidden states and head weights in chunks of rows, and its gradient in the same
pass, so that no [R, V] tensor, and no graph over one, ever exists.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sdft.linear import linear
from sdft.model import Head

CHUNK_ELEMENTS = 3 * 2**21
"""Elements of one chunk's logits (24 MiB in fp32); at most four such tensors exist at a time."""

RowScore = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""(student log-probabilities [C, V], which rows) -> (loss [C], its gradient with respect to the
logits [C, V])."""


def forward_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) = sum p (log p - log q), and its gradient.

    The gradient, here and in the two below, is with respect to the student's logits. All three
    write over `log_p` to save memory.
    """
    p = log_p.exp()
    loss_C = _dot(p, log_p.sub_(log_q))
    return loss_C, torch.exp(log_q, out=log_p).sub_(p)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(student || teacher) = sum q (log q - log p), and its gradient."""
    q = log_q.exp()
    ratio = torch.sub(log_q, log_p, out=log_p)
    loss_C = _dot(q, ratio)
    return loss_C, ratio.sub_(loss_C[:, None]).mul_(q)


def jsd(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, and its gradient."""
    share_q = log_q + math.log1p(-beta)
    share_p = log_p.add_(math.log(beta))
    log_m = torch.logaddexp(share_p, share_q, out=share_q)
    log_p = share_p.sub_(math.log(beta))
    teacher_C = _dot(log_p.exp(), log_p.sub_(log_m))
    ratio = torch.sub(log_q, log_m, out=log_m)
    q = torch.exp(log_q, out=log_p)
    student_C = _dot(q, ratio)
    gradient = ratio.sub_(student_C[:, None]).mul_(q).mul_(1 - beta)
    return beta * teacher_C + (1 - beta) * student_C, gradient


def _dot(a_CV: Tensor, b_CV: Tensor) -> Tensor:
    """[C]: the sum of products of each row, without a tensor of the products."""
    return torch.bmm(a_CV[:, None, :], b_CV[:, :, None])[:, 0, 0]


def teacher_score(kind: str, beta: float, teacher_RD: Tensor, teacher_head: Head) -> RowScore:
    """Score student rows by their divergence from the teacher's hidden states of the same rows."""
    formulas = {
        "forward_kl": forward_kl,
        "reverse_kl": reverse_kl,
        "jsd": lambda log_p, log_q: jsd(log_p, log_q, beta),
    }

    def score(log_q_CV: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        log_p_CV = teacher_head.logits(teacher_RD[rows]).log_softmax(-1)
        return formulas[kind](log_p_CV, log_q_CV)

    return score


def token_score(targets_R: Tensor) -> RowScore:
    """Score student rows by cross-entropy with given tokens: forward KL from a one-hot teacher."""

    def score(log_q_CV: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        targets_C1 = targets_R[rows, None]
        loss_C = -log_q_CV.gather(-1, targets_C1).squeeze(-1)
        one = torch.ones_like(targets_C1, dtype=log_q_CV.dtype)
        return loss_C, log_q_CV.exp().scatter_add_(-1, targets_C1, -one)

    return score


def chunks(rows: int, head: Head, chunk_rows: int | None = None) -> Iterator[slice]:
    """Rows that are taken through the head together, so that their logits stay small."""
    step = chunk_rows or _chunk_rows(head)
    return (slice(start, start + step) for start in range(0, rows, step))


def _chunk_rows(head: Head) -> int:
    return max(1, CHUNK_ELEMENTS // head.weight_VD.shape[0])


def row_loss(
    student_RD: Tensor, head: Head, weight_R: Tensor, score: RowScore, chunk_rows: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted sum of row losses.

    Its gradient with respect to the hidden states and the head is made in the same pass. The head's
    products are made in the dtype of the hidden states, its gradient in fp32 or wider. Returns
    (loss [], per-row loss [R], per-row entropy of the student in nats [R]); only the first carries
    a gradient.
    """
    return _RowLoss.apply(
        student_RD, head.weight_VD, head.bias_V, weight_R, head.softcap, score, chunk_rows
    )


class _RowLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_RD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        weight_R: Tensor,
        softcap: float | None,
        score: RowScore,
        chunk_rows: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        head = Head(weight_VD, bias_V, softcap).to(student_RD.dtype)
        wide = torch.promote_types(student_RD.dtype, torch.float32)
        grad_RD = torch.zeros_like(student_RD)
        _, weight_learns, bias_learns, *_ = ctx.needs_input_grad
        grad_VD = torch.zeros_like(weight_VD, dtype=wide) if weight_learns else None
        grad_V = (
            torch.zeros_like(bias_V, dtype=wide) if bias_V is not None and bias_learns else None
        )
        loss_R = student_RD.new_zeros(len(student_RD), dtype=wide)
        entropy_R = torch.zeros_like(loss_R)
        for rows in chunks(len(student_RD), head, chunk_rows):
            logits_CV = head.logits(student_RD[rows])
            log_q_CV = logits_CV.log_softmax(-1)
            total_C1 = logits_CV[:, :1] - log_q_CV[:, :1]  # what the softmax took off
            del logits_CV
            entropy_R[rows] = -_dot(log_q_CV.exp(), log_q_CV)
            loss_R[rows], grad_CV = score(log_q_CV, rows)
            grad_CV.mul_(weight_R[rows, None])
            if softcap is not None:
                capped_CV = log_q_CV.add_(total_C1)
                grad_CV.mul_(capped_CV.div_(softcap).square_().neg_().add_(1))
            del log_q_CV
            grad_RD[rows] = linear(grad_CV.to(student_RD.dtype), head.weight_VD.T, None)
            if grad_VD is not None:
                grad_VD.addmm_(grad_CV.T, student_RD[rows].to(wide))
            if grad_V is not None:
                grad_V += grad_CV.sum(0)
            del grad_CV  # before the next chunk's logits
        ctx.grads = (
            grad_RD,
            None if grad_VD is None else grad_VD.to(weight_VD.dtype),
            None if grad_V is None or bias_V is None else grad_V.to(bias_V.dtype),
        )
        ctx.mark_non_differentiable(loss_R, entropy_R)
        return (loss_R * weight_R).sum(), loss_R, entropy_R

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        made, ctx.grads = ctx.grads, None  # scaled in place, so they can be given out once
        if grads[0] != 1.0:  # the head's is as large as the head
            made = [None if one is None else one.mul_(grads[0]) for one in made]
        return *made, None, None, None, None
