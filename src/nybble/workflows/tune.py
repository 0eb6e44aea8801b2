"""`nybble tune`: a model learns a downstream task with adapters of elastic rank, in INT4.

--quantize after     validate -> read the task -> load -> plan -> open the run -> train adapters on 16-bit weights
                     -> choose ranks -> merge -> compress -> train scales and norms in 4 bits -> absorb -> export
                     -> measure -> report
--quantize during    validate -> read the task -> load -> plan -> open the run -> compress
                     -> train adapters inside the rounding -> choose ranks -> absorb -> export -> measure -> report

Epochs and ranks are chosen on held-out rows. The test rows are scored for the report, and nothing is decided by them;
with --select_on test, ranks are, and the report says so.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nybble.callbacks import Callback
from nybble.errors import RunError
from nybble.nls.candidates import propose_candidates, score_candidates
from nybble.nls.ranks import RankConfiguration
from nybble.options.commands import TuneOptions
from nybble.qat.base import CachedWeightLinear
from nybble.report.labels import ranks_text
from nybble.run.marker import is_run
from nybble.run.results import Candidate, Phase, read_results
from nybble.run.resume import saved_options
from nybble.tasks.attention import plain_attention
from nybble.workflows import session, steps, train
from nybble.workflows.judge import judge_tuning
from nybble.workflows.measure import SIXTEEN_BIT, measure_row, size_in_16_bits
from nybble.workflows.positions import TrainedPositions
from nybble.workflows.quantize_tuned import (
    TunedRun,
    discard_quantized,
    measure_compressed,
    quantize_and_save,
    remove_leftovers,
)
from nybble.workflows.task_run import TaskRun, open_task_run
from nybble.workflows.trial import measure_configuration, test_metric

log = logging.getLogger("nybble")


def tune(
    options: TuneOptions,
    callbacks: Sequence[Callback] = (),
    known: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Run the whole workflow, or with --eval_only only its last step; returns the run folder.

    Args:
        callbacks: are told of stages, steps and validations.
        known: rows of the results that another run has measured on the same model and task.

    Raises:
        NybbleError: whatever a person can repair.
    """
    options.check()
    custom = options.ranks.custom_rank_config
    options = _with_ranks_of_the_run(options)
    with open_task_run(options, custom, callbacks) as task_run:
        if options.ranks.eval_only:
            task_run.context.run.on_first(lambda: measure_configuration(reopen(task_run), custom))
        else:
            _run(task_run, known or {})
        return task_run.context.run.path


def _with_ranks_of_the_run(options: TuneOptions) -> TuneOptions:
    """On --resume: --eval_only measures other ranks and leaves those of the run; a finished run keeps its ranks."""
    folder, custom = options.folder, options.ranks.custom_rank_config
    if options.ranks.eval_only:
        check_trained(folder)
    if not (options.run.resume and is_run(folder)):
        return options
    saved = tuple(saved_options(folder).get("custom_rank_config", ()))
    if options.ranks.eval_only:
        return options.replace(custom_rank_config=saved)
    results = read_results(folder)
    finished = results.phase.reached(Phase.QUANTIZED)
    if custom != saved and not finished and results.task is not None and results.task.replaced_by_search:
        raise RunError(
            f"{folder} is getting the ranks that nybble search found; --resume without --custom_rank_config finishes "
            "that; another --output_dir ships other ranks"
        )
    if custom != saved and finished:
        raise RunError(
            f"{folder} is finished, with other ranks; --eval_only measures --custom_rank_config, another --output_dir "
            "ships it"
        )
    return options


def check_trained(folder: Path) -> None:
    """Raise RunError unless this is a run of nybble tune whose adapters are trained."""
    results = read_results(folder)
    if results.command != "tune" or not results.phase.reached(Phase.TRAINED):
        raise RunError(
            f"{folder} must be a run of nybble tune that was trained; it is none, or its training did not end; train "
            "first (--resume)"
        )


def _run(task_run: TaskRun, known: Mapping[str, Mapping[str, Any]]) -> None:
    context, options = task_run.context, task_run.options
    run, loaded = context.run, context.loaded
    run.results.models = {**{row: dict(metrics) for row, metrics in known.items()}, **run.results.models}
    measure_row(run, task_run.evaluator, SIXTEEN_BIT, loaded, size_in_16_bits(loaded.model))
    if run.results.phase == Phase.REPLACING:  # nybble search --apply was interrupted
        discard_quantized(task_run)
    if not run.results.phase.reached(Phase.QUANTIZED):
        tuned = _insert(task_run)
        if tuned.compressed is not None:
            measure_compressed(tuned, tuned.compressed, tuned.layers)
        with plain_attention(loaded.model, task_run.data.max_text_length):
            objective = task_run.objective(tuned.layers, options.training)
            train.train_layers(context, options.training, tuned.layers, objective, {})
            if not run.results.phase.reached(Phase.TRAINED):
                run.reach(Phase.TRAINED)
            configuration = _chosen_before(task_run) or _choose(tuned)
        quantize_and_save(tuned, configuration)
    run.on_first(lambda: finish(task_run))


def finish(task_run: TaskRun) -> None:
    """Delete what is no longer needed, export, measure, report."""
    run = task_run.context.run
    remove_leftovers(task_run)
    failed = steps.measure_shipped(task_run.context, task_run.evaluator, "tuned")
    session.finish(run, judge_tuning(run.results), failed)


def _insert(task_run: TaskRun) -> TunedRun:
    """Put layers with adapters in place: on 16-bit weights, or with --quantize during inside the rounding."""
    context, rank = task_run.context, max(task_run.rank_space)
    layers: dict[str, CachedWeightLinear] = {}
    if task_run.options.training.quantize == "after":
        layers |= train.insert_adapters(context, rank)
        return TunedRun(task_run, layers, None)
    compressed = steps.compress_model(context)
    fixed_point = task_run.options.training.base_weights == "fixed"
    layers |= train.insert_quantized_layers(context, compressed, rank, fixed_point)
    positions = TrainedPositions.of(context, compressed, codes_stay=False)
    return TunedRun(task_run, layers, dict(compressed.weights), positions)


def reopen(task_run: TaskRun) -> TunedRun:
    """A trained run with its layers in place, which hold the adapters of the best epoch."""
    tuned = _insert(task_run)
    train.load_best(task_run.context.run.path, task_run.options.training, tuned.layers)
    return tuned


def _chosen_before(task_run: TaskRun) -> RankConfiguration:
    """The configuration that search put in place, that was given, or that an earlier session chose; () for none."""
    task = task_run.task
    if task.replaced_by_search and task.configuration is not None:
        return tuple(task.configuration)
    return task_run.options.ranks.custom_rank_config or tuple(task.chosen or ())


def _choose(tuned: TunedRun) -> RankConfiguration:
    """The candidate with the best score; what each scored goes into the results."""
    task_run, run = tuned.task_run, tuned.task_run.context.run
    options, task, training = task_run.options.ranks, task_run.task, run.results.training()
    assert training is not None, "ranks are chosen after the training"
    proposed = propose_candidates(task_run.sampler, training.steps, training.best_step, options.num_min_loss_configs)
    on_test = options.select_on == "test"
    scorer = task_run.scorer(tuned.layers)

    def score_on_test(configuration: RankConfiguration) -> float:
        with scorer.activate(configuration):
            return test_metric(task_run)

    with run.stage("choose"):
        scored, best = score_candidates(proposed, scorer, task_run.data.held_out, score_on_test if on_test else None)
    task.candidates = [
        Candidate(
            why=candidate.reason,
            configuration=list(candidate.configuration),
            score=candidate.scores.score,
            accuracy=candidate.scores.accuracy,
            test=candidate.test_score,
            behind=candidate.behind,
            error=candidate.error,
        )
        for candidate in scored
    ]
    task.selected_on, task.chosen = options.select_on, list(best.configuration)
    log.info(
        "chosen on %s rows among %d candidate%s: ranks %s (%s)",
        "test" if on_test else "held-out", len(scored), "s"[: len(scored) != 1], ranks_text(best.configuration),
        best.reason,
    )  # fmt: skip
    return best.configuration
