"""Stored studies and their trials."""

from pathlib import Path
from typing import Any

import pytest

from nybble.nls import study as studies
from nybble.nls.study import SearchSpace

optuna = pytest.importorskip("optuna", reason="the extra search")

SPACE = SearchSpace((8, 4, 2), 2, (), ())


def add(study: "optuna.Study", configuration: tuple[int, int], *values: float) -> None:
    """Add a trial: completed with these values, or pruned without any."""
    distribution = optuna.distributions.CategoricalDistribution(SPACE.ranks)
    state = optuna.trial.TrialState.COMPLETE if values else optuna.trial.TrialState.PRUNED
    study.add_trial(
        optuna.trial.create_trial(
            state=state,
            params=SPACE.parameters(configuration),
            distributions=dict.fromkeys(SPACE.parameter_names, distribution),
            values=list(values) or None,
        )
    )


@pytest.fixture
def storage() -> Any:
    return optuna.storages.InMemoryStorage()


def test_studies_are_stored_by_sampler_and_seed(storage: Any) -> None:
    add(studies.open_study("random", 3, storage), (8, 2), 0.5)
    assert len(studies.open_study("random", 3, storage).trials) == 1
    assert len(studies.open_study("random", 4, storage).trials) == 0
    assert len(studies.open_study("tpe", 3, storage).trials) == 0


def test_studies_are_kept_in_a_file_of_the_run_folder(tmp_path: Path) -> None:
    add(studies.open_study("random", 3, studies.storage_file(tmp_path)), (8, 2), 0.5)
    assert (tmp_path / "search.db").is_file()
    stored = optuna.load_study(study_name="random-3", storage=f"sqlite:///{tmp_path}/search.db")
    assert studies.configuration_of(studies.best_trial(stored)) == (8, 2)


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "hill", "random"])
def test_every_sampler_takes_the_largest_seed(sampler: studies.SearchSampler, storage: Any) -> None:
    study = studies.open_study(sampler, 2**32 - 1, storage)
    add(study, (8, 2), *((0.5, 10) if sampler == "nsga2" else (0.5,)))
    trial = studies.open_study(sampler, 2**32 - 1, storage).ask()
    assert trial.suggest_categorical("layer0", list(SPACE.ranks)) in SPACE.ranks


def test_best_trial_is_completed_and_among_the_first(storage: Any) -> None:
    study = studies.open_study("random", 0, storage)
    for configuration, values in (((8, 2), (0.5,)), ((4, 4), ()), ((2, 2), (0.4,)), ((2, 8), (0.9,))):
        add(study, configuration, *values)
    assert len(studies.finished_trials(study)) == 4
    assert len(studies.completed_trials(study)) == 3
    assert studies.configuration_of(studies.best_trial(study)) == (2, 8)
    assert studies.configuration_of(studies.best_trial(study, 3)) == (8, 2), "pruned trials count too"


def test_neighbours_differ_in_one_layer_by_one_place(storage: Any) -> None:
    study = studies.open_study("hill", 0, storage)
    add(study, (4, 8), 0.5)
    assert studies.untried_neighbours(study, SPACE) == [
        {"layer0": 8, "layer1": 8},
        {"layer0": 2, "layer1": 8},
        {"layer0": 4, "layer1": 4},
    ]
    add(study, (2, 8))  # pruned
    add(study, (8, 8), 0.1)
    assert studies.untried_neighbours(study, SPACE) == [{"layer0": 4, "layer1": 4}]


def test_pareto_front_is_not_beaten_in_both_objectives(storage: Any) -> None:
    study = studies.open_study("nsga2", 0, storage)
    for configuration, score in (((8, 8), 0.9), ((4, 4), 0.7), ((8, 4), 0.6), ((2, 2), 0.5), ((2, 4), 0.5)):
        add(study, configuration, score, sum(configuration))
    front = studies.pareto_front(study)
    assert [(point.configuration, point.score, point.rank_sum) for point in front] == [
        ((8, 8), 0.9, 16),
        ((4, 4), 0.7, 8),
        ((2, 2), 0.5, 4),
    ]


@pytest.mark.parametrize("name", ["a b", "p?1", "a%41", "{x}", "\u00e9#;"])
def test_any_path_holds_its_own_trials(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    add(studies.open_study("random", 3, studies.storage_file(tmp_path / name)), (8, 2), 0.5)
    again = studies.open_study("random", 3, studies.storage_file(tmp_path / name))
    assert [studies.configuration_of(trial) for trial in again.trials] == [(8, 2)]
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["search.db"]
    assert (tmp_path / name / "search.db").is_file()
