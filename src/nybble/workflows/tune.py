"""The flow of `nybble tune`: a model learns a downstream task, with adapters of elastic rank; the best ranks are chosen, and it gets 4 bits.

load -> rows of the task -> insert -> train, one configuration a step -> choose on held-out rows -> merge -> compress
     -> train scales and norms in 4 bits -> absorb -> save -> export -> measure

That is `--adapters before`: the adapters learn on 16-bit weights. With `--adapters inside` they learn inside the rounding of a model that is compressed first,
as in the reference:

load -> rows of the task -> compress -> insert -> train, one configuration a step -> choose on held-out rows -> absorb -> save -> export -> measure

What is chosen (epoch, configuration) is chosen on held-out rows. The test rows are scored for the report (the 16-bit model, what learnt, what was compressed,
what ships), and nothing follows from them. `--select_on test` is the exception, and is called so.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nybble import files
from nybble.console import bar, console
from nybble.errors import OptionError, RunError
from nybble.evaluation import lm_eval, perplexity
from nybble.models import loading, quantized_model, selection
from nybble.nls import ranks
from nybble.nls.ranks import RankConfiguration
from nybble.options.commands import TuneOptions
from nybble.qat import absorb, insert
from nybble.qat.layers import CachedWeightLinear, QuantizedLinear
from nybble.quant.weight import QuantizedWeight
from nybble.report import run as report_run
from nybble.run import results as run_results
from nybble.run import resume
from nybble.run.folder import Run
from nybble.tasks.dataset import Question
from nybble.tasks.scoring import QuestionScores
from nybble.workflows import lessons, stages, starts, tuning
from nybble.workflows.lessons import TaskData
from nybble.workflows.stages import Job
from nybble.workflows.text import Sequences

log = logging.getLogger("nybble")

# The training in 4 bits that comes after the adapters' own: name of its checkpoints and results.
SCALES = "scales"


@dataclass(frozen=True)
class Trained:
    """A trained run, opened again: its layers hold the adapters of the best epoch.

    Attributes:
        compressed: what the run started from, 8-bit weights included; None where the adapters learnt on 16-bit weights.
        reference: the 16-bit model's logits on the test sequences.
    """

    job: Job
    lesson: TaskData
    layers: dict[str, Any]  # of StepLinear
    compressed: dict[str, QuantizedWeight] | None
    reference: perplexity.Logits

    def score(self, configuration: RankConfiguration, rows: Sequence[Question]) -> QuestionScores:
        """Of one configuration on held-out rows."""
        ranks.activate_ranks(self.layers, configuration)
        with lessons.plain_attention(self.job, self.lesson), lessons.for_measuring(self.job.options, self.layers):
            return lessons.score(self.job, self.lesson, rows)


def tune(options: TuneOptions, known: Mapping[str, dict[str, Any]] | None = None) -> Path:
    """Run the whole flow, or with --eval_only its last step; returns the run folder. Raises NybbleError for whatever a person can repair.

    Args:
        known: rows of the results that another run has measured on the same model and task.
    """
    options.check()
    custom, path = options.custom_rank_config, options.folder
    if options.eval_only:
        _check_trained(path)
    if options.resume and run_results.is_run(path):
        saved = tuple(resume.read_options(path).get("custom_rank_config", ()))
        if options.eval_only:
            options = replace(options, custom_rank_config=saved)  # a trial leaves the run's own options alone
        elif custom != saved and (path / "quantized").exists():
            raise RunError(
                f"{path} is finished, with other ranks; --eval_only tests --custom_rank_config, another --output_dir ships it"
            )
    with opened(options, custom) as (job, lesson):
        _test_one(_trained(job, lesson), custom) if options.eval_only else _run(job, lesson, known or {})
        return job.run.path


def settled(options: TuneOptions) -> TuneOptions:
    """Ranks in order, each once; the task among those that lm-eval measures."""
    options = replace(options, lora_rank_space=ranks.parse_rank_space(options.lora_rank_space))
    return (
        options
        if options.task.endswith(".jsonl")
        else replace(options, tasks=tuple(dict.fromkeys((options.task, *options.tasks))))
    )


@contextmanager
def reopened(options: TuneOptions) -> Iterator[Trained]:
    """A run that was trained, with the options that it was trained with."""
    _check_trained(options.folder)
    with opened(replace(options, eval_only=True), ()) as (job, lesson):
        yield _trained(job, lesson)


def _check_trained(path: Path) -> None:
    results = run_results.read_results(path)
    if results.get("kind") != "tune" or not results.get("training") or "lora16" in results["models"]:
        raise RunError(
            f"{path} must be a run of nybble tune that was trained; it is none, or its training did not end; train first (--resume)"
        )


@contextmanager
def opened(options: TuneOptions, custom: RankConfiguration) -> Iterator[tuple[Job, TaskData]]:
    """The run's folder, model and rows; checks everything first. `custom`: a configuration to check too, or ()."""
    options = settled(options)
    if options.adapters == "before" and starts.start_run(options.start):
        raise OptionError(
            f"--start {options.start} must be a method where adapters learn before the model has 4 bits; it is a folder with one; use --adapters inside"
        )
    prepared: list[TaskData] = []

    def cut(options: TuneOptions, loaded: loading.LoadedModel) -> Sequences:
        prepared.append(lessons.prepare(options, loaded, options.lora_rank_space, custom))
        return lessons.sequences_of(options, loaded, prepared[0])

    def resolve(
        options: TuneOptions, loaded: loading.LoadedModel, plan: selection.LayerSelection, sequences: Sequences
    ) -> TuneOptions:
        return lessons.resolve(options, loaded, plan, sequences, prepared[0])

    with stages.opened(options, options.start, "--start", cut, resolve) as job:
        yield replace(job, score=lessons.own_score(job, prepared[0])), prepared[0]


# --- the flow -----------------------------------------------------------------------------------------------------------------


def _run(job: Job, lesson: TaskData, known: Mapping[str, dict[str, Any]]) -> None:
    run, options = job.run, job.options
    run.results["models"] = {**known, **run.results["models"]}
    run.results["task"] = lessons.described(lesson)
    states = stages.teach(job, {"test": job.sequences.test}, 1)
    reference = perplexity.logits_from_states(job.head, states["test"])
    stages.measure_16bit(job, reference)
    applied = tuple(run.results.get("applied", ()))
    if applied and applied != tuple(run.results.get("configuration", ())):  # `nybble search --apply` was interrupted
        _discard_4_bits(job)
    if not job.quantized.exists():
        compressed, layers = _inserted(job, lesson)
        if compressed is not None:
            _measure_compressed(job, reference, compressed, layers)
        with lessons.plain_attention(job, lesson):
            tuning.train_layers(run, options, layers, lessons.course(job, lesson, layers))
            chosen = (
                applied
                or options.custom_rank_config
                or tuple(run.results.get("chosen", ()))
                or _choose(job, lesson, layers)
            )
        _save(Trained(job, lesson, layers, compressed, reference), chosen)
    _tidy(job)
    stages.measure_saved(job, reference, "tuned")
    stages.finish(run, _judge(run.results))


def _inserted(job: Job, lesson: TaskData) -> tuple[dict[str, QuantizedWeight] | None, dict[str, Any]]:
    """All 4-bit weights as they start, or None with --adapters before; and the layers with adapters, in place."""
    rank = max(lesson.space)
    return (
        (None, dict(tuning.insert_adapters(job, rank)))
        if job.options.adapters == "before"
        else tuning.insert_layers(job, rank)
    )


def _measure_compressed(
    job: Job,
    reference: perplexity.Logits,
    compressed: Mapping[str, QuantizedWeight],
    layers: Mapping[str, QuantizedLinear],
) -> None:
    with lessons.for_measuring(job.options, layers):
        stages.measure(
            job,
            reference,
            "compressed",
            job.loaded.model,
            job.loaded.tokenizer,
            stages.size_of(job.loaded.model, compressed),
        )


# --- choosing -----------------------------------------------------------------------------------------------------------------


def candidates(job: Job, lesson: TaskData) -> dict[RankConfiguration, str]:
    """Configuration -> why it is one: the middle of the space, the largest ranks (absorbed, they cost nothing), what was trained most often, the least losses
    of training."""
    options, training = job.options, job.run.results["training"]
    if len(lesson.space) == 1:
        return {ranks.uniform_configuration(lesson.space[0], lesson.count): "the only one"}
    if job.run.results["best_step"] == 0:  # the start was kept: its adapters add nothing at any rank
        return {ranks.median_configuration(lesson.space, lesson.count): "median"}
    seen = [lessons.configuration_of(options, lesson, int(row["step"]) - 1, 2) for row in training]
    uniform = (
        [ranks.uniform_configuration(extreme(lesson.space), lesson.count) for extreme in (max, min)]
        if options.sampling == "sandwich"
        else []
    )
    proposed = [
        (ranks.median_configuration(lesson.space, lesson.count), "median"),
        (ranks.uniform_configuration(max(lesson.space), lesson.count), "largest"),
    ]
    proposed.append((ranks.most_frequent_configuration([*seen, *(uniform * len(seen))]), "most frequent"))
    losses = [
        row["last_pass"] if uniform else row["loss"] for row in training
    ]  # of the configuration in `seen`: it comes after the largest and the smallest
    proposed += [
        (ranks_, f"least loss {i}")
        for i, ranks_ in enumerate(ranks.least_loss_configurations(seen, losses, options.num_min_loss_configs), 1)
    ]
    found: dict[RankConfiguration, str] = {}
    for configuration, why in proposed:
        found[configuration] = f"{found[configuration]}, {why}" if configuration in found else why
    return found


def _choose(job: Job, lesson: TaskData, layers: Mapping[str, CachedWeightLinear]) -> RankConfiguration:
    """The candidate with the best score on held-out rows; what each scored goes into the results."""
    run, options, found = job.run, job.options, candidates(job, lesson)
    on_test = options.select_on == "test"
    rows: list[dict[str, Any]] = []
    scores: list[QuestionScores] = []
    with run.stage("choose"), bar("choose", len(found), "best") as advance:
        for configuration, why in found.items():
            ranks.activate_ranks(layers, configuration)
            with lessons.for_measuring(options, layers):
                score = lessons.score(job, lesson, lesson.held_out)
                row = {
                    "why": why,
                    "configuration": list(configuration),
                    "score": score.score,
                    "accuracy": score.accuracy,
                }
                if on_test:
                    row["test"] = _test_metric(job, lesson)
            rows.append(row)
            scores.append(score)
            advance(1, best=f"{max(row['test' if on_test else 'score'] for row in rows):.4f}")
    best = max(range(len(rows)), key=lambda i: rows[i]["test" if on_test else "score"])
    for row, score in zip(rows, scores, strict=True):
        row["behind"], row["error"] = scores[best].better_by(score)
    run.results["candidates"], run.results["selected_on"], run.results["chosen"] = (
        rows,
        options.select_on,
        rows[best]["configuration"],
    )
    log.info("of %d candidates the best on %s rows: %s, %s", len(rows), "test" if on_test else "held-out", rows[best]["why"],
             report_run.ranks_written(rows[best]["configuration"]))  # fmt: skip
    return tuple(rows[best]["configuration"])


def _test_metric(job: Job, lesson: TaskData) -> float:
    """The task's own figure on its test rows."""
    options, model, tokenizer = job.options, job.loaded.model, job.loaded.tokenizer
    if lesson.task.scored:
        return next(iter(job.score(model, tokenizer).values()))
    measured = lm_eval.run_tasks(
        model, tokenizer, [options.task], options.eval_batch_size, options.task_limit, options.data_dir
    )
    return float(measured[options.task][lesson.task.metric])


def _trained(job: Job, lesson: TaskData) -> Trained:
    """Insert again (compressed from the blocks that the run kept), and load the adapters."""
    states = stages.teach(job, {"test": job.sequences.test}, 1)  # of the 16-bit model, which is gone afterwards
    compressed, layers = _inserted(job, lesson)
    tensors, _ = files.load_tensors(job.run.path / tuning.checkpoints()[1])
    with torch.no_grad():
        for name, tensor in tensors.items():
            layer, leaf = name.rsplit(".", 1)
            getattr(layers[layer], leaf).copy_(tensor)
    return Trained(job, lesson, layers, compressed, perplexity.logits_from_states(job.head, states["test"]))


def _test_one(trained: Trained, custom: RankConfiguration) -> None:
    """--eval_only: measure one configuration of a trained run on the task's test rows."""
    job, lesson, results = trained.job, trained.lesson, trained.job.run.results
    in_place = tuple(results.get("configuration", ()))
    chosen = custom or in_place or ranks.median_configuration(lesson.space, lesson.count)
    ranks.activate_ranks(trained.layers, chosen)
    with job.run.stage("test"):
        if trained.compressed is not None:
            with lessons.for_measuring(job.options, trained.layers):
                value = _test_metric(job, lesson)
        elif chosen == in_place and job.quantized.exists():
            loaded = job.loaded
            model, tokenizer, _ = quantized_model.load_quantized(
                job.quantized, loaded.model.dtype, job.options.trust_remote_code
            )
            value = _test_metric(
                replace(job, loaded=replace(loaded, model=model.to(loaded.model.device), tokenizer=tokenizer)), lesson
            )
        else:
            with _aside(job) as trial:
                _in_4_bits(replace(trained, job=trial))
                value = _test_metric(trial, lesson)
    fast = trained.compressed is None or job.options.fast_eval or job.options.cache == "step"
    tested = {"configuration": list(chosen), lesson.task.metric: value, "fast_eval": fast}
    results.setdefault("tested", []).append(tested)
    job.run.save_results()
    if report_run.finished(results):
        files.write_text(job.run.path / "report.md", report_run.markdown(results))
    console.print(
        f"{lesson.task.name} at ranks {report_run.ranks_written(chosen)}: {lesson.task.metric} {value:.4f}",
        highlight=False,
    )


@contextmanager
def _aside(job: Job) -> Iterator[Job]:
    """The same job in a folder of its own inside the run's, which is deleted afterwards: what is tried there changes nothing in the run."""
    folder = job.run.path / "trial"
    files.remove_folder(folder)
    folder.mkdir()
    try:
        yield replace(job, run=Run(folder, None, copy.deepcopy(job.run.results)))
    finally:
        files.remove_folder(folder)


def put_in_place(trained: Trained, chosen: RankConfiguration) -> None:
    """Absorb another configuration than before; save, export and measure it. Killed in between, `nybble tune --resume` ends with the same."""
    job = trained.job
    job.run.results["applied"] = list(chosen)
    job.run.save_results()
    _save(trained, chosen)
    _tidy(job)
    stages.measure_saved(job, trained.reference, "tuned")
    stages.finish(job.run, _judge(job.run.results))


def _save(trained: Trained, chosen: RankConfiguration) -> None:
    """The layers, with the chosen ranks active, become the run's 4-bit model."""
    job, loaded, results = trained.job, trained.job.loaded, trained.job.run.results
    if results.get("configuration") != list(chosen):
        _discard_4_bits(job)
        results["configuration"] = list(chosen)
        job.run.save_results()
    ranks.activate_ranks(trained.layers, chosen)
    quantized = _in_4_bits(trained)
    quantized_model.save_quantized(job.quantized, loaded.model, loaded.tokenizer, quantized)


def _tidy(job: Job) -> None:
    """Delete what was needed only until the 4-bit model was saved. (Inside the rounding, other ranks begin from the compressed blocks.)"""
    for leftover in ("trial", *(("compress",) if job.options.adapters == "before" else ())):
        files.remove_folder(job.run.path / leftover)


def _discard_4_bits(job: Job) -> None:
    """Forget what was made with other ranks. As long as `configuration` is that of these, an interruption ends here again."""
    results, kinds = job.run.results, stages.kinds_of(job)
    for name in (job.quantized.name, *kinds):
        files.remove_folder(job.run.path / name)
    for name in tuning.checkpoints(SCALES):
        (job.run.path / name).unlink(missing_ok=True)
    for row in ("tuned", *kinds, *(("learnt", "compressed") if job.options.adapters == "before" else ())):
        results["models"].pop(row, None)
    results.pop(SCALES, None)
    for stage in ("absorb", *(("compress", f"train {SCALES}") if job.options.adapters == "before" else ())):
        results["seconds"].pop(stage, None)


def _in_4_bits(trained: Trained) -> dict[str, QuantizedWeight]:
    """The layers, with the ranks that are active, become plain ones in place. Returns: all quantized weights."""
    job = trained.job
    before, layers = _compress_learnt(trained) if trained.compressed is None else (trained.compressed, trained.layers)
    with job.run.stage("absorb"):
        insert.settle_norms(job.loaded.model)
        tuned = absorb.absorb(job.loaded.model, layers)
        job.run.results |= absorb.changes(before, tuned)
    return before | tuned


def _compress_learnt(trained: Trained) -> tuple[dict[str, QuantizedWeight], dict[str, QuantizedLinear]]:
    """Merge adapters into 16-bit weights, compress these, and train scales and norms on the task, with codes that stay. Returns: all quantized weights as
    compressed; and the trained layers."""
    job, model = trained.job, trained.job.loaded.model
    absorb.merge(model, trained.layers)
    stages.measure(
        job, trained.reference, "learnt", model, job.loaded.tokenizer, 2 * sum(p.numel() for p in model.parameters())
    )
    compressed, layers = tuning.insert_layers(job, 0)
    _measure_compressed(job, trained.reference, compressed, layers)
    options = replace(job.options, epochs=job.options.scale_passes)
    if options.epochs:
        norms = insert.train_norms(model) if options.norm_lr else {}
        with lessons.plain_attention(job, trained.lesson):
            tuning.train_layers(
                job.run,
                options,
                layers,
                lessons.course(replace(job, options=options), trained.lesson, layers),
                norms,
                SCALES,
            )
    return compressed, layers


def _judge(results: dict[str, Any]) -> list[str]:
    """Warnings in plain words."""
    warnings = []
    if results.get("best_step") == 0:
        warnings.append(
            "no epoch of tuning was better on held-out rows than the start, so the start was kept; use more rows or another --lr"
        )
    if results.get(SCALES, {}).get("best_step") == 0:
        warnings.append(
            "no epoch of training in 4 bits was better on held-out rows than the compressed model, which was kept; use another --scale_lr"
        )
    if report_run.chosen_on_test(results):
        warnings.append(
            "the configuration was chosen on the test rows, as published results do; its figure on them is no longer that of unseen rows"
        )
    column, models = report_run.task_column(results), results["models"]
    for row, later, what in (("16bit", "learnt", "the adapters"), ("compressed", "tuned", "tuning in 4 bits")):
        before, after = models.get(row, {}), models.get(later, {})
        if column in before and column in after and after[column] < before[column]:
            warnings.append(
                f"{what} made {report_run.heading(column)} on the test rows worse: {report_run.before_and_after(before, after, column)}"
            )
    return warnings
