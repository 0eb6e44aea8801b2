"""`nybble search`: a stronger search for ranks after `nybble tune`, compared with tune's own choice and random draws.

The best of many trials is partly luck, so the winners are scored again on held-out rows that nothing was chosen by,
where the task has some left. That figure decides.
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

from nybble.console import console, say
from nybble.errors import MissingExtraError, RunError
from nybble.files import write_text
from nybble.nls.ranks import RankConfiguration
from nybble.nls.search import SearchConfig, SearchResult, compare_winners, search_ranks
from nybble.nls.study import SearchSpace, storage_file
from nybble.options.commands import SearchOptions, TuneOptions
from nybble.options.toml import run_values
from nybble.report import ranks as rank_report
from nybble.report.markdown import run_markdown
from nybble.report.tables import as_table
from nybble.run.results import FrontPoint, Phase, RunResults, SearchResults, Winner, read_results
from nybble.run.resume import saved_options
from nybble.workflows.launch import check_processes
from nybble.workflows.quantize_tuned import TunedRun, quantize_and_save
from nybble.workflows.task_run import open_task_run
from nybble.workflows.tune import finish, reopen

log = logging.getLogger("nybble")


def search(options: SearchOptions) -> None:
    """Search, compare, and with --apply ship the best configuration instead of the one that tune chose.

    Raises:
        MissingExtraError: optuna is not installed.
        RunError: not a run of nybble tune with a choice of ranks.
    """
    options.check()
    check_processes(options)
    if importlib.util.find_spec("optuna") is None:
        raise MissingExtraError("search", "nybble search")
    path, asked = Path(options.search.run), options.search
    _check_run(path)
    values = run_values(TuneOptions, path) | {"output_dir": str(path), "resume": True, "eval_only": True}
    tune_options = TuneOptions.of(**values | {"trust_remote_code": asked.trust_remote_code})
    with open_task_run(tune_options) as task_run:
        tuned = reopen(task_run)
        run, task, data = task_run.context.run, task_run.task, task_run.data
        candidates = tuple(tuple(candidate.configuration) for candidate in task.candidates)
        space = SearchSpace(task_run.rank_space, task_run.num_decoder_layers, data.held_out, candidates)
        config = SearchConfig(asked.sampler, asked.num_trials, asked.random_baseline, asked.seed, storage_file(path))
        scorer = task_run.scorer(tuned.layers)
        with run.stage("search"):
            found = search_ranks(space, scorer, config)
            compared = compare_winners(_winners(tuned, found), scorer, data.held_out, data.fresh)
        winners = [Winner(**row) for row in compared]
        front = [FrontPoint(list(point.configuration), point.score, point.rank_sum) for point in found.front]
        task.search = SearchResults(found.num_trials, winners, front)
        run.save()
        if run.results.finished:
            write_text(path / "report.md", run_markdown(run.results))
        best = _show(run.results, len(data.fresh), len(data.held_out))
        _apply_or_say(tuned, best, asked.apply)


def _check_run(path: Path) -> None:
    """Raise RunError unless this is a run of nybble tune that has chosen among ranks."""
    saved_options(path)
    results = read_results(path)
    task = results.task
    if results.command not in ("tune", ""):
        raise RunError(f"{path} must be a run of nybble tune; it is one of nybble {results.command}; name another")
    if task is None or task.configuration is None:
        raise RunError(f"{path} must be a finished run of nybble tune; it has no ranks yet; finish it with --resume")
    if len(task.rank_space) == 1:
        raise RunError(f"{path} has the single rank {task.rank_space[0]}; there is nothing to search")


def _winners(tuned: TunedRun, found: SearchResult) -> dict[str, RankConfiguration]:
    """Where it is from -> configuration: tune's choice, the one in place if it is another, the best of each sampler."""
    task = tuned.task_run.task
    in_place = tuple(task.configuration or ())
    first = tuple(task.chosen) if task.chosen is not None else in_place
    winners = {"heuristics (tune)" if task.chosen is not None else "given (tune)": first}
    if in_place != first:  # of an earlier --apply, or given on resume: a search that finds less must not replace it
        winners["in place"] = in_place
    return winners | dict(found.winners)


def _show(results: RunResults, num_fresh: int, num_held_out: int) -> Winner:
    """Print what was compared; returns the best."""
    task = results.task
    assert task is not None
    assert task.search is not None
    if task.search.front:
        say("Not beaten by another trial in score and sum of ranks:")
        console.print(as_table(*rank_report.front_rows(task.search)))
    console.print(as_table(*rank_report.search_rows(task.search)))
    winners = task.search.winners
    on_fresh = winners[0].fresh is not None
    best = max(winners, key=lambda winner: winner.score if winner.fresh is None else winner.fresh)
    rows = f"{num_fresh} fresh rows" if on_fresh else f"the {num_held_out} rows searched (there are no fresh ones)"
    if on_fresh and task.replaced_by_search:
        rows += " (an earlier --apply was chosen by them)"
    say(f"Best on {rows}: {best.by}. {rank_report.score_note(task)} Higher is better.")
    shipped = next((winner for winner in winners if winner.configuration == task.configuration), None)
    if shipped is not None and shipped is not best and shipped.behind <= shipped.error:
        say(
            f"The ranks that ship ({shipped.by}) are {shipped.behind:.4f} behind, within the standard error of "
            f"{shipped.error:.4f}: no difference was measured."
        )
    return best


def _apply_or_say(tuned: TunedRun, best: Winner, apply: bool) -> None:
    """Ship the best configuration, or say how."""
    task_run = tuned.task_run
    run, in_place = task_run.context.run, task_run.task.configuration
    made = best.configuration == in_place and run.results.phase.reached(Phase.QUANTIZED)
    if made and (run.results.finished or not apply):
        say("The model ships with it already.")
        return
    if not apply:
        text = " ".join(map(str, best.configuration))
        say(
            f"--apply ships it; nybble tune --resume --eval_only --output_dir {run.path} --custom_rank_config {text} "
            "measures it on the test rows."
        )
        return
    if not made:  # otherwise an earlier --apply was killed afterwards
        quantize_and_save(tuned, tuple(best.configuration), by_search=True)
    run.on_first(lambda: finish(task_run))
