"""Token perplexity and KL divergence to a teacher, for torch models and for exported models alike.

Several processes divide the sequences.

    token perplexity = exp(mean over tokens of -log q(token | preceding tokens of its sequence))
    KL to teacher    = mean over the same positions of sum_v p_v (log p_v - log q_v)      p: teacher, q: model; in nats

Word perplexity is a task of lm-eval, see `lm_eval`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble import processes
from nybble.models.head import LMHead
from nybble.models.streamed import forwards
from nybble.training.teacher import HiddenStates

# Positions whose float32 logits exist at the same time. With whole sequences of 1024 tokens and a vocabulary of
# 131,000, measuring needs 3 GB more.
_CHUNK_POSITIONS = 128
# Largest mean loss whose exponential is a finite float64.
_MAX_LOSS = 700.0

# Index of a sequence -> function from positions [P] in that sequence to their logits [P, V], float32.
Logits = Callable[[int], Callable[[Tensor], Tensor]]


def model_logits(model: Any, input_ids: Tensor) -> Logits:
    """Return the logits of a model on sequences, computed when they are asked for.

    Args:
        model: a transformers model, or an exported model with the same call.
        input_ids: token ids [S, T], int64.
    """
    device = getattr(model, "device", torch.device("cpu"))
    at = forwards(model, input_ids, 1)

    def logits_of_sequence(i: int) -> Callable[[Tensor], Tensor]:
        with at(i):
            z_TV = model(input_ids=input_ids[i : i + 1].to(device), use_cache=False).logits[0]
        return lambda positions: z_TV[positions].float()

    return logits_of_sequence


def logits_from_states(head: LMHead, states: HiddenStates | Tensor) -> Logits:
    """Return the logits that a head makes of last hidden states [S, T, D]."""

    def logits_of_sequence(i: int) -> Callable[[Tensor], Tensor]:
        hidden_TD = states[i].to(head.weight_VD.device)
        return lambda positions: head.logits(hidden_TD[positions])

    return logits_of_sequence


@torch.no_grad()
def measure_sequences(
    logits: Logits,
    input_ids: Tensor,
    teacher: Logits | None = None,
    advance: Callable[[int], None] = lambda sequences: None,
    loss_mask: Tensor | None = None,
) -> dict[str, float]:
    """Measure token perplexity and, with a teacher, KL divergence.

    Args:
        logits: logits of the model.
        input_ids: token ids [S, T], int64.
        teacher: logits of the teacher on the same sequences.
        advance: called with the number of sequences that were just measured.
        loss_mask: [S, T], bool; whether the prediction made at a position is measured. Default: all are.

    Returns:
        "token_perplexity", "tokens" (predictions that were measured) and, with a teacher, "kl_to_teacher".
    """
    loss, divergence, tokens = 0.0, 0.0, 0
    for i in processes.share(len(input_ids)):
        ids_T = input_ids[i]
        mask_T = torch.ones_like(ids_T, dtype=torch.bool) if loss_mask is None else loss_mask[i]
        predicting = mask_T[:-1].nonzero()[:, 0]  # the last position has no next token
        model_at, teacher_at = logits(i), teacher(i) if teacher is not None else None
        for positions in predicting.split(_CHUNK_POSITIONS):
            log_q = F.log_softmax(model_at(positions), dim=-1)
            loss -= log_q.gather(1, ids_T[positions + 1, None].to(log_q.device)).sum().item()
            if teacher_at is not None:
                log_p = F.log_softmax(teacher_at(positions), dim=-1).to(log_q.device)
                divergence += torch.linalg.vecdot(log_p.exp(), log_p.sub_(log_q)).sum().item()
        tokens += len(predicting)
        advance(min(processes.count(), len(input_ids) - i))
    if processes.share(1).start >= len(input_ids) % processes.count() > 0:
        logits(0)  # where layers gather their rows from all processes, each of them must compute as often
    loss, divergence, tokens = map(sum, zip(*processes.gather((loss, divergence, tokens)), strict=True))
    measured = {"token_perplexity": math.exp(min(loss / max(tokens, 1), _MAX_LOSS)), "tokens": tokens}
    return measured if teacher is None else measured | {"kl_to_teacher": divergence / max(tokens, 1)}
