"""Candidate rank configurations after training, and the selection of the best one.

Candidates are the median of the space (the configuration at which epochs are validated), the largest ranks (absorbed
adapters cost nothing at inference), the ranks that were trained most often, and the configurations with the smallest
training losses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nybble.console import bar
from nybble.nls import ranks
from nybble.nls.ranks import RankConfiguration
from nybble.nls.sampler import RankSampler
from nybble.nls.scorer import ConfigurationScorer
from nybble.tasks.dataset import Question
from nybble.tasks.scoring import QuestionScores


def propose_candidates(
    sampler: RankSampler, steps: Sequence[Mapping[str, float]], best_step: int, num_min_loss_configs: int
) -> dict[RankConfiguration, str]:
    """Candidate configurations of a trained model.

    Args:
        sampler: sampled the ranks of the training.
        steps: record of each training step: "step" (from 1), "loss", and "last_pass", the loss of its last pass.
        best_step: the step whose parameters were kept; 0 = those before training, whose adapters add nothing at any
            rank.
        num_min_loss_configs: number of candidates with the smallest training losses.

    Returns: configuration -> why it is a candidate.
    """
    if len(sampler.space) == 1:
        return {ranks.uniform_configuration(sampler.space[0], sampler.num_layers): "the only one"}
    if best_step == 0:
        return {sampler.median_configuration(): "median"}
    sandwich = sampler.sampling == "sandwich"
    # The last pass of a step trained these configurations; in a sandwich the extremes were trained in every step too.
    last_trained = [sampler.configuration_at_step(int(row["step"]) - 1, 2) for row in steps]
    trained = [*last_trained, *(sampler.extreme_configurations() * len(steps) if sandwich else ())]
    losses = [row["last_pass" if sandwich else "loss"] for row in steps]
    proposed = [
        (sampler.median_configuration(), "median"),
        (sampler.extreme_configurations()[0], "largest"),
        (ranks.most_frequent_configuration(trained), "most frequent"),
    ]
    least = ranks.least_loss_configurations(last_trained, losses, num_min_loss_configs)
    proposed += [(configuration, f"least loss {i}") for i, configuration in enumerate(least, 1)]
    reasons: dict[RankConfiguration, str] = {}
    for configuration, reason in proposed:
        reasons[configuration] = f"{reasons[configuration]}, {reason}" if configuration in reasons else reason
    return reasons


@dataclass(frozen=True)
class ScoredCandidate:
    """A candidate with its scores.

    Attributes:
        configuration: its ranks.
        reason: why it is a candidate.
        scores: on the held-out rows.
        test_score: the task's metric on its test rows; None unless the selection is on test rows.
        behind, error: mean difference of the selected candidate's held-out scores to these, and its standard error.
    """

    configuration: RankConfiguration
    reason: str
    scores: QuestionScores
    test_score: float | None
    behind: float = 0.0
    error: float = 0.0

    @property
    def selection_score(self) -> float:
        """The score by which candidates are selected."""
        return self.scores.score if self.test_score is None else self.test_score

    def as_row(self) -> dict[str, Any]:
        """The candidate as a row of results.json."""
        row: dict[str, Any] = {
            "why": self.reason,
            "configuration": list(self.configuration),
            "score": self.scores.score,
            "accuracy": self.scores.accuracy,
        }
        if self.test_score is not None:
            row["test"] = self.test_score
        return row | {"behind": self.behind, "error": self.error}


def score_candidates(
    candidates: Mapping[RankConfiguration, str],
    scorer: ConfigurationScorer,
    held_out: Sequence[Question],
    test_score: Callable[[RankConfiguration], float] | None,
) -> tuple[list[ScoredCandidate], ScoredCandidate]:
    """Score all candidates, and select the one with the best score; of equal ones the first.

    Args:
        candidates: configuration -> why it is a candidate; at least one.
        scorer: scores a configuration.
        held_out: rows to score them on.
        test_score: configuration -> the task's metric on its test rows, to select by; None = select by held-out rows.

    Returns: all candidates in their order, and the selected one.
    """
    scored: list[ScoredCandidate] = []
    with bar("choose", len(candidates), "best") as advance:
        for configuration, reason in candidates.items():
            scores = scorer.score(configuration, held_out)
            test = None if test_score is None else test_score(configuration)
            scored.append(ScoredCandidate(configuration, reason, scores, test))
            advance(1, best=f"{max(candidate.selection_score for candidate in scored):.4f}")
    best = max(range(len(scored)), key=lambda i: scored[i].selection_score)
    compared = []
    for candidate in scored:
        behind, error = scored[best].scores.better_by(candidate.scores)
        compared.append(replace(candidate, behind=behind, error=error))
    return compared, compared[best]
