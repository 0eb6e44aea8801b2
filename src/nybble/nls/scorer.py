"""Score rank configurations of a model with adapters on questions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from nybble import processes
from nybble.models.loading import LoadedModel
from nybble.nls import ranks
from nybble.nls.ranks import RankConfiguration
from nybble.qat.base import CachedWeightLinear, cached_weights
from nybble.tasks import scoring
from nybble.tasks.attention import plain_attention
from nybble.tasks.dataset import Question
from nybble.tasks.scoring import QuestionScores
from nybble.tasks.task_data import TaskData


class ConfigurationScorer(Protocol):
    """Something that scores a rank configuration."""

    def score(self, configuration: RankConfiguration, questions: Sequence[Question]) -> QuestionScores:
        """Score a configuration on questions."""
        ...


@dataclass(frozen=True)
class AdapterScorer:
    """Scores configurations of a model whose layers have elastic adapters.

    Attributes:
        loaded: the model with these layers in place, and its tokenizer.
        layers: the layers, by module name.
        data: rows of the task.
        seq_len: maximum number of tokens of a prompt and its answer.
        cache_weights: compute each weight once per call instead of in every forward pass; see `evaluation_weights`.
    """

    loaded: LoadedModel
    layers: Mapping[str, CachedWeightLinear]
    data: TaskData
    seq_len: int
    cache_weights: bool

    @contextmanager
    def activate(self, configuration: RankConfiguration) -> Iterator[None]:
        """While the context is open, the model computes with a configuration, by plain attention where that is faster.

        The ranks stay active afterwards.
        """
        ranks.activate_ranks(self.layers, configuration)  # before weights are cached, which depend on the ranks
        with (
            plain_attention(self.loaded.model, self.data.max_text_length),
            evaluation_weights(self.layers, self.cache_weights),
        ):
            yield

    def score(self, configuration: RankConfiguration, questions: Sequence[Question]) -> QuestionScores:
        """Score a configuration on questions. Its ranks stay active."""
        with self.activate(configuration):
            return scoring.score_questions(
                self.loaded.model,
                self.loaded.tokenizer,
                questions,
                self.data.dataset.length_normalized,
                self.seq_len,
            )


class LeadingScorer:
    """In the first process, a scorer that has all processes score what this one asks for; see `follow`.

    Args:
        scorer: divides the questions among the processes; in one process it scores them all.
    """

    def __init__(self, scorer: ConfigurationScorer) -> None:
        self.scorer = scorer

    def score(self, configuration: RankConfiguration, questions: Sequence[Question]) -> QuestionScores:
        """Score a configuration on questions, in all processes together."""
        return self.scorer.score(*processes.on_first(lambda: (configuration, questions)))

    def end(self) -> None:
        """Let the other processes return from `follow`."""
        processes.on_first(lambda: None)

    def follow(self) -> None:
        """In a process other than the first: score what that one asks for, until it ends."""
        asked: tuple[RankConfiguration, Sequence[Question]] | None
        while (asked := processes.on_first(lambda: None)) is not None:
            self.scorer.score(*asked)


def evaluation_weights(layers: Mapping[str, CachedWeightLinear], cache: bool) -> AbstractContextManager[None]:
    """A context for evaluation, in which each layer's weight is computed once or in every forward pass.

    The numbers are the same. Caching is faster and needs the memory of one weight for each layer.

    Args:
        layers: layers with adapters, by module name.
        cache: whether to compute each weight once.
    """
    return cached_weights(layers.values(), flush=False) if cache else nullcontext()
