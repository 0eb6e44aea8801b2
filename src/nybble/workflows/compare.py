"""`nybble tune --compare TASK...`: what tuning in 4 bits is worth, in the five columns in which it is published.

    BF16                    the model as it came
    BF16 + LoRA             tuned in 16 bit by the peft library: same places, rows, batch and choice of the epoch, as many epochs as nybble tune takes in all
    INT4, LoRA + PTWC       that model, merged, then compressed by PTWC, the best method without training (docs/log.md; without awq where a family has none)
    INT4, QAT + LoRA        nybble tune with the largest rank of the space alone
    INT4, QAT + NLS         nybble tune with the whole space

Each is a run folder of its own in OUTPUT/TASK, so a comparison goes on where it stopped. Figures are lm-eval's on the task's test rows, with the
standard error of their mean; that of the mean over tasks is the root of the summed squares over the number of tasks.
Most rows are right, or wrong, in all columns, so what a column is better by is known more closely, from the differences row by row.
Several comparisons, of seeds or settings, are put together by `nybble report` (columns.py).
"""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nybble import files
from nybble.console import console
from nybble.errors import MissingExtraError, OptionError, TrainingError
from nybble.evaluation import lm_eval, perplexity
from nybble.models import device, loading
from nybble.models.families import family_of
from nybble.options.commands import CompressionOptions, CompressOptions, ModelOptions, TuneOptions
from nybble.report import five_columns, html, tables
from nybble.report import run as report_run
from nybble.report.five_columns import Compared, Figure
from nybble.run import results, resume
from nybble.workflows import compress, lessons, stages, starts, tune, tuning
from nybble.workflows.lessons import TaskData
from nybble.workflows.stages import Job

log = logging.getLogger("nybble")


def compare(options: TuneOptions) -> Path:
    """Make all five for every task, as far as earlier sittings did not; returns the folder. A training that cannot go on ends its task; the others are made."""
    options.check()
    if importlib.util.find_spec("peft") is None:
        raise MissingExtraError("compare", "the column BF16 + LoRA")
    own = [task for task in options.compare if task.endswith(".jsonl")]
    if own:
        raise OptionError(
            f"--compare takes tasks that lm-eval knows, for one of the columns is compressed and scored without this file; got {own[0]}; use --task"
        )
    if len(set(options.lora_rank_space)) < 2:
        raise OptionError(
            "--compare needs a --lora_rank_space of two or more ranks; its largest alone is the column QAT + LoRA"
        )
    for task in options.compare:
        _check_task(task, options)
    folder = Path(options.output_dir or f"runs/{Path(options.pretrained).name.removesuffix('.gguf')}-compare")
    if not options.overwrite:
        five_columns.check_same(folder, tune.settled(options))
    figures: dict[str, dict[str, Figure]] = {}
    stopped: list[str] = []
    shown: Compared | None = None
    for task in options.compare:
        try:
            figures[Path(task).stem] = _five(
                replace(options, compare=(), task=task, output_dir=None), task, folder / Path(task).stem
            )
        except TrainingError as error:
            stopped.append(str(error))
            log.error("%s", error)
        else:
            found = five_columns.write(folder, tune.settled(options), figures)
            if found != shown:  # of tasks that earlier sittings finished, the tables once
                _show(found)
            shown = found
    if stopped:
        raise TrainingError(
            f"all {len(options.compare)} tasks must be tuned; {len(stopped)} could not: {'; '.join(stopped)}"
        )
    return folder


def tune_or_compare(options: TuneOptions) -> Path:
    """`nybble tune`, with --compare or without."""
    return compare(options) if options.compare else tune.tune(options)


def _check_task(name: str, options: TuneOptions) -> None:
    """Raise now what would be raised after hours."""
    task = lm_eval.open_task(name, options.data_dir, "--compare")
    metric = lm_eval.metric_of(task)
    if not task.has_training_docs():
        raise OptionError(f"--compare takes tasks with a training split; {name} has none")
    if options.loss_on == "choices" and task.OUTPUT_TYPE != "multiple_choice":
        raise OptionError(
            f"--loss_on choices needs tasks with choices; {name} has answers in the model's own words; use --loss_on auto"
        )
    if not metric.startswith(("acc", "exact_match")):
        raise OptionError(
            f"--compare takes tasks that are scored by the share of right answers; {name} is scored by {metric}"
        )


def _five(options: TuneOptions, task: str, folder: Path) -> dict[str, Figure]:
    """The five figures of one task."""

    def run(name: str, **changes: Any) -> TuneOptions:
        path = folder / name
        return replace(options, output_dir=str(path), resume=path.exists() and not options.overwrite, **changes)

    largest = max(options.lora_rank_space)
    nls, lora = run("qat-nls"), run("qat-lora", lora_rank_space=(largest,))
    last = ("tuned", *options.export)[-1]
    _unless_done(nls, tune.tune, last)
    alike = ("16bit",) if options.adapters == "before" else ("16bit", "compressed")
    before = {row: measured for row, measured in results.read_results(nls.folder)["models"].items() if row in alike}
    _unless_done(lora, lambda options: tune.tune(options, before), last)
    full = run("lora", lora_rank_space=(largest,), export=(), epochs=options.epochs + options.scale_passes)
    _unless_done(full, lambda options: tune_16bit(options, before["16bit"]), "lora16")
    same = {
        field.name: getattr(options, field.name)
        for kind in (CompressionOptions, ModelOptions)
        for field in fields(kind)
    }
    tuned = (folder / "lora").resolve()
    compressed = CompressOptions(
        **same | {"pretrained": str(tuned / "merged")},
        data=(str(tuned / "texts"),), data_dir=options.data_dir, seq_len=results.read_results(folder / "lora")["text_length"],
        method=_ptwc(tuned / "merged", options.trust_remote_code), output_dir=str(folder / "ptwc"), seed=options.seed,
        test_samples=options.test_samples, tasks=(task,), task_limit=options.task_limit, eval_batch_size=options.eval_batch_size, export=options.export,
        resume=(folder / "ptwc").exists() and not options.overwrite, overwrite=options.overwrite,
    )  # fmt: skip
    merged = results.read_results(folder / "lora")["models"]["lora16"]
    known = {column: value for column, value in merged.items() if column.startswith(("task:", "documents:", "right:"))}
    _unless_done(compressed, lambda options: compress.compress(options, known), ("compressed", *options.export)[-1])
    shipped = options.export[0] if options.export else None
    return {
        "BF16": _figure(folder / "qat-nls", "16bit"),
        "BF16 + LoRA": _figure(folder / "lora", "lora16"),
        "INT4, LoRA + PTWC": _figure(folder / "ptwc", shipped or "compressed", folder / "qat-nls"),
        "INT4, QAT + LoRA": _figure(folder / "qat-lora", shipped or "tuned"),
        "INT4, QAT + NLS": _figure(folder / "qat-nls", shipped or "tuned"),
    }


def _ptwc(model: Path, trust_remote_code: bool) -> str:
    """The method of the third column."""
    from transformers import AutoConfig

    known = family_of(AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)).feeds
    return five_columns.PTWC if known else five_columns.PTWC_WITHOUT_AWQ


def _unless_done(options: Any, flow: Any, last: str) -> None:
    """A run whose last row is measured is not opened again; RunError if it was made with other options."""
    if options.overwrite or last not in results.read_results(options.folder).get("models", {}):
        log.info("%s", options.folder)
        try:
            flow(options)
        except TrainingError as error:
            raise TrainingError(f"{options.folder}: {error}") from error
        return
    saved = resume.read_options(options.folder)
    if isinstance(options, TuneOptions):
        options = tune.settled(replace(options, start=saved["start"]) if options.start == starts.AUTO else options)
    else:  # its input lies in the comparison itself, which may have been moved
        options = replace(options, pretrained=saved["pretrained"], data=tuple(saved["data"]))
    resume.check_same_options(options.folder, options)


def _figure(run: Path, row: str, named_by: Path | None = None) -> Figure:
    """A run's figure; the metric's name is that of the tuned run, where another kind of run does not say it."""
    column = report_run.task_column(results.read_results(named_by or run))
    measured, task = results.read_results(run)["models"][row], column.removeprefix("task:").split()[0]
    right = measured.get(column.replace("task:", "right:", 1), "")
    return Figure(measured[column], int(measured[f"documents:{task}"]), tuple(map(float, right)))


# --- 16-bit LoRA --------------------------------------------------------------------------------------------------------------


def tune_16bit(options: TuneOptions, before: dict[str, Any]) -> Path:
    """The same tuning of the 16-bit model, by peft; the merged model is written to the run's folder `merged`. `before`: what that model measured."""
    with tune.opened(options, ()) as (job, lesson):
        run = job.run
        run.results["task"] = lessons.described(lesson)
        run.results["text_length"] = job.sequences.test.ids.shape[1]
        run.results["models"].setdefault("16bit", before)
        reference = perplexity.logits_from_states(job.head, stages.teach(job, {"test": job.sequences.test}, 1)["test"])
        merged = run.path / "merged"
        if not merged.exists():
            _train_lora(job, lesson)
            with files.atomic_folder(run.path / "texts") as temporary:
                for split, questions in (
                    ("train", lesson.task.train),
                    ("validation", lesson.task.held_out),
                    ("test", lesson.task.held_out),
                ):
                    texts = [
                        json.dumps({"text": "".join(question.pairs[question.gold])}) + "\n" for question in questions
                    ]
                    files.write_text(temporary / f"{split}.jsonl", "".join(texts))
            with files.atomic_folder(merged) as temporary:
                job.loaded.model.save_pretrained(temporary)
                job.loaded.tokenizer.save_pretrained(temporary)
        dtype = job.loaded.model.dtype
        job.loaded.model.to("meta")  # frees the weights
        loaded = loading.load(str(merged), dtype, device.pick_device(options.device), options.trust_remote_code)
        size = 2 * sum(p.numel() for p in loaded.model.parameters())
        stages.measure(job, reference, "lora16", loaded.model, loaded.tokenizer, size)
        stages.finish(run, [])
        return run.path


def peft_config(model: Any, layers: Sequence[str], rank: int) -> Any:
    """Adapters where nybble has its own, scaled by 2 as those, and clamped in narrower layers as those: the same budget."""
    import peft

    widths = {name: min(model.get_submodule(name).weight.shape) for name in layers}
    narrow = {name: width for name, width in widths.items() if width < rank}
    alphas = {name: 2 * width for name, width in narrow.items()}
    return peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules=list(layers),
        bias="none",
        rank_pattern=narrow,
        alpha_pattern=alphas,
    )


def _train_lora(job: Job, lesson: TaskData) -> None:
    """Adapters of peft on every layer that would get 4 bits, trained and merged, in place."""
    import peft

    rank, model = max(lesson.space), job.loaded.model
    config = peft_config(model, list(job.plan.int4), rank)
    torch.manual_seed(job.options.seed)
    wrapped = peft.get_peft_model(model, config)  # puts its layers into `model` itself
    adapters: dict[str, nn.Parameter] = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    log.info("16-bit LoRA by peft: %d adapters of rank %d, scaled by 2", len(adapters) // 2, rank)
    groups = [{"params": adapters, "lr": job.options.lr, "weight_decay": job.options.weight_decay}]
    with lessons.plain_attention(job, lesson):
        tuning.train(job.run, job.options, groups, lessons.course(job, lesson, {}))
    wrapped.merge_and_unload()


# --- what people read ---------------------------------------------------------------------------------------------------------


def _show(found: Compared) -> None:
    """The tables as Markdown and as a page beside compare.json, and in the terminal."""
    read, folder = five_columns.together([found]), found.folder
    files.write_text(folder / "compare.md", read.markdown())
    if html.available():
        files.write_text(folder / "compare.html", read.html())
    for table in read.tables:
        console.print(tables.as_table(*table))
    console.print(read.note, highlight=False)
    console.print(
        f"{folder}/compare.md, {five_columns.FILE}" + (", compare.html" if html.available() else ""), highlight=False
    )
