"""--eval_only: measure one configuration of a trained run on the task's test rows, without changing the run."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from nybble.console import say
from nybble.evaluation.lm_eval import run_tasks
from nybble.files import remove_folder, write_text
from nybble.models.loading import LoadedModel
from nybble.models.quantized_model import load_quantized
from nybble.nls import ranks
from nybble.nls.ranks import RankConfiguration
from nybble.qat.absorb import put_weights
from nybble.report.labels import ranks_text
from nybble.report.markdown import run_markdown
from nybble.run.folder import RunFolder
from nybble.run.results import MeasuredRanks, Phase
from nybble.workflows.quantize_tuned import TunedRun, to_4_bits
from nybble.workflows.task_run import TaskRun


def test_metric(task_run: TaskRun) -> float:
    """The task's own metric on its test rows, of the model as it is now."""
    return _metric_of(task_run, task_run.context.loaded)


def _metric_of(task_run: TaskRun, loaded: LoadedModel) -> float:
    evaluator, dataset = task_run.evaluator, task_run.data.dataset
    if evaluator.task is not None and dataset.scored:
        return next(iter(evaluator.task.measure(loaded.model, loaded.tokenizer).values()))
    task = task_run.options.task.task
    config = replace(evaluator.lm_eval, tasks=(task,))
    return float(run_tasks(loaded.model, loaded.tokenizer, config)[task][dataset.metric])


def measure_configuration(tuned: TunedRun, custom: RankConfiguration) -> None:
    """Measure a configuration (() = the one in place) on the test rows; the result is kept in the run and printed."""
    task_run, context = tuned.task_run, tuned.task_run.context
    run, task = context.run, task_run.task
    in_place = tuple(task.configuration or ())
    configuration = custom or in_place or _median(task_run)
    with run.stage("test"):
        if not tuned.quantized_after:
            with task_run.scorer(tuned.layers).activate(configuration):
                value = test_metric(task_run)
        elif configuration == in_place and run.results.phase.reached(Phase.QUANTIZED):
            loaded, trust = context.loaded, context.options.trust_remote_code
            model, tokenizer, _ = load_quantized(run.quantized, loaded.model.dtype, trust)
            value = _metric_of(task_run, LoadedModel(model.to(loaded.model.device), tokenizer, loaded.name))
        else:
            ranks.activate_ranks(tuned.layers, configuration)
            with _apart(tuned) as trial:
                model = context.loaded.model
                quantized, _ = to_4_bits(trial)
                put_weights(model, quantized, model.device)
                value = test_metric(trial.task_run)
    options = task_run.options
    fast = tuned.quantized_after or options.ranks.fast_eval or options.training.weight_cache == "step"
    task.tested.append(MeasuredRanks(list(configuration), value, fast))
    run.save()
    if run.results.finished:
        write_text(run.path / "report.md", run_markdown(run.results))
    say(f"{task.name} at ranks {ranks_text(configuration)}: {task.metric} {value:.4f}")


def _median(task_run: TaskRun) -> RankConfiguration:
    return ranks.median_configuration(task_run.rank_space, task_run.num_decoder_layers)


@contextmanager
def _apart(tuned: TunedRun) -> Iterator[TunedRun]:
    """The same run in a folder inside its own, which is deleted afterwards: what is tried there changes nothing."""
    run = tuned.task_run.context.run
    folder = run.path / "trial"
    remove_folder(folder)
    folder.mkdir()
    context = replace(tuned.task_run.context, run=RunFolder(folder, copy.deepcopy(run.results)))
    try:
        yield replace(tuned, task_run=replace(tuned.task_run, context=context))
    finally:
        remove_folder(folder)
