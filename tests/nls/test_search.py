"""The search for ranks, with scorers whose answers are known."""

from collections import Counter
from typing import Any

import pytest

from nybble.errors import RunError
from nybble.nls import search
from nybble.nls.search import SearchConfig, SearchSpace, search_ranks
from tests.helpers.elastic import FakeScorer

optuna = pytest.importorskip("optuna", reason="the extra search")

RANKS, ROWS = (8, 4, 2), tuple(range(8))
KNOWN = ((8, 8), (4, 4))
ALL_PLACES = 9  # 3 ranks in each of 2 layers


@pytest.fixture
def storage() -> Any:
    return optuna.storages.InMemoryStorage()


def make_space(known: tuple[tuple[int, ...], ...] = KNOWN) -> SearchSpace:
    rows: Any = ROWS  # the fake scorers take any rows
    return SearchSpace(RANKS, 2, rows, known)


def run(storage: Any, scorer: FakeScorer, sampler: Any, trials: int, random: bool = False, seed: int = 0) -> Any:
    return search_ranks(make_space(), scorer, SearchConfig(sampler, trials, random, seed, storage))


def trials_of(storage: Any, name: str) -> list[Any]:
    return optuna.load_study(study_name=name, storage=storage).trials  # type: ignore[no-any-return]


def configurations(trials: list[Any]) -> list[tuple[int, ...]]:
    return [(trial.params["layer0"], trial.params["layer1"]) for trial in trials]


def prefer(*best: int) -> FakeScorer:
    """A scorer with a single maximum at one configuration."""
    return FakeScorer(
        lambda ranks, row: -float(sum(abs(RANKS.index(a) - RANKS.index(b)) for a, b in zip(ranks, best, strict=True)))
    )


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "hill"])
def test_search_begins_with_known_configurations_and_is_compared_with_random_draws(sampler: str, storage: Any) -> None:
    result = run(storage, prefer(2, 2), sampler, 6, random=True)
    assert configurations(trials_of(storage, f"{sampler}-0"))[:2] == list(KNOWN)
    assert configurations(trials_of(storage, "random-0"))[:2] != list(KNOWN)
    assert list(result.winners) == [sampler, "random"]
    assert result.num_trials == min(6, len(trials_of(storage, f"{sampler}-0")))
    assert (len(result.front) > 0) == (sampler == "nsga2")


def test_search_continues_where_it_stopped(storage: Any) -> None:
    run(storage, prefer(2, 2), "tpe", 3)
    run(storage, prefer(2, 2), "tpe", 5)
    run(storage, prefer(2, 2), "tpe", 4)
    assert len(trials_of(storage, "tpe-0")) == 5
    run(storage, prefer(2, 2), "random", 4, seed=9)
    run(storage, prefer(2, 2), "random", 8, seed=9)
    drawn = configurations(trials_of(storage, "random-9"))
    assert drawn[:4] != drawn[4:], "a continued search does not repeat its draws"


def test_as_many_trials_of_each_sampler_are_compared(storage: Any) -> None:
    run(storage, prefer(2, 2), "tpe", 6)
    result = run(storage, prefer(2, 2), "tpe", 2, random=True)
    assert len(trials_of(storage, "random-0")) == 6, "as many as the search has had"
    assert result.num_trials == 6
    run(storage, prefer(2, 2), "random", 9)
    assert run(storage, prefer(2, 2), "tpe", 6, random=True).num_trials == 6


def test_hill_reaches_the_best_configuration_and_stops(storage: Any, caplog: pytest.LogCaptureFixture) -> None:
    scorer = prefer(2, 2)
    with caplog.at_level("INFO", logger="nybble"):
        result = run(storage, scorer, "hill", 50)
    assert result.winners["hill"] == (2, 2)
    trials = trials_of(storage, "hill-0")
    tried = configurations(trials)
    assert len(tried) == len(set(tried)) <= ALL_PLACES
    assert result.num_trials == len(tried) < 50
    assert "because every neighbour of the best one was tried" in caplog.text
    best = tried[1]  # of the known ones the nearer one
    for trial, configuration in zip(trials[2:], tried[2:], strict=True):
        moves = [abs(RANKS.index(a) - RANKS.index(b)) for a, b in zip(configuration, best, strict=True)]
        assert sorted(moves) == [0, 1]
        if trial.state == optuna.trial.TrialState.COMPLETE and scorer.function(configuration, 0) > scorer.function(
            best, 0
        ):
            best = configuration


@pytest.mark.parametrize("rising", [True, False])
def test_trials_worse_than_most_are_pruned_after_a_quarter_of_the_rows(rising: bool, storage: Any) -> None:
    scored: dict[Any, None] = {}

    def score(configuration: Any, row: Any) -> float:
        scored.setdefault(configuration)
        place = list(scored).index(configuration)
        return float(place if rising else -place)

    scorer = FakeScorer(score)
    run(storage, scorer, "hill", 4)
    rows: Counter[Any] = Counter()
    for configuration, part in scorer.calls:
        rows[configuration] += len(part)
    assert [rows[configuration] for configuration in scored] == [8, 8, *([8, 8] if rising else [2, 2])], (
        "known configurations are never pruned"
    )
    states = {8: optuna.trial.TrialState.COMPLETE, 2: optuna.trial.TrialState.PRUNED}
    assert [trial.state for trial in trials_of(storage, "hill-0")] == [states[rows[c]] for c in scored]


@pytest.mark.parametrize("sampler", ["hill", "random", "nsga2"])
def test_no_row_is_scored_twice(sampler: str, storage: Any) -> None:
    scorer = prefer(2, 2)
    run(storage, scorer, sampler, 20)
    counts = Counter((configuration, row) for configuration, rows in scorer.calls for row in rows)
    assert set(counts.values()) == {1}


def test_interrupted_trial_is_repeated(storage: Any) -> None:
    scorer = prefer(2, 2)

    def interrupt(configuration: Any, row: Any) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(storage, FakeScorer(interrupt), "hill", 7)
    run(storage, scorer, "hill", 7)
    trials = trials_of(storage, "hill-0")
    assert [trial.state for trial in trials[:2]] == [optuna.trial.TrialState.FAIL, optuna.trial.TrialState.COMPLETE]
    done = configurations(trials[1:])
    assert set(KNOWN) <= set(done), "the interrupted known configuration too"
    assert len(done) == len(set(done))


def test_search_without_a_completed_trial_is_refused(storage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search._StudyRunner, "_is_pruned", lambda *_: True)
    with pytest.raises(RunError, match="at least one trial of random must be scored on all rows"):
        run(storage, prefer(2, 2), "random", 2)


def test_fresh_rows_decide_between_winners() -> None:
    scorer = FakeScorer(lambda ranks, row: 0.8 if (ranks == (8, 8)) == (row < 8) else 0.4, alternatives=True)
    winners = {"heuristics": (8, 8), "tpe": (4, 4)}
    held_out: Any = ROWS
    fresh: Any = (8, 9)
    first, second = search.compare_winners(winners, scorer, held_out, fresh)
    assert [(row["by"], row["configuration"], row["rank_sum"]) for row in (first, second)] == [
        ("heuristics", [8, 8], 16),
        ("tpe", [4, 4], 8),
    ]
    assert (first["score"], second["score"]) == (pytest.approx(0.8), pytest.approx(0.4))
    assert (first["fresh"], second["fresh"]) == (pytest.approx(0.4), pytest.approx(0.8))
    assert (first["behind"], second["behind"]) == (pytest.approx(0.4), 0)
    assert (first["accuracy"], second["accuracy"]) == (0, 1), "on the rows that decide"
    assert {part for _, part in scorer.calls} == {ROWS, (8, 9)}
    first, second = search.compare_winners(winners, scorer, held_out, ())
    assert (first["fresh"], second["fresh"]) == (None, None)
    assert (first["behind"], second["behind"]) == (0, pytest.approx(0.4))
