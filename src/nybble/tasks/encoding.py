"""Questions to token ids and padded batches."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.data import packing
from nybble.errors import DataError
from nybble.models.head import LMHead, last_hidden_states
from nybble.tasks.dataset import Question
from nybble.training.losses import cross_entropy, kl_to_teacher

log = logging.getLogger("nybble")


class EncodedAnswer(NamedTuple):
    """A prompt and an answer in one. Attributes: ids: tokens; prompt: how many of them are the prompt's."""

    ids: list[int]
    prompt: int

    @property
    def first(self) -> int:
        """Place of the first token that is predicted: the answer's first, or where there is no prompt its second."""
        return max(self.prompt, 1)

    @property
    def answered(self) -> int:
        """How many tokens of the answer are predicted."""
        return max(0, len(self.ids) - self.first)


def encode_answer(tokenizer: Any, prompt: str, answer: str) -> EncodedAnswer:
    """Prompt and answer together; spaces at the prompt's end go to the answer, as in lm-eval."""
    spaces = len(prompt) - len(prompt.rstrip())
    if spaces:
        prompt, answer = prompt[:-spaces], prompt[-spaces:] + answer
    ids = tokenizer(prompt + answer).input_ids
    return EncodedAnswer(
        ids, len(tokenizer(prompt).input_ids) if prompt else min(1, len(packing.begin_tokens(tokenizer)))
    )


@dataclass(frozen=True)
class PaddedBatch:
    """Texts padded at their ends, which a causal model never sees.

    Attributes:
        ids: [B, T].
        counted: [B, T]: whether the prediction made at a position is one of a token that is to be learnt, or scored.
    """

    ids: Tensor
    loss_mask: Tensor

    def losses(self, model: Any, head: LMHead | None) -> Tensor:
        """-log q of every counted token, in order: float32 [N]. Without a head, from the model's own logits (exported models)."""
        if head is None:
            logits = model(input_ids=self.ids).logits.float()
            return F.cross_entropy(logits[self.loss_mask], self.ids.roll(-1, 1)[self.loss_mask], reduction="none")
        device = model.device
        loss_mask, targets = self.loss_mask.to(device), self.ids.roll(-1, 1).to(device)
        return cross_entropy(last_hidden_states(model, self.ids.to(device))[loss_mask], targets[loss_mask], head)

    def divergence(self, model: Any, head: LMHead, teacher: Any, teacher_head: LMHead) -> Tensor:
        """Mean over the counted tokens of KL(teacher || model)."""
        ids, loss_mask = self.ids.to(model.device), self.loss_mask.to(model.device)
        with torch.no_grad():
            taught = last_hidden_states(teacher, ids)[loss_mask]
        return kl_to_teacher(last_hidden_states(model, ids)[loss_mask], taught, head, teacher_head)

    def sums(self, losses: Tensor) -> Tensor:
        """Sums of `losses` by text: [B]."""
        rows = self.loss_mask.nonzero()[:, 0].to(losses.device)
        return torch.zeros(len(self.ids), device=losses.device).index_add_(0, rows, losses)


def pad_batch(texts: Sequence[EncodedAnswer], everything: bool = False) -> PaddedBatch:
    """What `encode` gave; the answer's tokens count, or with `everything` the prompt's too."""
    length = max(len(text.ids) for text in texts)
    batch = PaddedBatch(
        torch.zeros(len(texts), length, dtype=torch.int64), torch.zeros(len(texts), length, dtype=torch.bool)
    )
    for i, text in enumerate(texts):
        batch.ids[i, : len(text.ids)] = torch.tensor(text.ids)
        batch.loss_mask[i, (0 if everything else text.first - 1) : len(text.ids) - 1] = True
    return batch


def encode_right_answers(tokenizer: Any, questions: Sequence[Question], length: int) -> list[EncodedAnswer]:
    """The training texts: prompt and right answer, cut off at `length` tokens (and it is said); an answer in the model's own words ends
    with the end-of-text token. Those of whose answer nothing is left are left out, and counted.

    Raises:
        DataError: nothing is left of any.
    """
    end = packing.end_tokens(tokenizer)
    encoded = [encode_answer(tokenizer, *question.pairs[question.gold]) for question in questions]
    encoded = [
        EncodedAnswer(text.ids + end if len(q.pairs) == 1 else text.ids, text.prompt)
        for q, text in zip(questions, encoded, strict=True)
    ]
    cut = sum(text.first < length < len(text.ids) for text in encoded)
    encoded = [EncodedAnswer(text.ids[:length], text.prompt) for text in encoded]
    texts = [text for text in encoded if text.answered]
    if not texts:
        shortest = min((text.prompt for text in encoded), default=0)
        raise DataError(
            f"answers must have tokens within --seq_len {length}; none of {len(encoded)} has; the shortest prompt has {shortest}"
        )
    if len(texts) < len(encoded):
        log.warning(
            "%d of %d rows have no answer within %d tokens and were left out",
            len(encoded) - len(texts),
            len(encoded),
            length,
        )
    if cut:
        log.warning("%d of %d answers are learnt only up to token %d (--seq_len)", cut, len(encoded), length)
    return texts


def encode_choices(tokenizer: Any, questions: Sequence[Question], length: int) -> list[list[EncodedAnswer]]:
    """Prompt and answer of every choice; prompts are cut off at their beginnings to fit `length` tokens.

    Raises:
        DataError: an answer without tokens.
    """
    encoded = [[_fitted(encode_answer(tokenizer, *pair), length) for pair in question.pairs] for question in questions]
    for question, texts in zip(questions, encoded, strict=True):
        for (prompt, answer), text in zip(question.pairs, texts, strict=True):
            if not text.answered:
                raise DataError(f"every answer must have tokens of its own; {answer!r} after {prompt[-40:]!r} has none")
    return encoded


def _fitted(text: EncodedAnswer, length: int) -> EncodedAnswer:
    over = max(0, len(text.ids) - length)
    return EncodedAnswer(text.ids[over:], max(text.prompt - over, 0))


def shared_prefix(texts: Sequence[EncodedAnswer]) -> int:
    """How many tokens all texts of a question begin with, before the last one of the prompt: what is learnt of answers comes after them."""
    if len(texts) == 1:
        return 0
    columns = list(zip(*(text.ids for text in texts), strict=False))
    same = next((t for t, column in enumerate(columns) if len(set(column)) > 1), len(columns))
    return max(0, min(same, min(text.prompt for text in texts) - 1))


def tokens_of(texts: Sequence[EncodedAnswer]) -> int:
    """How many tokens go through the model for a question, padding of its choices included."""
    begin = shared_prefix(texts)
    return begin + len(texts) * (max(len(text.ids) for text in texts) - begin)
