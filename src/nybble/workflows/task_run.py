"""The beginning of every run on a task (tune, search, 16-bit LoRA of compare): validate, load, plan, open the run."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nybble.callbacks import Callback
from nybble.data.packing import token_fingerprint
from nybble.data.prepare import TextData, no_rows
from nybble.errors import OptionError
from nybble.evaluation.lm_eval import LmEvalConfig, check_tasks
from nybble.evaluation.perplexity import logits_from_states
from nybble.models.loading import LoadedModel, model_fingerprint
from nybble.nls import ranks
from nybble.nls.objective import task_objective
from nybble.nls.ranks import RankConfiguration
from nybble.nls.sampler import RankSampler
from nybble.nls.scorer import AdapterScorer
from nybble.options.commands import TuneOptions
from nybble.options.training import TuneTrainingOptions
from nybble.qat.base import CachedWeightLinear
from nybble.run.complete import is_quantized
from nybble.run.results import TaskResults
from nybble.tasks.dataset import TaskDataset, TaskRequest
from nybble.tasks.objective import TaskBatches, max_microbatch_rows, task_loss
from nybble.tasks.running_text import RunningTextConfig, running_text
from nybble.tasks.sources import check_place, is_scored_by_lm_eval, load_task
from nybble.tasks.task_data import TaskData, TaskDataConfig, encode_task
from nybble.tasks.teacher import load_teacher
from nybble.training.objective import TrainingObjective
from nybble.workflows import execution, plan, session, steps
from nybble.workflows.measure import Evaluator, TaskScorer
from nybble.workflows.plan import PlannedRun
from nybble.workflows.steps import RunContext

log = logging.getLogger("nybble")


@dataclass(frozen=True)
class TaskRun:
    """An open run on a task.

    Attributes:
        options: with everything automatic resolved.
        teacher: the model of --teacher; None without one, or where training is done.
    """

    context: RunContext
    options: TuneOptions
    data: TaskData
    teacher: Any
    evaluator: Evaluator

    @property
    def task(self) -> TaskResults:
        """The results of the task."""
        results = self.context.run.results.task
        assert results is not None, "a run on a task has results of it"
        return results

    @property
    def rank_space(self) -> tuple[int, ...]:
        """Ranks to choose from, largest first."""
        return self.options.ranks.lora_rank_space

    @property
    def num_decoder_layers(self) -> int:
        """Decoder layers of the model, each of which gets one rank."""
        return ranks.count_decoder_layers(self.context.selection.linears)

    @property
    def sampler(self) -> RankSampler:
        """Which ranks each training pass uses."""
        options = self.options
        return RankSampler(self.rank_space, self.num_decoder_layers, options.ranks.rank_sampling, options.run.seed)

    def scorer(self, layers: dict[str, CachedWeightLinear]) -> AdapterScorer:
        """Scores rank configurations of these layers."""
        cached = self.options.ranks.fast_eval or self.options.training.weight_cache == "step"
        return AdapterScorer(self.context.loaded, layers, self.data, self.options.task.seq_len, cached)

    def objective(self, layers: dict[str, CachedWeightLinear], training: TuneTrainingOptions) -> TrainingObjective:
        """The loss on the task, validated on held-out rows at the median configuration."""
        batches = TaskBatches(self.data.forward_tokens(), training.batch_size, training.epochs, self.context.seed)
        loss = task_loss(self.context.loaded.model, self.data, self.teacher)
        return task_objective(self.data, loss, batches, self.sampler, layers, self.scorer(layers))


def with_task(options: TuneOptions) -> TuneOptions:
    """The options with ranks in order, and the task among those that lm-eval measures if it knows it."""
    options = options.replace(lora_rank_space=ranks.parse_rank_space(options.ranks.lora_rank_space))
    if not is_scored_by_lm_eval(options.task.task):
        return options
    return options.replace(eval_tasks=tuple(dict.fromkeys((options.task.task, *options.evaluation.eval_tasks))))


@contextmanager
def open_task_run(
    options: TuneOptions, custom: RankConfiguration = (), callbacks: Sequence[Callback] = (), command: str = "tune"
) -> Iterator[TaskRun]:
    """Check everything, then open the run's folder.

    Args:
        custom: a rank configuration to check too, or ().
        command: of the results.

    Raises:
        NybbleError: whatever a person can repair.
    """
    started = time.perf_counter()
    options = plan.keep_saved_choices(with_task(options))
    evaluation, task = options.evaluation, options.task
    plan.validate(options, options.compression, evaluation, plan.input_names(options), command)
    check_place(task.task)
    own = (task.task,) if task.task in evaluation.eval_tasks else ()
    if not own and Path(task.task).stem in evaluation.eval_tasks:
        raise OptionError(
            f"--task {task.task} must have another name than the tasks of --eval_tasks, as it is the name of a column; "
            "rename the file"
        )
    check_tasks(own, task.data_dir, "--task")
    check_tasks(tuple(name for name in evaluation.eval_tasks if name != task.task), task.data_dir)
    dataset = load_task(TaskRequest(task.task, task.data_dir, options.run.seed, task.num_train_samples))
    tokenizer = plan.load_tokenizer(options.model, evaluation.eval_tasks)
    data = _encode(dataset, options, tokenizer)
    loaded = plan.load_model(options.model, tokenizer)
    selection = plan.select(loaded, options.scheme)
    layers = ranks.count_decoder_layers(selection.linears)
    if custom:
        ranks.check_configuration(custom, options.ranks.lora_rank_space, layers)
    compression = plan.plan_compression(
        options.compression, loaded, selection, options.training.trains_codes, plan.results_if_made(options)
    )
    teacher = _load_teacher(options, loaded)
    text = _text(options, loaded, data, teacher)
    planned = plan.check_fit(options, evaluation, loaded, selection, compression, text)
    options = _plan_training(options, planned, data, layers)

    facts = session.RunFacts(
        planned=planned,
        command=command,
        load_seconds=time.perf_counter() - started,
        limit=evaluation.limit,
        keep_options=options.ranks.eval_only,
    )
    with session.run_session(options, facts) as run:
        context = RunContext.of(run, options, options.compression, planned, callbacks)
        states = steps.teacher_states(context, {"test": text.test}, batch=1)
        tasks = LmEvalConfig(evaluation.eval_tasks, evaluation.eval_batch_size, evaluation.limit, task.data_dir)
        reference = logits_from_states(context.head, states["test"])
        scorer = TaskScorer(data.dataset, evaluation.limit, task.seq_len)
        evaluator = Evaluator(text.test, reference, tasks, scorer)
        if run.results.task is None:
            run.results.task = _task_results(data, text, options.ranks.lora_rank_space)
        yield TaskRun(context, options, data, teacher, evaluator)


def _encode(dataset: TaskDataset, options: TuneOptions, tokenizer: Any) -> TaskData:
    task = options.task
    config = TaskDataConfig(
        task.objective,
        task.seq_len,
        options.training.batch_size,
        options.ranks.num_selection_samples,
        options.run.seed,
    )
    return encode_task(dataset, config, tokenizer)


def _load_teacher(options: TuneOptions, loaded: LoadedModel) -> Any:
    """The model of --teacher; None without one, or where nothing is left to train."""
    if options.task.teacher is None:
        return None
    finished = options.run.resume and is_quantized(options.folder)
    # Other ranks are measured with scales of their own, which are trained.
    if finished and not (options.ranks.eval_only and options.training.scale_training_epochs):
        return None
    return load_teacher(options.task.teacher, loaded, options.model.trust_remote_code)


def _text(options: TuneOptions, loaded: LoadedModel, data: TaskData, teacher: Any) -> TextData:
    """The right answers as running text, and fingerprints of everything that is read."""
    config = RunningTextConfig(
        options.task.seq_len,
        options.compression.num_calibration_samples,
        options.evaluation.num_test_samples,
        options.run.seed,
    )
    text = running_text(data, loaded.tokenizer, config)
    fingerprints = {
        "calibration text": token_fingerprint(text.calibration_ST, ""),
        "test text": token_fingerprint(text.test.ids, ""),
        "rows of the task": data.fingerprint(),
    }
    if teacher is not None:
        fingerprints["teacher"] = model_fingerprint(teacher)
    return TextData(
        train=no_rows(),
        calibration=text.calibration_ST,
        validation=no_rows(),
        test=text.test,
        test_source=f"held-out rows of {data.dataset.name} with their right answers",
        fingerprints=fingerprints,
    )


def _plan_training(options: TuneOptions, planned: PlannedRun, data: TaskData, num_layers: int) -> TuneOptions:
    """The options with everything automatic resolved. Says what will be trained, and warns of what has no effect."""
    training, space = options.training, options.ranks.lora_rank_space
    _warn_of_unused(training)
    log.info(
        "%d epoch%s of %d steps of %d rows; ranks %s for each of %d decoder layers",
        training.epochs, "s"[: training.epochs != 1], len(data.texts) // training.batch_size, training.batch_size,
        " ".join(map(str, space)), num_layers,
    )  # fmt: skip
    size = execution.TrainingSize(
        rank=max(space),
        seq_len=max(data.forward_tokens()),
        teacher_tokens=planned.text.test.ids.numel(),
        weight_copies=2 if training.quantize == "during" and training.scale_lr else 1,
        max_rows=max_microbatch_rows(data, planned.loaded.model.device.type),
    )
    chosen = execution.plan_memory(options, training, planned, size, options.evaluation.eval_tasks)
    method = {} if planned.compression.init_from is not None else {"method": planned.compression.method}
    return options.replace(
        output_dir=str(options.folder),
        **chosen.options(),
        **method,
    )


def _warn_of_unused(training: TuneTrainingOptions) -> None:
    """Warn of options that have no effect with this --quantize."""
    if training.base_weights == "fixed" and not training.keeps_base_weights:
        log.warning("--base_weights has no effect with --quantize after: adapters are trained on 16-bit weights")
    if training.quantize == "during":
        unused, where = ("scale_epochs", "norm_lr"), "--quantize during"
    elif not training.scale_training_epochs:
        unused, where = ("scale_lr", "norm_lr"), "--quantize after and --scale_epochs 0"
    else:
        return
    for name in unused:
        if getattr(training, name) not in (0, getattr(TuneTrainingOptions, name)):
            log.warning("--%s has no effect with %s", name, where)


def _task_results(data: TaskData, text: TextData, rank_space: tuple[int, ...]) -> TaskResults:
    return TaskResults(
        name=data.dataset.name,
        metric=data.dataset.metric,
        rank_space=list(rank_space),
        objective=data.objective,
        scored_by=data.score_name,
        text_length=text.test.ids.shape[1],
    )
