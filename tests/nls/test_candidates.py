"""Candidates after training, and the selection of one."""

from typing import Any

import pytest

from nybble.nls.candidates import propose_candidates, score_candidates
from nybble.nls.sampler import RankSampler
from tests.helpers.elastic import FakeScorer
from tests.helpers.questions import MIXED_QUESTIONS

SPACE = (8, 4, 2)


def make_sampler(sampling: Any, space: tuple[int, ...] = SPACE) -> RankSampler:
    return RankSampler(space, 2, sampling, 0)


def make_steps(losses: list[float], last: list[float] | None = None) -> list[dict[str, float]]:
    return [
        {"step": i, "loss": loss, "last_pass": last_loss}
        for i, (loss, last_loss) in enumerate(zip(losses, last or losses, strict=True), 1)
    ]


def by_reason(candidates: dict[tuple[int, ...], str]) -> dict[str, tuple[int, ...]]:
    return {reason: ranks for ranks, reasons in candidates.items() for reason in reasons.split(", ")}


def test_candidates_are_those_of_the_trained_steps() -> None:
    sampler = make_sampler("random", (8, 7, 6, 5, 4, 3, 2, 1))
    losses = [0.5, 0.2, 0.9, 0.1, 0.7, 0.3]
    candidates = propose_candidates(sampler, make_steps(losses), 6, 4)
    reasons = by_reason(candidates)
    assert (reasons["median"], reasons["largest"]) == ((5, 5), (8, 8))
    for place, step in enumerate((3, 1, 5, 0), 1):
        assert reasons[f"least loss {place}"] == sampler.configuration_at_step(step, 0)
    assert list(reasons)[:3] == ["median", "largest", "most frequent"]
    assert len(reasons) == 7


def test_equal_candidates_are_one_with_all_reasons() -> None:
    candidates = propose_candidates(make_sampler("half"), make_steps([0.5, 0.6, 0.4]), 3, 1)
    assert candidates[8, 8].startswith("largest, most frequent")
    assert "least loss 1" in candidates[8, 8], "step 3 trained the largest ranks"
    assert list(candidates) == [(4, 4), (8, 8)]


def test_sandwich_counts_extremes_in_every_step_and_the_loss_of_the_random_pass() -> None:
    sampler = make_sampler("sandwich")
    steps = make_steps([0.1, 0.2, 0.3], [0.9, 0.8, 0.7])
    reasons = by_reason(propose_candidates(sampler, steps, 3, 1))
    assert reasons["most frequent"] in ((8, 8), (8, 2), (2, 8), (2, 2))
    assert reasons["least loss 1"] == sampler.random_configuration(2), "by its own pass, not by the mean of the step"


def test_single_rank_leaves_no_choice() -> None:
    assert propose_candidates(make_sampler("half", (4,)), make_steps([0.5]), 1, 5) == {(4, 4): "the only one"}


def test_untrained_parameters_leave_the_median() -> None:
    assert propose_candidates(make_sampler("half"), make_steps([0.5]), 0, 5) == {(4, 4): "median"}


CANDIDATES = {(4, 4): "median", (8, 8): "largest", (2, 2): "least loss 1"}


def test_candidate_with_the_best_held_out_score_is_selected() -> None:
    shares = {(4, 4): (0.4, 0.6, 0.2, 0.4), (8, 8): (0.5, 0.7, 0.4, 0.4), (2, 2): (0.1, 0.1, 0.1, 0.9)}
    scorer = FakeScorer(lambda configuration, row: shares[configuration][MIXED_QUESTIONS.index(row)], True)
    scored, best = score_candidates(CANDIDATES, scorer, MIXED_QUESTIONS, None)
    assert [candidate.configuration for candidate in scored] == list(CANDIDATES)
    assert best is scored[1]
    assert (best.behind, best.error) == (0, 0)
    assert scored[0].behind == pytest.approx(0.1)  # differences 0.1, 0.1, 0.2, 0
    assert scored[0].error == pytest.approx(0.0816496581 / 2)
    row = scored[2].as_row()
    assert list(row) == ["why", "configuration", "score", "accuracy", "behind", "error"]
    assert row["score"] == pytest.approx(0.3)
    assert (row["why"], row["configuration"], row["accuracy"]) == ("least loss 1", [2, 2], 0.25)


def test_selection_on_test_rows_ignores_held_out_scores() -> None:
    scorer = FakeScorer(lambda configuration, row: -float(configuration[0]))
    scored, best = score_candidates(CANDIDATES, scorer, MIXED_QUESTIONS, lambda configuration: float(configuration[0]))
    assert best.configuration == (8, 8)
    assert [candidate.test_score for candidate in scored] == [4, 8, 2]
    assert list(best.as_row()) == ["why", "configuration", "score", "accuracy", "test", "behind", "error"]
    assert scored[2].behind == -6, "on held-out rows it is the better one"


def test_first_of_equal_candidates_is_selected() -> None:
    _, best = score_candidates(CANDIDATES, FakeScorer(lambda *_: -1.0), MIXED_QUESTIONS, None)
    assert best.configuration == (4, 4)
