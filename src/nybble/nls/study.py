"""Studies of the rank search: optuna's storage, samplers and trials, in terms of rank configurations."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from nybble.errors import RunError, first_line
from nybble.files import is_out_of_space
from nybble.nls.ranks import RankConfiguration
from nybble.schema import SchemaError
from nybble.tasks.dataset import Question

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

SearchSampler = Literal["nsga2", "tpe", "hill", "random"]

# Where optuna keeps trials: an SQLite file, or an object of optuna.
Storage: TypeAlias = "Path | optuna.storages.BaseStorage"

# File in the run folder with the trials.
STORAGE_FILE = "search.db"
# Seconds that a process waits while another one writes to the file.
_WRITE_TIMEOUT = 60.0


@dataclass(frozen=True)
class SearchSpace:
    """What is searched.

    Attributes:
        ranks: ranks to choose from, largest first; at least two.
        num_layers: decoder layers of the model.
        rows: held-out rows to score configurations on.
        known: configurations that were scored before.
    """

    ranks: tuple[int, ...]
    num_layers: int
    rows: Sequence[Question]
    known: tuple[RankConfiguration, ...]

    @property
    def parameter_names(self) -> list[str]:
        """Name of each decoder layer's rank in a trial, first layer first."""
        return [f"layer{i}" for i in range(self.num_layers)]

    def parameters(self, configuration: RankConfiguration) -> dict[str, int]:
        """The parameters of a trial with a configuration."""
        return dict(zip(self.parameter_names, configuration, strict=True))


def storage_file(folder: Path) -> Path:
    """The SQLite file in a run folder that holds its studies."""
    return folder / STORAGE_FILE


@contextmanager
def reporting_full_storage(storage: Storage) -> Iterator[None]:
    """Turn what optuna and SQLite raise for want of space, in this block, into a RunError."""
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        cause = error.__cause__ or error  # optuna wraps what SQLite says
        # SQLite calls it an I/O error where a limit of file sizes is reached.
        if not (is_out_of_space(error) or is_out_of_space(cause) or "disk I/O error" in str(error)):
            raise
        raise RunError(
            f"{storage} must fit on the disk; it could not be written: {first_line(cause)}; free some disk "
            "space, then run the same command"
        ) from error


def stored_study(sampler: SearchSampler, seed: int, storage: Storage, space: SearchSpace) -> optuna.Study:
    """Open a study as `open_study` does, and check the trials that an earlier search stored.

    Raises:
        RunError: the file of trials is damaged, or holds trials of another space.
    """
    try:
        with reporting_full_storage(storage):
            study = open_study(sampler, seed, storage)
            check_trials(study, space)
    except RunError:
        raise
    except Exception as error:  # optuna raises whatever a wrong value in the file leads to; nothing else is read here
        reason = first_line(error) if isinstance(error, SchemaError) else f"{type(error).__name__}: {first_line(error)}"
        raise RunError(
            f"{storage} must hold the trials of nybble search; it cannot be used ({reason}); delete it to search anew"
        ) from error
    return study


def _opened(storage: Storage) -> optuna.storages.BaseStorage:
    """The storage as optuna takes it. Not by a URL, in which ?, % and {} of a path have a meaning."""
    import optuna
    from sqlalchemy.pool import QueuePool

    if not isinstance(storage, Path):
        return storage
    connect = partial(sqlite3.connect, storage, timeout=_WRITE_TIMEOUT, check_same_thread=False)
    return optuna.storages.RDBStorage("sqlite://", engine_kwargs={"creator": connect, "poolclass": QueuePool})


def check_trials(study: optuna.Study, space: SearchSpace) -> None:
    """Check the trials of a study.

    Raises:
        SchemaError: it has other objectives, or a finished trial has ranks outside of the space, or no finite score.
    """
    if study.directions[0].name != "MAXIMIZE":
        raise SchemaError("the score must be maximized; it is minimized")
    if any(trial.number is None for trial in study.trials):
        raise SchemaError("every trial must have a number; one has none")
    for trial in finished_trials(study):
        ranks = [trial.params.get(name) for name in space.parameter_names]
        if len(trial.params) != len(ranks) or any(rank not in space.ranks for rank in ranks):
            raise SchemaError(
                f"trial {trial.number} must have a rank of the run for every decoder layer; it has {ranks}"
            )
        values = trial.values or []
        scored = len(values) == len(study.directions) and all(map(math.isfinite, values))
        if trial.state.name == "COMPLETE" and not scored:
            raise SchemaError(f"trial {trial.number} must have a finite score; it has {values}")


def open_study(sampler: SearchSampler, seed: int, storage: Storage) -> optuna.Study:
    """Open the stored study of a sampler and a seed, or create it.

    The random generator of the sampler depends on the number of stored trials, so that a continued search does not
    repeat its first draws.

    Args:
        sampler: proposes configurations.
        seed: of the sampler, 0 .. 2**32 - 1.
        storage: see `storage_file`.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=_opened(storage),
        study_name=f"{sampler}-{seed}",
        load_if_exists=True,
        directions=["maximize", "minimize"] if sampler == "nsga2" else ["maximize"],
        pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2),
    )
    study.sampler = _optuna_sampler(sampler, (seed + 1_000_003 * len(study.trials)) % 2**32)  # numpy's range of seeds
    return study


def _optuna_sampler(sampler: SearchSampler, seed: int) -> optuna.samplers.BaseSampler:
    import optuna

    if sampler == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed, population_size=20)
    if sampler == "tpe":
        return optuna.samplers.TPESampler(seed=seed)
    return optuna.samplers.RandomSampler(seed=seed)  # for hill too, whose trials are all enqueued


def untried_neighbours(study: optuna.Study, space: SearchSpace) -> list[dict[str, int]]:
    """Parameters of the best trial with one rank moved by one place in the space, as far as they were not tried."""
    best, tried = best_trial(study).params, [trial.params for trial in finished_trials(study)]
    places = [(name, space.ranks.index(int(best[name])) + move) for name in space.parameter_names for move in (-1, 1)]
    moved = [{**best, name: space.ranks[place]} for name, place in places if 0 <= place < len(space.ranks)]
    return [parameters for parameters in moved if parameters not in tried]


def completed_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that were scored on all rows, in their order."""
    import optuna

    return [trial for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]


def finished_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that were scored on all rows or pruned, in their order."""
    import optuna

    states = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    return [trial for trial in study.trials if trial.state in states]


def best_trial(study: optuna.Study, count: int | None = None) -> FrozenTrial:
    """The completed trial with the best score among the first `count` finished ones (None = all)."""
    completed = {trial.number for trial in completed_trials(study)}
    return max(
        (trial for trial in finished_trials(study)[:count] if trial.number in completed),
        key=lambda trial: trial.values[0],
    )


def configuration_of(trial: FrozenTrial) -> RankConfiguration:
    """The ranks of a trial, first decoder layer first."""
    return tuple(int(trial.params[f"layer{i}"]) for i in range(len(trial.params)))


@dataclass(frozen=True)
class FrontPoint:
    """A trial that no other trial beats in both objectives.

    Attributes:
        configuration: its ranks.
        score: on the rows of the search; higher is better.
        rank_sum: sum of its ranks; lower is better.
    """

    configuration: RankConfiguration
    score: float
    rank_sum: int


def pareto_front(study: optuna.Study) -> list[FrontPoint]:
    """The trials of an nsga2 study that no other trial beats in both objectives, best score first."""
    values = {configuration_of(trial): trial.values for trial in study.best_trials}
    front = [FrontPoint(configuration, score, int(rank_sum)) for configuration, (score, rank_sum) in values.items()]
    return sorted(front, key=lambda point: -point.score)
