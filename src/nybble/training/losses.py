"""Losses of training: KL divergence of the student's next-token distribution from the teacher's, and cross-entropy of given tokens. Pure functions.

    z = cap * tanh(head(hidden) * multiplier / cap)            (the cap of Gemma 2; without: z = head(hidden) * multiplier)
    KL(teacher || student) = sum_v p_v (log p_v - log q_v),    p = softmax(z_teacher), q = softmax(z_student)

Both models' logits are made from their last hidden states, a chunk of tokens at a time, and thrown away: at no moment does more
than one chunk of logits exist. The head is frozen, so all that training needs is the gradient of the hidden states, known in
closed form as soon as the chunk's logits are: d KL / d z_student = q - p. It is computed in the forward; the backward only scales.
(Liger-Kernel, arXiv 2410.10989, does the same for its fused losses.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nybble.models.head import LMHead

# Tokens whose logits exist at a time, by device (docs/log.md).
CHUNK_TOKENS = {"cpu": 128, "cuda": 2048}


def chunk_size_on(device: torch.device) -> int:
    """Tokens whose logits should exist at a time on a device."""
    return CHUNK_TOKENS.get(device.type, CHUNK_TOKENS["cpu"])


# (logits of a chunk of tokens [C, V], which tokens, whether gradients are needed) -> losses [C] and d loss / d head(hidden) [C, V].
_Chunk = Callable[[Tensor, slice, bool], tuple[Tensor, Any]]


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND: Tensor, head: LMHead, of: _Chunk, chunk: int | None) -> Tensor:  # type: ignore[no-untyped-def,override]
        chunk = chunk or chunk_size_on(hidden_ND.device)
        losses_N = torch.empty(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device)
        grad_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        for i in range(0, len(hidden_ND), chunk):
            part = slice(i, i + chunk)
            losses_N[part], grad = of(head.logits(hidden_ND[part]), part, grad_ND is not None)
            if grad_ND is not None:
                grad_ND[part] = grad.to(hidden_ND.dtype) @ head.weight_VD
        ctx.save_for_backward(grad_ND)
        return losses_N

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_N: Tensor):  # type: ignore[no-untyped-def,override]
        (grad_ND,) = ctx.saved_tensors
        return (grad_ND * grad_N[:, None]).to(grad_ND.dtype), None, None, None


def _kl_chunk(z_student: Tensor, z_teacher: Tensor, student: LMHead, need_grad: bool) -> tuple[Tensor, Any]:
    """KL per token [C], and d KL / d (head(hidden) of the student) [C, V]; overwrites the teacher's logits.

    sum_v p_v (z_teacher - z_student)_v - (log Z_teacher - log Z_student), where log Z = max z - log max p: one exponential per logit and model.
    """
    p = z_teacher.softmax(-1)
    log_z_teacher = z_teacher.amax(-1) - p.amax(-1).log()
    difference = z_teacher.sub_(z_student)
    kl = torch.bmm(p[:, None], difference[..., None])[:, 0, 0]
    q = torch.softmax(z_student, -1, out=difference)
    kl += z_student.amax(-1) - q.amax(-1).log() - log_z_teacher
    return kl, _through_head(q.sub_(p), z_student, student) if need_grad else None


def _cross_entropy_chunk(z: Tensor, targets_C: Tensor, head: LMHead, need_grad: bool) -> tuple[Tensor, Any]:
    """-log q(target) per token [C], and its gradient [C, V]."""
    log_q = z.log_softmax(-1)
    loss = -log_q.gather(1, targets_C[:, None])[:, 0]
    ones = torch.ones_like(targets_C[:, None], dtype=z.dtype)
    return loss, _through_head(log_q.exp_().scatter_add_(1, targets_C[:, None], -ones), z, head) if need_grad else None


def _through_head(grad: Tensor, z: Tensor, head: LMHead) -> Tensor:
    """The gradient of logits z, made that of head(hidden) in place: through the cap and the multiplier."""
    if head.cap is not None:
        grad.mul_(1 - (z / head.cap) ** 2)  # d tanh
    return grad if head.multiplier == 1.0 else grad.mul_(head.multiplier)


def kl_to_teacher(
    student_ND: Tensor, teacher_ND: Tensor, student: LMHead, teacher: LMHead, chunk: int | None = None
) -> Tensor:
    """Mean over tokens of KL(teacher || student), in nats; differentiable in the student's hidden states.

    Args:
        student_ND, teacher_ND: last hidden states, flattened to [tokens, D].
        student, teacher: their heads.
        chunk: tokens whose logits exist at a time, None = `chunk_on` their device; memory is about 4 * chunk * V * 4 bytes.
    """

    def of(z_student: Tensor, part: slice, need_grad: bool) -> tuple[Tensor, Any]:
        return _kl_chunk(z_student, teacher.logits(teacher_ND[part]), student, need_grad)

    return _TokenLosses.apply(student_ND, student, of, chunk).mean()  # type: ignore[no-any-return]


def cross_entropy(hidden_ND: Tensor, targets_N: Tensor, head: LMHead, chunk: int | None = None) -> Tensor:
    """-log q(target) of each token, in nats: float32 [N]; differentiable in the hidden states.

    Args:
        hidden_ND: last hidden states of the positions that predict.
        targets_N: the tokens to be predicted there, int64.
        head, chunk: as in `kl_to_teacher`.
    """

    def of(z: Tensor, part: slice, need_grad: bool) -> tuple[Tensor, Any]:
        return _cross_entropy_chunk(z, targets_N[part], head, need_grad)

    return _TokenLosses.apply(hidden_ND, head, of, chunk)  # type: ignore[no-any-return]
