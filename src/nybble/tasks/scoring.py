"""Scores of a model on questions; see nybble.tasks.dataset for the formula. Several processes divide the questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from nybble import processes
from nybble.models.head import LMHead
from nybble.tasks import likelihood
from nybble.tasks.dataset import Question, TaskDataset
from nybble.tasks.encoding import EncodedAnswer, encode_choices

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Maximum number of tokens in one forward pass, padding included. Bounds the memory of activations and key-value cache.
MAX_TOKENS = 2048


@dataclass(frozen=True)
class QuestionScores:
    """Scores of one model on a list of questions.

    Attributes:
        log_likelihoods: of each question, in nats: the logarithm of the label's probability among the choices; log p
            per token of the completion for questions without alternatives.
        correct: of each question with alternatives, whether the most likely choice is the label; empty for questions
            without.
    """

    log_likelihoods: tuple[float, ...]
    correct: tuple[bool, ...]

    @property
    def log_likelihood(self) -> float:
        """Mean log-likelihood, in nats."""
        return sum(self.log_likelihoods) / len(self.log_likelihoods)

    @property
    def scores(self) -> tuple[float, ...]:
        """Score of each question, by which candidates are compared; higher is better.

        It is the label's probability, or the log-likelihood for questions without alternatives.
        """
        return tuple(map(math.exp, self.log_likelihoods)) if self.correct else self.log_likelihoods

    @property
    def score(self) -> float:
        """Mean score; higher is better."""
        return sum(self.scores) / len(self.scores)

    @property
    def accuracy(self) -> float | None:
        """Share of questions whose label is the most likely choice; None for questions without alternatives."""
        return sum(self.correct) / len(self.correct) if self.correct else None

    def better_by(self, other: QuestionScores) -> tuple[float, float]:
        """Mean difference to the scores of another model, paired by question, and the standard error of this mean.

        The standard error is 0 for a single question.
        """
        differences = torch.tensor([a - b for a, b in zip(self.scores, other.scores, strict=True)], dtype=torch.float64)
        count = len(differences)
        error = float(differences.std() / math.sqrt(count)) if count > 1 else 0.0
        return float(differences.mean()), error


@torch.no_grad()
def score_questions(
    model: Any, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], length_normalized: bool, seq_len: int
) -> QuestionScores:
    """Score a model on questions.

    Args:
        model: transformers model, or an exported model with the same call and without output embeddings.
        tokenizer: its tokenizer.
        questions: at least one; all with alternatives or all without.
        length_normalized: whether choices are compared by log p relative to their length.
        seq_len: maximum number of tokens of a prompt and its answer; longer prompts lose their beginning.

    Raises:
        DataError: an answer has no tokens.
    """
    head = LMHead.of(model) if model.get_output_embeddings() is not None else None
    texts = encode_choices(tokenizer, questions, seq_len)
    prefixes = likelihood.prefix_lengths(model, head, texts)
    groups = list(likelihood.group_questions(texts, prefixes, MAX_TOKENS))
    scored: dict[int, tuple[float, bool]] = {}
    for group in (groups[number] for number in processes.share(len(groups))):
        losses_A = likelihood.answer_losses(model, head, [texts[i] for i in group], [prefixes[i] for i in group])
        for i, losses in zip(group, losses_A.split([len(texts[i]) for i in group]), strict=True):
            log_probs = [-loss for loss in losses.tolist()]
            scored[i] = _score_question(questions[i], texts[i], log_probs, length_normalized)
    for part in processes.gather(scored):
        scored |= part
    correct = [scored[i][1] for i, question in enumerate(questions) if question.has_alternatives]
    return QuestionScores(tuple(scored[i][0] for i in range(len(questions))), tuple(correct))


def _score_question(
    question: Question, texts: Sequence[EncodedAnswer], log_probs: list[float], length_normalized: bool
) -> tuple[float, bool]:
    """Log-likelihood of a question, and whether its label is the most likely choice."""
    if not question.has_alternatives:
        return log_probs[0] / texts[0].num_targets, True
    values = [
        log_prob * factor for log_prob, factor in zip(log_probs, question.score_factors(length_normalized), strict=True)
    ]
    log_shares = F.log_softmax(torch.tensor(values, dtype=torch.float64), 0)
    return float(log_shares[question.label]), max(range(len(values)), key=values.__getitem__) == question.label


def measure_task(
    model: Any, tokenizer: PreTrainedTokenizerBase, dataset: TaskDataset, limit: int | None, seq_len: int
) -> dict[str, float]:
    """Measure a model on the scored questions of a task that nybble scores itself.

    Args:
        model: transformers model or exported model.
        limit: maximum number of questions; None = all.
        seq_len: see `score_questions`.

    Returns: columns of the result tables: "task:NAME METRIC" with acc or acc_norm (questions with alternatives),
        "task:NAME log_likelihood" and "documents:NAME"; empty for a task that lm-eval scores.
    """
    questions, name = dataset.scored[:limit], Path(dataset.name).stem
    if not questions:
        return {}
    scores = score_questions(model, tokenizer, questions, dataset.length_normalized, seq_len)
    columns = {f"task:{name} log_likelihood": scores.log_likelihood, f"documents:{name}": len(questions)}
    if scores.accuracy is None:
        return columns
    metric = "acc_norm" if dataset.length_normalized else "acc"
    return {f"task:{name} {metric}": scores.accuracy} | columns
