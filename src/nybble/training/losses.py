"""Training losses: KL divergence to the teacher and cross-entropy, from last hidden states in chunks of tokens.

    z  = cap * tanh(head(hidden) * multiplier / cap)          logits; without a soft cap: z = head(hidden) * multiplier
    KL(teacher || student) = sum_v p_v (log p_v - log q_v)    p = softmax(z_teacher), q = softmax(z_student)
    at a temperature T: T^2 KL with the logits z / T          https://arxiv.org/abs/1503.02531
    CE = -log q_target

Logits [N, V] of a whole microbatch would need more memory than the rest of the training step. Each chunk of tokens
therefore gets its logits, its loss and its gradient before the next chunk starts. The head is frozen, so only the
gradient of the hidden states is needed. It is known in closed form: dKL/dz_student = T (q - p), dCE/dz = q - onehot.
The forward computes it and the backward multiplies it with the incoming gradient.
Liger-Kernel fuses its losses in the same way: https://arxiv.org/abs/2410.10989
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nybble.models.head import LMHead

# Tokens per chunk of logits, by device type, at most. On a CPU with a vocabulary of 49,000, chunks of 256 tokens make a
# training step 1 % faster than 128 but need 0.1 GB more, and chunks of 64 make it 3 % slower. On a GPU, 2048 is 15 %
# faster than 128 with that vocabulary; with a larger one, as many logits are as fast and keep the memory at 2 GB.
CHUNK_TOKENS = {"cpu": 128, "cuda": 2048}
_CHUNK_LOGITS = 2048 * 49152

# Called as f(logits_CV, token_slice, needs_grad) for the tokens of one chunk, C of them.
# Returns the losses [C] and, where needs_grad, dloss / dhead(hidden) [C, V].
_ChunkLoss = Callable[[Tensor, slice, bool], tuple[Tensor, Tensor | None]]


def chunk_tokens(device: torch.device, vocab_size: int) -> int:
    """Return the number of tokens whose logits exist at the same time on a device; a power of two."""
    tokens = CHUNK_TOKENS.get(device.type, CHUNK_TOKENS["cpu"])
    while tokens > CHUNK_TOKENS["cpu"] and tokens * vocab_size > _CHUNK_LOGITS:
        tokens //= 2
    return tokens


def kl_to_teacher(
    student_ND: Tensor, teacher_ND: Tensor, student_head: LMHead, teacher_head: LMHead, temperature: float = 1.0
) -> Tensor:
    """Return the mean over tokens of KL(teacher || student), differentiable in the student's hidden states.

    The logits of a chunk take about 4 * chunk_tokens * V * 4 bytes.

    Args:
        student_ND: last hidden states of the student, [tokens, D], in the dtype of the model.
        teacher_ND: last hidden states of the teacher for the same tokens, [tokens, D_teacher].
        student_head: frozen head of the student.
        teacher_head: frozen head of the teacher, with the same vocabulary.
        temperature: T, above 0. Above 1, tokens of low probability count more.

    Returns:
        Scalar, float32, in nats.
    """

    def chunk_loss(z_student_CV: Tensor, tokens: slice, needs_grad: bool) -> tuple[Tensor, Tensor | None]:
        z_teacher_CV = teacher_head.logits(teacher_ND[tokens])
        return _kl_of_chunk(z_student_CV, z_teacher_CV, student_head, temperature, needs_grad)

    return _TokenLosses.apply(student_ND, student_head, chunk_loss).mean()  # type: ignore[no-any-return]


def cross_entropy(hidden_ND: Tensor, targets_N: Tensor, head: LMHead) -> Tensor:
    """Return the cross-entropy -log q(target) of each token, differentiable in the hidden states.

    Args:
        hidden_ND: last hidden states at the predicting positions, [tokens, D].
        targets_N: token that each position has to predict, int64.
        head: frozen head of the model.

    Returns:
        [tokens], float32, in nats.
    """

    def chunk_loss(z_CV: Tensor, tokens: slice, needs_grad: bool) -> tuple[Tensor, Tensor | None]:
        return _cross_entropy_of_chunk(z_CV, targets_N[tokens], head, needs_grad)

    return _TokenLosses.apply(hidden_ND, head, chunk_loss)  # type: ignore[no-any-return]


def next_token_cross_entropy(hidden_BTD: Tensor, ids_BT: Tensor, loss_mask_BT: Tensor, head: LMHead) -> Tensor:
    """Return the mean cross-entropy of the tokens after each position, differentiable in the hidden states.

    Args:
        hidden_BTD: last hidden states.
        ids_BT: the tokens, int64.
        loss_mask_BT: positions that count, bool; the last of a sequence has no token after it and never counts.
        head: frozen head of the model.

    Returns:
        Scalar, float32, in nats; 0 where no position counts.
    """
    counted = loss_mask_BT[:, :-1]
    losses_N = cross_entropy(hidden_BTD[:, :-1][counted], ids_BT[:, 1:][counted], head)
    return losses_N.sum() / max(1, len(losses_N))


class _TokenLosses(torch.autograd.Function):
    """Losses [N] of hidden states [N, D], chunk by chunk; saves only the gradient [N, D] for the backward."""

    @staticmethod
    def forward(ctx, hidden_ND: Tensor, head: LMHead, chunk_loss: _ChunkLoss) -> Tensor:  # type: ignore[no-untyped-def,override]
        chunk = chunk_tokens(hidden_ND.device, len(head.weight_VD))
        losses_N = torch.empty(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device)
        grad_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        for i in range(0, len(hidden_ND), chunk):
            tokens = slice(i, i + chunk)
            losses_N[tokens], grad_CV = chunk_loss(head.logits(hidden_ND[tokens]), tokens, grad_ND is not None)
            if grad_ND is not None and grad_CV is not None:
                grad_ND[tokens] = grad_CV.to(hidden_ND.dtype) @ head.weight_VD
        ctx.save_for_backward(grad_ND)
        return losses_N

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_N: Tensor):  # type: ignore[no-untyped-def,override]
        (grad_ND,) = ctx.saved_tensors
        return (grad_ND * grad_N[:, None]).to(grad_ND.dtype), None, None


def _kl_of_chunk(
    z_student_CV: Tensor, z_teacher_CV: Tensor, student_head: LMHead, temperature: float, needs_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """KL per token [C] and dKL / dhead(hidden) of the student [C, V]. Overwrites the teacher's logits.

    KL = sum_v p_v (z_teacher - z_student)_v - (log Z_teacher - log Z_student), with log Z = max z - log max p.
    This form needs one exponential per logit and model.
    """
    capped_CV = z_student_CV
    if temperature != 1:
        z_student_CV, z_teacher_CV = z_student_CV / temperature, z_teacher_CV.div_(temperature)
    p_CV = z_teacher_CV.softmax(-1)
    log_z_teacher_C = z_teacher_CV.amax(-1) - p_CV.amax(-1).log()
    difference_CV = z_teacher_CV.sub_(z_student_CV)
    kl_C = torch.bmm(p_CV[:, None], difference_CV[..., None])[:, 0, 0]
    q_CV = torch.softmax(z_student_CV, -1, out=difference_CV)
    kl_C += z_student_CV.amax(-1) - q_CV.amax(-1).log() - log_z_teacher_C
    grad_CV = q_CV.sub_(p_CV)
    if temperature != 1:
        kl_C, grad_CV = kl_C.mul_(temperature**2), grad_CV.mul_(temperature)
    return kl_C, _grad_before_cap(grad_CV, capped_CV, student_head) if needs_grad else None


def _cross_entropy_of_chunk(
    z_CV: Tensor, targets_C: Tensor, head: LMHead, needs_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """-log q(target) per token [C] and its gradient with respect to head(hidden) [C, V]."""
    log_q_CV = z_CV.log_softmax(-1)
    loss_C = -log_q_CV.gather(1, targets_C[:, None])[:, 0]
    if not needs_grad:
        return loss_C, None
    ones_C1 = torch.ones_like(targets_C[:, None], dtype=z_CV.dtype)
    grad_CV = log_q_CV.exp_().scatter_add_(1, targets_C[:, None], -ones_C1)
    return loss_C, _grad_before_cap(grad_CV, z_CV, head)


def _grad_before_cap(grad_CV: Tensor, z_CV: Tensor, head: LMHead) -> Tensor:
    """Turn the gradient of the logits z into that of head(hidden), in place, through soft cap and multiplier."""
    if head.cap is not None:
        grad_CV.mul_(1 - (z_CV / head.cap) ** 2)  # derivative of cap * tanh(x / cap), written in z
    return grad_CV if head.multiplier == 1.0 else grad_CV.mul_(head.multiplier)
