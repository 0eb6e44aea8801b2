"""Losses of training on a task, and the order of its rows.

    objective choices       -log q(label),  q(c) = softmax_c (factor_c * log p(choice_c | prompt_c));  mean over rows
    objective answer        -log p(token);  mean over the tokens of right answers
    objective all           -log p(token);  mean over the tokens of prompts and right answers
    with a teacher          KL(teacher || model) of q or of p, in place of the negative logarithm

The factors are those of the score of held-out rows (Question.score_factors).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.data import sampling
from nybble.models.head import LMHead
from nybble.tasks import encoding, likelihood
from nybble.tasks.task_data import TaskData

# Maximum number of rows in an automatic microbatch, by device type, where rows are padded to a common length. On a
# CPU small microbatches cost little, and 4 rows of similar length have a fifth of their tokens in padding, where 16
# rows have half.
MAX_MICROBATCH_ROWS = {"cpu": 4}


@dataclass(frozen=True)
class RowLoss:
    """Loss of training rows.

    Attributes:
        loss: indices of rows [M] -> their mean loss, scalar float32, differentiable.
        weight: indices of rows [M] -> number of terms in that mean, by which a microbatch is weighted in its batch.
    """

    loss: Callable[[Tensor], Tensor]
    weight: Callable[[Tensor], int]


def task_loss(model: Any, data: TaskData, teacher: Any | None) -> RowLoss:
    """The loss of a task's objective.

    Args:
        model: transformers model that is trained.
        data: encoded rows.
        teacher: transformers model with the same vocabulary, whose predictions are trained; None = train the labels.
    """
    loss = choice_loss if data.objective == "choices" else answer_loss
    return loss(model, data, teacher)


def answer_loss(model: Any, data: TaskData, teacher: Any | None) -> RowLoss:
    """Loss of the tokens of right answers, with the objective "all" of their prompts too. Its weight is their number.

    Args: see `task_loss`.
    """
    head, include_prompt = LMHead.of(model), data.objective == "all"
    teacher_head = LMHead.of(teacher) if teacher is not None else None
    num_targets = torch.tensor([len(text.ids) - 1 if include_prompt else text.num_targets for text in data.texts])

    def loss(indices_M: Tensor) -> Tensor:
        batch = encoding.pad_batch([data.texts[i] for i in indices_M.tolist()], include_prompt)
        if teacher_head is None:
            return batch.token_losses(model, head).mean()
        return batch.kl_to_teacher(model, head, teacher, teacher_head)

    return RowLoss(loss, lambda indices_M: int(num_targets[indices_M].sum()))


def choice_loss(model: Any, data: TaskData, teacher: Any | None) -> RowLoss:
    """Loss of the distribution over the choices of a row. Its weight is the number of rows.

    Args: see `task_loss`.
    """
    questions = data.dataset.train
    label_N = torch.tensor([question.label for question in questions])
    factor_NC = torch.ones(len(questions), max(map(len, data.choices)))
    for row, question in zip(factor_NC, questions, strict=True):
        row[: len(question.choices)] = torch.tensor(question.score_factors(data.dataset.length_normalized))

    def scores(scored: Any, indices_M: Tensor) -> Tensor:
        """factor * log p of each choice: float32 [M, C], -inf where a question has fewer choices."""
        rows = [data.choices[i] for i in indices_M.tolist()]
        log_p_MC = likelihood.choice_log_probs(scored, LMHead.of(scored), rows)
        return log_p_MC * factor_NC[indices_M, : log_p_MC.shape[1]].to(log_p_MC.device)

    def loss(indices_M: Tensor) -> Tensor:
        score_MC = scores(model, indices_M)
        if teacher is None:
            return F.cross_entropy(score_MC, label_N[indices_M].to(score_MC.device))
        with torch.no_grad():
            teacher_score_MC = scores(teacher, indices_M)
        # Missing choices have log q = -inf and p = 0; as log q = 0 they add nothing.
        log_q_MC = score_MC.log_softmax(-1).masked_fill(score_MC.isinf(), 0)
        return F.kl_div(log_q_MC, teacher_score_MC.softmax(-1), reduction="batchmean")

    return RowLoss(loss, len)


def max_microbatch_rows(data: TaskData, device_type: str) -> int | None:
    """Maximum number of rows in an automatic microbatch; None = as many as fit into memory.

    Rows of the objective "choices" share the tokens of their prompts, so they lose less to padding than answers do.

    Args:
        device_type: type of the torch device that trains ("cpu", "cuda").
    """
    return None if data.choices else MAX_MICROBATCH_ROWS.get(device_type)


@dataclass(frozen=True)
class TaskBatches:
    """Which training rows each optimizer step uses: a new random permutation of all rows in each pass over them.

    Attributes:
        forward_tokens: tokens of each training row (TaskData.forward_tokens).
        batch_size: rows in an optimizer step.
        epochs: number of epochs.
        seed: of the permutations.
    """

    forward_tokens: list[int]
    batch_size: int
    epochs: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return len(self.forward_tokens) // self.batch_size

    @cached_property
    def _order(self) -> Tensor:
        wanted = self.steps_per_epoch * self.epochs * self.batch_size
        return sampling.draw_order(len(self.forward_tokens), wanted, self.seed)

    @cached_property
    def _length_N(self) -> Tensor:
        return torch.tensor(self.forward_tokens)

    def draw(self, step: int) -> Tensor:
        """Indices of the rows of an optimizer step: int64 [batch_size].

        They are ordered by length, so that a microbatch has little padding.
        """
        row_B = self._order[step * self.batch_size : (step + 1) * self.batch_size]
        return row_B[self._length_N[row_B].argsort(stable=True)]
