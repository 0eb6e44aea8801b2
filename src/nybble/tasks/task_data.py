"""TaskData: the rows of a task, encoded for one model and objective."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from nybble.data import sampling
from nybble.errors import OptionError
from nybble.tasks import encoding
from nybble.tasks.dataset import Question, TaskDataset
from nybble.tasks.encoding import EncodedAnswer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("nybble")

# choices: -log of the label's probability among the choices. answer: -log p of the right answer's tokens. all: of the
# prompt's tokens too.
Objective = Literal["choices", "answer", "all"]


@dataclass(frozen=True)
class TaskDataConfig:
    """How the rows of a task are used.

    Attributes:
        objective: what is trained; auto = choices where all training rows have alternatives, else answer.
        seq_len: maximum number of tokens of a prompt and its answer.
        batch_size: rows in an optimizer step.
        num_selection_samples: maximum number of held-out rows to select epochs and ranks on; 0 = all.
        seed: of their order.
    """

    objective: Objective | Literal["auto"]
    seq_len: int
    batch_size: int
    num_selection_samples: int
    seed: int


@dataclass(frozen=True)
class TaskData:
    """The rows of a task, encoded.

    Attributes:
        dataset: the questions as text.
        objective: what is trained.
        texts: training texts: each prompt with its right answer.
        choices: every choice of each training row, with the objective "choices"; else empty.
        held_out: rows to select epochs and ranks on.
        fresh: the other held-out rows, on which nothing is selected.
    """

    dataset: TaskDataset
    objective: Objective
    texts: Sequence[EncodedAnswer]
    choices: Sequence[Sequence[EncodedAnswer]]
    held_out: Sequence[Question]
    fresh: Sequence[Question]

    @property
    def score_name(self) -> Literal["share", "log-likelihood"]:
        """Name of the score of held-out rows.

        It is the label's share of the probability among the choices, or the log-likelihood per token of the completion.
        """
        return "share" if self.held_out[0].has_alternatives else "log-likelihood"

    @property
    def max_text_length(self) -> int:
        """Tokens of the longest training text."""
        return max(len(text.ids) for row in (self.choices or [self.texts]) for text in row)

    def forward_tokens(self) -> list[int]:
        """Number of tokens that go through the model for each training row, padding between its choices included."""
        if self.choices:
            return [encoding.num_forward_tokens(choices) for choices in self.choices]
        return [len(text.ids) for text in self.texts]

    def fingerprint(self) -> str:
        """Short hash of all rows, to notice on resume that the task has changed."""
        rows = repr((self.texts, self.dataset.train, self.held_out, self.fresh, self.dataset.scored))
        return hashlib.sha256(rows.encode()).hexdigest()[:16]


def encode_task(dataset: TaskDataset, config: TaskDataConfig, tokenizer: PreTrainedTokenizerBase) -> TaskData:
    """Encode the rows of a task.

    Args:
        dataset: the rows as text.
        config: how its rows are used.
        tokenizer: of the model.

    Raises:
        OptionError: the task has no choices for the objective "choices", or fewer rows than batch_size.
        DataError: an answer has no tokens within seq_len.
    """
    objective = resolve_objective(config.objective, dataset)
    choices: list[list[EncodedAnswer]] = []
    if objective == "choices":
        choices = encoding.encode_choices(tokenizer, dataset.train, config.seq_len, "training")
        texts = right_answers(dataset.train, choices)
    else:
        texts = encoding.encode_right_answers(tokenizer, dataset.train, config.seq_len)
    if len(texts) < config.batch_size:
        raise OptionError(
            f"--batch_size must be at most the number of training rows; got {config.batch_size} and {len(texts)} rows; "
            "use a smaller --batch_size"
        )
    # Raises now what would otherwise be raised after training.
    encoding.encode_choices(tokenizer, dataset.scored, config.seq_len, "scored")
    order = sampling.draw_order(len(dataset.held_out), len(dataset.held_out), config.seed)
    held_out = [dataset.held_out[i] for i in order.tolist()]
    count = config.num_selection_samples or len(held_out)
    held_out, fresh = held_out[:count], held_out[count:]
    log.info(
        "%s: %d rows to train on (objective %s), %d held-out rows to select on, measured by %s",
        dataset.name,
        len(texts),
        objective,
        len(held_out),
        dataset.metric,
    )
    return TaskData(dataset, objective, texts, choices, held_out, fresh)


def right_answers(questions: Sequence[Question], encoded: Sequence[Sequence[EncodedAnswer]]) -> list[EncodedAnswer]:
    """The encoded right answer of each question, out of its encoded choices."""
    return [texts[question.label] for question, texts in zip(questions, encoded, strict=True)]


def resolve_objective(objective: Objective | Literal["auto"], dataset: TaskDataset) -> Objective:
    """The objective for a task, where "auto" is choices if all training rows have alternatives, else answer.

    Raises:
        OptionError: the objective is "choices", and the task has rows without alternatives.
    """
    has_alternatives = all(question.has_alternatives for question in dataset.train)
    if objective == "choices" and not has_alternatives:
        raise OptionError(
            f"--objective choices needs a task whose rows all have choices; {dataset.name} has rows without; "
            "use --objective answer"
        )
    if objective != "auto":
        return objective
    return "choices" if has_alternatives else "answer"
