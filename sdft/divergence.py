"""The per-token divergence of teacher and student over the full vocabulary, row by row.

Shapes: R loss rows (completion tokens of all sequences, one after the other), C rows of a chunk,
D hidden width, V vocabulary. `log_p` is the teacher, `log_q` the student.

The loss is made from hidden states and head weights in chunks of rows, and its gradient in the same
pass, so that no [R, V] tensor, and no graph over one, ever exists.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sdft.model import Head

CHUNK_ELEMENTS = 2**24
"""Logits held at once (64 MiB in fp32)."""

RowScore = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""(student log-probabilities [C, V], which rows) -> (loss [C], its gradient by logits [C, V])."""


def forward_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) = sum p (log p - log q), and its gradient by the student's logits."""
    p = log_p.exp()
    loss_C = (p * (log_p - log_q)).sum(-1)
    return loss_C, log_q.exp() - p


def reverse_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(student || teacher) = sum q (log q - log p), and its gradient by the student's logits."""
    q, ratio = log_q.exp(), log_q - log_p
    loss_C = (q * ratio).sum(-1)
    return loss_C, q * (ratio - loss_C[:, None])


def jsd(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, and its gradient."""
    p, q = log_p.exp(), log_q.exp()
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    student_C = (q * (log_q - log_m)).sum(-1)
    loss_C = beta * (p * (log_p - log_m)).sum(-1) + (1 - beta) * student_C
    return loss_C, (1 - beta) * q * (log_q - log_m - student_C[:, None])


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
        return loss_C, log_q_CV.exp().scatter_add(-1, targets_C1, -one)

    return score


def row_loss(
    student_RD: Tensor, head: Head, weight_R: Tensor, score: RowScore, chunk_rows: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted sum of row losses, with its gradient by hidden states and head already made.

    Returns (loss [], per-row loss [R], per-row entropy of the student in nats [R]); only the first
    carries a gradient.
    """
    chunk_rows = chunk_rows or max(1, CHUNK_ELEMENTS // head.weight_VD.shape[0])
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
        chunk_rows: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        head = Head(weight_VD, bias_V, softcap)
        wide = torch.promote_types(student_RD.dtype, torch.float32)
        grad_RD = torch.zeros_like(student_RD)
        grad_VD = torch.zeros_like(weight_VD, dtype=wide)
        grad_V = None if bias_V is None else torch.zeros_like(bias_V)
        loss_R = student_RD.new_zeros(len(student_RD), dtype=wide)
        entropy_R = torch.zeros_like(loss_R)
        for start in range(0, len(student_RD), chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits_CV = head.logits(student_RD[rows])
            log_q_CV = logits_CV.log_softmax(-1)
            loss_R[rows], grad_CV = score(log_q_CV, rows)
            entropy_R[rows] = -(log_q_CV.exp() * log_q_CV).sum(-1)
            grad_CV = grad_CV * weight_R[rows, None]
            if softcap is not None:
                grad_CV = grad_CV * (1 - (logits_CV / softcap) ** 2)
            grad_RD[rows] = (grad_CV.to(weight_VD.dtype) @ weight_VD).to(grad_RD.dtype)
            grad_VD.addmm_(grad_CV.T, student_RD[rows].to(wide))
            if grad_V is not None:
                grad_V += grad_CV.sum(0)
        ctx.grads = grad_RD, grad_VD.to(weight_VD.dtype), grad_V
        ctx.mark_non_differentiable(loss_R, entropy_R)
        return (loss_R * weight_R).sum(), loss_R, entropy_R

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_loss = grads[0]
        grad_RD, grad_VD, grad_V = ctx.grads
        scaled_V = None if grad_V is None else grad_loss * grad_V
        return grad_loss * grad_RD, grad_loss * grad_VD, scaled_V, None, None, None, None
