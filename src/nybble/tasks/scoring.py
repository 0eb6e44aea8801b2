"""Log-likelihood of answers, and scores of held-out questions."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.models.head import LMHead
from nybble.tasks.dataset import Question
from nybble.tasks.encoding import EncodedAnswer, encode_choices, pad_batch, shared_prefix
from nybble.training.losses import cross_entropy

log = logging.getLogger("nybble")
# Tokens, padding included, in one forward of scoring.
_TOKENS = 2048


@dataclass(frozen=True)
class QuestionScores:
    """Of held-out questions.

    Attributes:
        log_likelihoods: of each question the logarithm of the right answer's share; without alternatives log p per token (see the head of this file).
        correct: whether the most likely choice is the right one; empty without alternatives.
    """

    log_likelihoods: tuple[float, ...]
    correct: tuple[bool, ...]

    @property
    def log_likelihood(self) -> float:
        return sum(self.log_likelihoods) / len(self.log_likelihoods)

    @property
    def scores(self) -> tuple[float, ...]:
        """What candidates are compared by, question by question."""
        return tuple(map(math.exp, self.log_likelihoods)) if self.correct else self.log_likelihoods

    @property
    def score(self) -> float:
        return sum(self.scores) / len(self.scores)

    @property
    def accuracy(self) -> float | None:
        return sum(self.correct) / len(self.correct) if self.correct else None

    def better_by(self, other: QuestionScores) -> tuple[float, float]:
        """Mean difference of the scores, question by question, and its standard error (0 for a single question)."""
        differences = torch.tensor([a - b for a, b in zip(self.scores, other.scores, strict=True)], dtype=torch.float64)
        return float(differences.mean()), float(differences.std() / math.sqrt(len(differences))) if len(
            differences
        ) > 1 else 0.0


@torch.no_grad()
def score_questions(
    model: Any,
    head: LMHead | None,
    tokenizer: Any,
    questions: Sequence[Question],
    by_length: bool,
    length: int,
) -> QuestionScores:
    """Score a model on questions; what the choices of one have in common goes through it once, and questions of like length together."""
    texts = encode_choices(tokenizer, questions, length)
    begins = _begins(model, head, texts)
    likely, correct = {}, {}
    for part in _parts(texts, begins):
        sums = iter(_sums(model, head, [texts[i] for i in part], [begins[i] for i in part]).tolist())
        for i in part:
            values = [-next(sums) for _ in texts[i]]
            if len(values) == 1:
                likely[i] = values[0] / texts[i][0].answered
            else:
                values = [value * factor for value, factor in zip(values, questions[i].factors(by_length), strict=True)]
                likely[i] = float(F.log_softmax(torch.tensor(values, dtype=torch.float64), 0)[questions[i].gold])
                correct[i] = max(range(len(values)), key=values.__getitem__) == questions[i].gold
    return QuestionScores(
        tuple(likely[i] for i in range(len(questions))),
        tuple(correct[i] for i in range(len(questions)) if i in correct),
    )


def choice_log_probs(model: Any, head: LMHead, texts: Sequence[Sequence[EncodedAnswer]]) -> Tensor:
    """log p(answer) of every choice, in nats: float32 [questions, most choices], -inf where a question has fewer; differentiable.

    Args:
        texts: of `encode_choices`.
    """
    sums, most = _sums(model, head, texts, _begins(model, head, texts)), max(map(len, texts))
    return torch.stack(
        [
            F.pad(-values, (0, most - len(values)), value=-math.inf)
            for values in sums.split([len(choices) for choices in texts])
        ]
    )


def _begins(model: Any, head: LMHead | None, texts: Sequence[Sequence[EncodedAnswer]]) -> list[int]:
    """How many tokens go through the model once for all choices of a question; 0 for exports, and where an attention window is shorter than a text."""
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    whole = head is None or (window and window < max(len(text.ids) for choices in texts for text in choices))
    return [0 if whole else shared_prefix(choices) for choices in texts]


def _parts(texts: Sequence[Sequence[EncodedAnswer]], begins: Sequence[int]) -> Iterator[list[int]]:
    """Numbers of questions, the longest first, as many at a time as fit into `_TOKENS`, padding included; at least one. `begins`: tokens that are shared."""
    part: list[int] = []
    first = rest = rows = 0
    for i in sorted(range(len(texts)), key=lambda i: (-begins[i], -max(len(text.ids) for text in texts[i]))):
        shared = begins[i]
        wide, tall = max(rest, max(len(text.ids) for text in texts[i]) - shared), rows + len(texts[i])
        if part and (len(part) + 1) * first + tall * wide > _TOKENS:
            yield part
            part, first, wide, tall = [], shared, max(len(text.ids) for text in texts[i]) - shared, len(texts[i])
        part, first, rest, rows = [*part, i], max(first, shared), wide, tall
    if part:
        yield part


def _sums(
    model: Any, head: LMHead | None, questions: Sequence[Sequence[EncodedAnswer]], begins: Sequence[int]
) -> Tensor:
    """-log p of the answer of every text, one after the other: float32 [texts]; of each question so many tokens are shared by all texts as `begins` says."""
    flat = [text for texts in questions for text in texts]
    if head is None or not max(begins):
        batch = pad_batch(flat)
        return batch.sums(batch.losses(model, head))
    most, begin_Q1 = max(begins), torch.tensor(begins)[:, None]
    known_QP = (
        torch.arange(most) >= most - begin_Q1
    )  # beginnings end together: what is in front of a shorter one is padding, and windows see no gap
    kept = model.base_model(
        input_ids=torch.tensor(
            [[0] * (most - begin) + texts[0].ids[:begin] for texts, begin in zip(questions, begins, strict=True)]
        ).to(model.device),
        attention_mask=known_QP.long().to(model.device),
        position_ids=(torch.arange(most) - most + begin_Q1).relu().to(model.device),
        use_cache=True,
    ).past_key_values
    owners = [i for i, texts in enumerate(questions) for _ in texts]
    ends = [EncodedAnswer(text.ids[begins[i] :], text.prompt - begins[i]) for text, i in zip(flat, owners, strict=True)]
    order, found = torch.tensor([len(text.ids) for text in ends]).argsort(stable=True), []
    for part in order.split(2 * len(questions)):  # of like length
        owner_N = torch.tensor([owners[i] for i in part.tolist()])
        batch = pad_batch([ends[i] for i in part.tolist()])
        hidden = model.base_model(
            input_ids=batch.ids.to(model.device),
            attention_mask=torch.cat([known_QP[owner_N], torch.ones_like(batch.loss_mask)], 1).long().to(model.device),
            position_ids=(begin_Q1[owner_N] + torch.arange(batch.ids.shape[1])).to(model.device),
            past_key_values=_rows(kept, owner_N.to(model.device)),
            use_cache=True,
        ).last_hidden_state
        loss_mask, targets = batch.loss_mask.to(model.device), batch.ids.roll(-1, 1).to(model.device)
        found.append(batch.sums(cross_entropy(hidden[loss_mask], targets[loss_mask], head)))
    return torch.cat(found)[order.argsort().to(model.device)]


def _rows(cache: Any, rows_N: Tensor) -> Any:
    """Rows of a cache of keys and values, as a new one; differentiable."""
    taken = copy.copy(cache)
    taken.layers = [copy.copy(layer) for layer in cache.layers]
    taken.batch_select_indices(rows_N)
    return taken
