"""Questions of a downstream task, and the dataset that they form.

These are plain values; nybble.tasks.sources loads them.

The score of a question with alternatives is the probability of its label when the choices are compared with each other:

    softmax_c (factor_c * log p(choice_c | prompt_c)) [label]

The factors are 1, or length-normalized (Question.score_factors) where the task is measured by acc_norm. The same
distribution is what training on choices optimizes, so the score tells two candidates apart long before their
accuracies differ. It is averaged as a probability, not as a logarithm: the mean logarithm is dominated by a few
questions that are confidently wrong. The score of a question without alternatives is log p per token of its completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Divides the length-normalized log probabilities before the softmax over choices. Chosen on OpenBookQA: at 1, the
# first steps follow the few questions that are most wrong; from 10 on, the model is pushed to margins that damage its
# language modeling.
LENGTH_TEMPERATURE = 4.0


@dataclass(frozen=True)
class Question:
    """One question of a task.

    Attributes:
        prompts: prompt of each choice. Usually all are equal; WinoGrande inserts the choice into the prompt.
        choices: text that follows each prompt, including the delimiter (usually a space). A question without
            alternatives has one choice: its completion.
        label: index of the right choice.
        choice_lengths: characters of each choice without the delimiter, at least 1. Unused where there is one choice.

    Raises:
        ValueError: the fields do not describe the same number of choices, or the label is not one of them.
    """

    prompts: tuple[str, ...]
    choices: tuple[str, ...]
    label: int
    choice_lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.prompts) == len(self.choices) == len(self.choice_lengths) > 0:
            raise ValueError("prompts, choices and choice_lengths must have one entry for each choice")
        if not 0 <= self.label < len(self.choices):
            raise ValueError(f"label must be the index of one of {len(self.choices)} choices; got {self.label}")

    @classmethod
    def with_completion(cls, prompt: str, completion: str) -> Question:
        """A question without alternatives: the prompt has a single right continuation."""
        return cls((prompt,), (completion,), 0, (max(1, len(completion)),))

    @property
    def has_alternatives(self) -> bool:
        """Whether there is more than one choice."""
        return len(self.choices) > 1

    def score_factors(self, length_normalized: bool) -> list[float]:
        """Multiplier of log p of each choice before the softmax over the choices.

            1                                                       without length normalization
            mean length of the choices / own length / 4             with it (4 = LENGTH_TEMPERATURE)

        lm-eval's acc_norm compares log p per character, which orders the choices alike. A softmax of log p per
        character would be nearly uniform, so the lengths are taken relative to their mean.

        Args:
            length_normalized: whether the task is measured by acc_norm.
        """
        if not length_normalized:
            return [1.0] * len(self.choices)
        mean = sum(self.choice_lengths) / len(self.choice_lengths)
        return [mean / length / LENGTH_TEMPERATURE for length in self.choice_lengths]


@dataclass(frozen=True)
class TaskRequest:
    """What a task source is asked to load.

    Attributes:
        task: value of --task: a name or a path.
        data_dir: folder with local copies of data sets; None = the Hugging Face hub or its cache.
        seed: of the choice of held-out rows and of training rows.
        num_train_samples: maximum number of training rows, chosen at random; 0 = all.
    """

    task: str
    data_dir: str | None
    seed: int
    num_train_samples: int


@dataclass(frozen=True)
class TaskDataset:
    """The questions of a task, by use.

    Attributes:
        name: name of the task, or path of its file.
        metric: metric that the task is reported by, in lm-eval's terms: acc_norm, acc, "exact_match,strict-match",
            log_likelihood, ...
        train: questions to train on, in the order in which they were drawn.
        held_out: questions that epochs and ranks are selected on. None of them is in `train` or `scored`.
        scored: questions of the final score, where nybble scores the task itself; empty where lm-eval does.
    """

    name: str
    metric: str
    train: Sequence[Question]
    held_out: Sequence[Question]
    scored: Sequence[Question] = ()

    @property
    def length_normalized(self) -> bool:
        """Whether choices are compared by log p relative to their length."""
        return self.metric == "acc_norm"
