"""Search for rank configurations with optuna, after training.

A trial scores one configuration on held-out rows. The samplers:

    nsga2       two objectives, the score and a small sum of ranks: NSGA-II
    tpe         the score alone: tree-structured Parzen estimator
    hill        the score alone: the best configuration so far, with the rank of one decoder layer moved to a
                neighbouring value of the space (SQFT, https://arxiv.org/abs/2410.03750)
    random      uniform draws, the baseline for every search

All samplers but nsga2 prune by successive halving: a trial stops after a quarter or half of the rows if its score there
is worse than that of most other trials. Configurations that were scored before the search are never pruned, and every
sampler but random begins with them.

Trials are stored in a SQLite file of the run folder, so a search continues where it stopped. Of several processes, the
first one holds the studies, and all of them score a trial together, so the studies are those of one process.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nybble import processes
from nybble.console import bar
from nybble.errors import RunError
from nybble.nls.ranks import RankConfiguration
from nybble.nls.scorer import ConfigurationScorer, LeadingScorer
from nybble.nls.study import (
    FrontPoint,
    SearchSampler,
    SearchSpace,
    Storage,
    best_trial,
    completed_trials,
    configuration_of,
    finished_trials,
    pareto_front,
    reporting_full_storage,
    stored_study,
    untried_neighbours,
)
from nybble.tasks.dataset import Question

if TYPE_CHECKING:
    import optuna

log = logging.getLogger("nybble")

# Fractions of the rows after which a trial may be pruned.
_PRUNING_FRACTIONS = (0.25, 0.5)


@dataclass(frozen=True)
class SearchConfig:
    """How to search.

    Attributes:
        sampler: proposes configurations.
        num_trials: number of trials, counting those of earlier searches with the same sampler and seed.
        random_baseline: whether to compare with as many random draws.
        seed: of sampler and random draws, 0 .. 2**32 - 1.
        storage: holds the trials; see `storage_file`.
    """

    sampler: SearchSampler
    num_trials: int
    random_baseline: bool
    seed: int
    storage: Storage


@dataclass(frozen=True)
class SearchResult:
    """Result of a search.

    Attributes:
        num_trials: trials of each sampler that were compared.
        winners: sampler -> its best configuration.
        front: Pareto front of nsga2, best score first; empty for the other samplers.
    """

    num_trials: int
    winners: dict[str, RankConfiguration]
    front: list[FrontPoint]


def search_ranks(space: SearchSpace, scorer: ConfigurationScorer, config: SearchConfig) -> SearchResult:
    """Search with a sampler and, if wanted, with random draws.

    The best of as many trials of each sampler are compared: the smallest number of finished trials.

    Raises:
        RunError: all trials of a sampler were pruned, or the stored trials cannot be read or written.
    """
    leading, found = LeadingScorer(scorer), None
    if processes.is_first():
        with reporting_full_storage(config.storage):
            found = _search(space, leading, config)
        leading.end()
    else:
        leading.follow()
    result = processes.on_first(lambda: found)
    assert result is not None, "the first process has searched"
    return result


def _search(space: SearchSpace, scorer: ConfigurationScorer, config: SearchConfig) -> SearchResult:
    samplers: tuple[SearchSampler, ...] = (config.sampler, "random") if config.random_baseline else (config.sampler,)
    studies: dict[str, optuna.Study] = {}
    for sampler in dict.fromkeys(samplers):
        wanted = max(config.num_trials, *(len(finished_trials(study)) for study in studies.values()), 0)
        study = stored_study(sampler, config.seed, config.storage, space)
        _StudyRunner(study, sampler, config.seed, space, scorer).run(wanted)
        studies[sampler] = study
    count = min(len(finished_trials(study)) for study in studies.values())
    winners = {name: configuration_of(best_trial(study, count)) for name, study in studies.items()}
    return SearchResult(count, winners, pareto_front(studies["nsga2"]) if "nsga2" in studies else [])


class _StudyRunner:
    """Runs trials of one study.

    Args:
        study: see `open_study`.
        sampler: its sampler.
        seed: of the choice of neighbours.
        space: what is searched.
        scorer: scores a configuration.
    """

    def __init__(
        self, study: optuna.Study, sampler: SearchSampler, seed: int, space: SearchSpace, scorer: ConfigurationScorer
    ) -> None:
        self.study, self.sampler, self.seed, self.space, self.scorer = study, sampler, seed, space, scorer
        # Scores of the first rows of each configuration, so that no row is scored twice.
        self.row_scores: dict[RankConfiguration, list[float]] = {}

    def run(self, wanted: int) -> None:
        """Run trials until the study has `wanted` finished ones; hill stops earlier if all neighbours were tried.

        Raises:
            RunError: all trials were pruned.
        """
        self._requeue_interrupted()
        if not self.study.trials and self.sampler != "random":
            for configuration in self.space.known:
                self.study.enqueue_trial(self.space.parameters(configuration))
        done = len(finished_trials(self.study))
        with bar(f"search ({self.sampler})", wanted, "best") as advance:
            advance(done)
            for _ in range(done, wanted):
                if self.sampler == "hill" and not self._enqueue_neighbour():
                    log.info(
                        "hill: stopped after %d of %d trials, because every neighbour of the best one was tried",
                        len(finished_trials(self.study)),
                        wanted,
                    )
                    break
                self._run_trial()
                has_best = bool(completed_trials(self.study))
                advance(1, best=f"{best_trial(self.study).values[0]:.4f}" if has_best else "")
        if not completed_trials(self.study):
            raise RunError(
                f"at least one trial of {self.sampler} must be scored on all rows; none was; use more --num_trials"
            )

    def _requeue_interrupted(self) -> None:
        """Try again the configurations of trials that an interruption left running."""
        import optuna

        for trial in self.study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
            self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            parameters = trial.params or trial.system_attrs.get("fixed_params", {})
            if parameters.keys() == set(self.space.parameter_names):
                self.study.enqueue_trial(parameters)

    def _enqueue_neighbour(self) -> bool:
        """Enqueue a random untried neighbour of the best configuration; False if there is none.

        Nothing is enqueued while other trials are waiting, or before there is a best one.
        """
        import optuna

        waiting = self.study.get_trials(states=(optuna.trial.TrialState.WAITING,))
        if waiting or not completed_trials(self.study):
            return True
        neighbours = untried_neighbours(self.study, self.space)
        if not neighbours:
            return False
        generator = random.Random(f"{self.seed} {len(self.study.trials)}")
        self.study.enqueue_trial(generator.choice(neighbours))
        return True

    def _run_trial(self) -> None:
        """Score the next configuration, and tell the study."""
        import optuna

        trial = self.study.ask()
        configuration = tuple(
            int(trial.suggest_categorical(name, list(self.space.ranks))) for name in self.space.parameter_names
        )
        if self.sampler == "nsga2":
            self.study.tell(trial, [self._mean_score(configuration, len(self.space.rows)), sum(configuration)])
        elif self._is_pruned(trial, configuration):
            self.study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            self.study.tell(trial, self._mean_score(configuration, len(self.space.rows)))

    def _is_pruned(self, trial: optuna.Trial, configuration: RankConfiguration) -> bool:
        """Report the score on the first rows of each pruning stage; True as soon as the trial is to be pruned."""
        for stage, fraction in enumerate(_PRUNING_FRACTIONS, 1):
            trial.report(self._mean_score(configuration, max(1, int(len(self.space.rows) * fraction))), stage)
            # The pruner is asked for known configurations too: its answers promote a trial to the next stage, which
            # other trials are compared with.
            prune = trial.should_prune()
            if prune and configuration not in self.space.known:
                return True
        return False

    def _mean_score(self, configuration: RankConfiguration, count: int) -> float:
        """Mean score of a configuration on the first `count` rows."""
        scores = self.row_scores.setdefault(configuration, [])
        if count > len(scores):
            scores.extend(self.scorer.score(configuration, self.space.rows[len(scores) : count]).scores)
        return sum(scores[:count]) / count


def compare_winners(
    winners: Mapping[str, RankConfiguration],
    scorer: ConfigurationScorer,
    held_out: Sequence[Question],
    fresh: Sequence[Question],
) -> list[dict[str, Any]]:
    """Score configurations on the rows that were searched and on fresh ones.

    The best of many trials is partly luck, so fresh rows, on which nothing was selected, decide where there are some.

    Args:
        winners: where a configuration is from -> the configuration.
        scorer: scores a configuration.
        held_out: rows that were searched.
        fresh: other held-out rows; may be empty.

    Returns: rows of results.json: "by", "configuration", "rank_sum", "score" (on `held_out`), "accuracy" (on the rows
        that decide), "fresh" (score on `fresh`, or None), "behind" and "error" (mean difference of the best one's
        scores to these on the rows that decide, and its standard error).
    """
    scores = {by: scorer.score(configuration, held_out) for by, configuration in winners.items()}
    fresh_scores = {by: scorer.score(configuration, fresh) for by, configuration in winners.items()} if fresh else {}
    deciding = fresh_scores or scores
    best = max(deciding.values(), key=lambda scores_: scores_.score)
    rows = []
    for by, configuration in winners.items():
        behind, error = best.better_by(deciding[by])
        rows.append(
            {
                "by": by,
                "configuration": list(configuration),
                "rank_sum": sum(configuration),
                "score": scores[by].score,
                "accuracy": deciding[by].accuracy,
                "fresh": fresh_scores[by].score if fresh else None,
                "behind": behind,
                "error": error,
            }
        )
    return rows
