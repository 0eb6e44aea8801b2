"""Token perplexity and KL divergence to the teacher."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.models.head import LMHead
from nybble.training.teacher import HiddenStates

# Positions whose float32 logits exist at a time.
_CHUNK = 128
# Index of a sequence -> positions in it [P] -> their logits [P, V], float32.
Logits = Callable[[int], Callable[[Tensor], Tensor]]


def model_logits(model: Any, input_ids: Tensor) -> Logits:
    """Logits of a transformers-like model (torch or exported) on rows of input_ids [S, T]."""
    device = getattr(model, "device", torch.device("cpu"))

    def of(i: int) -> Callable[[Tensor], Tensor]:
        z_TV = model(input_ids=input_ids[i : i + 1].to(device), use_cache=False).logits[0]
        return lambda positions: z_TV[positions].float()

    return of


def logits_from_states(head: LMHead, states: HiddenStates | Tensor) -> Logits:
    """The teacher's logits from its hidden states [S, T, D]."""

    def of(i: int) -> Callable[[Tensor], Tensor]:
        hidden_TD = states[i].to(head.weight_VD.device)
        return lambda positions: head.logits(hidden_TD[positions])

    return of


@torch.no_grad()
def measure_sequences(
    logits: Logits,
    input_ids: Tensor,
    teacher: Logits | None = None,
    advance: Callable[[int], None] = lambda n: None,
    loss_mask: Tensor | None = None,
) -> dict[str, float]:
    """Token perplexity on sequences [S, T], and KL to the teacher where there is one; of the predictions that are counted [S, T] (default: all).

    Returns: token_perplexity, tokens, and kl_to_teacher.
    """
    loss, divergence, tokens = 0.0, 0.0, 0
    for i, ids in enumerate(input_ids):
        which = (torch.ones_like(ids, dtype=torch.bool) if loss_mask is None else loss_mask[i])[:-1].nonzero()[:, 0]
        model_at, teacher_at = logits(i), teacher(i) if teacher is not None else None
        for positions in which.split(_CHUNK):
            log_q = F.log_softmax(model_at(positions), dim=-1)
            loss -= log_q.gather(1, ids[positions + 1, None].to(log_q.device)).sum().item()
            if teacher_at is not None:
                log_p = F.log_softmax(teacher_at(positions), dim=-1).to(log_q.device)
                divergence += torch.linalg.vecdot(log_p.exp(), log_p.sub_(log_q)).sum().item()
        tokens += len(which)
        advance(1)
    measured = {"token_perplexity": math.exp(min(loss / max(tokens, 1), 700.0)), "tokens": tokens}
    return measured if teacher is None else measured | {"kl_to_teacher": divergence / max(tokens, 1)}
