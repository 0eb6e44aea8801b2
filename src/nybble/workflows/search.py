"""`nybble search RUN`: a stronger search for ranks after `nybble tune`, over the same space, by optuna.

A trial is one configuration, scored as `tune` scores (the share of the right answers) on the rows that it chose by. Samplers:

    nsga2    two aims, score and a small sum of ranks: NSGA-II
    tpe      score alone: tree-structured Parzen estimator
    hill     score alone: the best so far with one decoder layer moved to a neighbouring rank (SQFT, arXiv 2410.03750)
    random   uniform draws, what every search has to beat

All but nsga2 give up on a configuration whose first quarter, then half, of the rows are worse than most others' (successive halving), but for those that
`tune` had compared, with which every search but the random one begins. Trials are kept in RUN/search.db, so a search goes on where it stopped. The best of
many trials is partly luck: the winners, and what `tune` had chosen, are scored again on held-out rows that nothing was chosen by, where the task has some
left, and that is the figure to compare.
"""

from __future__ import annotations

import importlib.util
import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nybble import files
from nybble.console import bar, console
from nybble.errors import MissingExtraError, RunError
from nybble.nls.ranks import RankConfiguration
from nybble.options.commands import SearchOptions, TuneOptions, of_run
from nybble.report import run as report_run
from nybble.report import tables
from nybble.run import results
from nybble.workflows import tune
from nybble.workflows.tune import Trained

log = logging.getLogger("nybble")

FILE = "search.db"
# Shares of the rows after which a trial may be given up.
_RUNGS = (0.25, 0.5)


def search(options: SearchOptions) -> None:
    """Search, compare, and with --apply put the winner in place of what `tune` had chosen."""
    options.check()
    if importlib.util.find_spec("optuna") is None:
        raise MissingExtraError("search", "nybble search")
    path = Path(options.run)
    found = results.read_results(path)
    if found.get("kind") != "tune" or "configuration" not in found or not (path / "quantized").exists():
        raise RunError(f"{path} must be a finished run of nybble tune; it is none")
    if "scored_by" not in found["task"]:
        raise RunError(
            f"{path} must be a run of this version of nybble tune; an earlier one, which scored configurations otherwise, made it; tune again"
        )
    values = of_run(TuneOptions, path) | {
        "output_dir": str(path),
        "resume": True,
        "trust_remote_code": options.trust_remote_code,
    }
    with tune.reopened(TuneOptions(**values)) as trained:
        if len(trained.lesson.space) == 1:
            raise RunError(f"{path} has the single rank {trained.lesson.space[0]}; there is nothing to search")
        _search(trained, options, path)


def _search(trained: Trained, options: SearchOptions, path: Path) -> None:
    lesson, run = trained.lesson, trained.job.run
    known = [tuple(row["configuration"]) for row in run.results.get("candidates", [])]
    in_place = run.results["configuration"]
    first = run.results.get("chosen", in_place)
    winners: dict[str, RankConfiguration] = {
        "heuristics (tune)" if "chosen" in run.results else "given (tune)": tuple(first)
    }
    if in_place != first:  # of an earlier --apply, or given on resume: a search that finds less must not replace it
        winners["in place"] = tuple(in_place)
    with run.stage("search"):
        studies: dict[str, Any] = {}
        for sampler in dict.fromkeys((options.sampler, "random")) if options.random_draws else (options.sampler,):
            wanted = max(options.trials, *(len(_done(study)) for study in studies.values()), 0)
            studies[sampler] = _run_study(trained, options, path, sampler, wanted, known)
        count = min(len(_done(study)) for study in studies.values())  # the best of as many of each
        for name, study in studies.items():
            winners[name] = _configuration_of(_best(study, count))
        front = _front(studies["nsga2"]) if "nsga2" in studies else []
        compared = _compare(trained, winners)
    run.results["search"] = {"trials": count, "winners": compared, "front": front}
    run.save_results()
    files.write_text(path / "report.md", report_run.markdown(run.results))
    if front:
        console.print(
            "Not beaten by another trial in score and sum of ranks:",
            tables.as_table(*report_run.front_rows(run.results)),
        )
    console.print(tables.as_table(*report_run.search_rows(run.results)))
    judged = "fresh" if compared[0]["fresh"] is not None else "score"
    best = max(compared, key=lambda row: row[judged])
    rows = (
        f"{len(lesson.fresh)} fresh rows"
        if judged == "fresh"
        else f"the {len(lesson.held_out)} rows searched (there are no fresh ones)"
    )
    if judged == "fresh" and "applied" in run.results:
        rows += " (an earlier --apply has chosen by them)"
    console.print(
        f"Best on {rows}: {best['by']}. {report_run.scored_by(run.results)[1]} Higher is better.", highlight=False
    )
    if best["configuration"] == in_place:
        console.print("It is in place.")
    elif options.apply:
        tune.put_in_place(trained, tuple(best["configuration"]))
    else:
        text = " ".join(map(str, best["configuration"]))
        console.print(
            f"--apply ships it; nybble tune ... --resume --eval_only --custom_rank_config {text} scores it on the test rows.",
            highlight=False,
        )


def _run_study(
    trained: Trained, options: SearchOptions, path: Path, sampler: str, wanted: int, known: list[RankConfiguration]
) -> Any:
    """Trials of one sampler up to the number wanted, counting those of earlier sittings; at least one was scored on all rows."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    lesson = trained.lesson
    names = [f"layer{i}" for i in range(lesson.count)]
    study = optuna.create_study(
        storage=f"sqlite:///{path / FILE}",
        study_name=f"{sampler}-{options.seed}",
        load_if_exists=True,
        directions=["maximize", "minimize"] if sampler == "nsga2" else ["maximize"],
        pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2),
    )
    study.sampler = _sampler(
        sampler, (options.seed + 1_000_003 * len(study.trials)) % 2**32
    )  # one that begins anew must not draw the same again
    for stopped in study.get_trials(
        states=(optuna.trial.TrialState.RUNNING,)
    ):  # an earlier sitting was interrupted in it
        study.tell(stopped.number, state=optuna.trial.TrialState.FAIL)
        params = stopped.params or stopped.system_attrs.get("fixed_params", {})
        if params.keys() == set(names):
            study.enqueue_trial(params)
    done = len(_done(study))
    if not study.trials and sampler in ("hill", "tpe", "nsga2"):
        for configuration in known:  # searches begin with what tune's heuristics proposed; random draws do not
            study.enqueue_trial(dict(zip(names, configuration, strict=True)))

    scored: dict[RankConfiguration, list[float]] = {}
    with bar(f"search ({sampler})", wanted, "best") as advance:
        advance(done)
        for _ in range(done, wanted):
            if (
                sampler == "hill"
                and _complete(study)
                and not study.get_trials(states=(optuna.trial.TrialState.WAITING,))
            ):
                neighbours = _neighbours(study, lesson.space, names)
                if not neighbours:
                    log.info(
                        "hill: every neighbour of the best was tried; stopped after %d of %d trials",
                        len(_done(study)),
                        wanted,
                    )
                    break
                study.enqueue_trial(random.Random(f"{options.seed} {len(study.trials)}").choice(neighbours))
            trial = study.ask()
            configuration = tuple(int(trial.suggest_categorical(name, list(lesson.space))) for name in names)
            reported = None if sampler == "nsga2" else trial
            score = _score_unless_hopeless(
                trained, configuration, reported, configuration in known, scored.setdefault(configuration, [])
            )
            if score is None:
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            else:
                study.tell(trial, [score, sum(configuration)] if sampler == "nsga2" else score)
            advance(1, best=f"{_best(study).values[0]:.4f}" if _complete(study) else "")
    if not _complete(study):
        raise RunError(f"no trial of {sampler} was finished; give more --trials")
    return study


def _configuration_of(trial: Any) -> RankConfiguration:
    """The ranks of a trial, first layer first."""
    return tuple(int(trial.params[f"layer{i}"]) for i in range(len(trial.params)))


def _front(study: Any) -> list[dict[str, Any]]:
    """The trials that no other one beats in both aims, the best score first."""
    best = {_configuration_of(trial): trial.values for trial in study.best_trials}
    found = [
        {"configuration": list(ranks), "score": values[0], "rank_sum": int(values[1])} for ranks, values in best.items()
    ]
    return sorted(found, key=lambda row: -row["score"])


def _sampler(name: str, seed: int) -> Any:
    import optuna

    if name == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed, population_size=20)
    return optuna.samplers.TPESampler(seed=seed) if name == "tpe" else optuna.samplers.RandomSampler(seed=seed)


def _neighbours(study: Any, space: Sequence[int], names: Sequence[str]) -> list[dict[str, int]]:
    """The best configuration so far with one layer moved by one place in the space; those that were not tried."""
    best, tried = _best(study).params, [trial.params for trial in _done(study)]
    places = [(name, space.index(int(best[name])) + move) for name in names for move in (-1, 1)]
    moved = [{**best, name: space[place]} for name, place in places if 0 <= place < len(space)]
    return [configuration for configuration in moved if configuration not in tried]


def _score_unless_hopeless(
    trained: Trained, configuration: RankConfiguration, trial: Any, spared: bool, scored: list[float]
) -> float | None:
    """Mean score on all rows; None where `trial` has given up on the way, unless it is spared. `scored` are the rows scored already; it grows."""
    rows = list(trained.lesson.held_out)

    def mean_of(count: int) -> float:
        if count > len(scored):
            scored.extend(trained.score(configuration, rows[len(scored) : count]).scores)
        return sum(scored[:count]) / count

    for step, share in enumerate(_RUNGS if trial is not None else (), 1):
        trial.report(mean_of(max(1, int(len(rows) * share))), step)
        if (
            trial.should_prune() and not spared
        ):  # asked in any case: what it was asked about is what others are measured by
            return None
    return mean_of(len(rows))


def _complete(study: Any) -> list[Any]:
    import optuna

    return [trial for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]


def _done(study: Any) -> list[Any]:
    """Trials that were scored, or given up; in their order."""
    import optuna

    states = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    return [trial for trial in study.trials if trial.state in states]


def _best(study: Any, count: int | None = None) -> Any:
    """The best of the first `count` trials."""
    complete = {trial.number for trial in _complete(study)}
    return max((trial for trial in _done(study)[:count] if trial.number in complete), key=lambda trial: trial.values[0])


def _compare(trained: Trained, winners: dict[str, RankConfiguration]) -> list[dict[str, Any]]:
    """Score each winner on the rows searched and on fresh ones."""
    lesson = trained.lesson
    scores = {by: trained.score(configuration, lesson.held_out) for by, configuration in winners.items()}
    fresh = (
        {by: trained.score(configuration, lesson.fresh) for by, configuration in winners.items()}
        if lesson.fresh
        else {}
    )
    judged = fresh or scores
    best = max(judged, key=lambda by: judged[by].score)
    rows = []
    for by, configuration in winners.items():
        behind, error = judged[best].better_by(judged[by])
        rows.append(
            {
                "by": by,
                "configuration": list(configuration),
                "rank_sum": sum(configuration),
                "score": scores[by].score,
                "accuracy": judged[by].accuracy,
                "fresh": fresh[by].score if fresh else None,
                "behind": behind,
                "error": error,
            }
        )
    return rows
