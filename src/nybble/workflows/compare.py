"""`nybble compare`: what tuning in INT4 is worth, in the five columns in which it is published.

    BF16                    the model as it came
    BF16 + LoRA             tuned in 16 bit by the peft library, for as many epochs as nybble tune trains in all
    INT4, LoRA + PTWC       that model, merged, then compressed by the best method that trains nothing
    INT4, QAT + LoRA        nybble tune with the largest rank of the space alone
    INT4, QAT + NLS         nybble tune with the whole space

Each is a run folder in OUTPUT/TASK, so a comparison continues where it stopped. The same command may be started several
times at once, once for each GPU: each process makes columns that no other one makes, and waits for the others at the
end. Figures are lm-eval's on the task's
test rows, with the standard error of their mean. Most rows are right, or wrong, in all columns, so the difference
between two columns is known more precisely, from the differences row by row.
"""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from nybble.callbacks import Callback
from nybble.compression.methods import automatic_method
from nybble.console import console, say
from nybble.errors import MissingExtraError, OptionError, RunError, TrainingError
from nybble.evaluation.lm_eval import main_metric, open_task
from nybble.export.base import EXPORTERS
from nybble.export.checks import ALL
from nybble.files import write_text
from nybble.models.selection import select_layers
from nybble.nls.ranks import parse_rank_space
from nybble.options.commands import CompareOptions, CompressOptions, RunCommand, TuneOptions
from nybble.report import five_columns, html
from nybble.report.combine import combine
from nybble.report.figures import Figure
from nybble.report.five_columns import LORA16_RUN, LORA_RUN, NLS_RUN, PTWC_RUN, ColumnComparison
from nybble.report.tables import as_table
from nybble.run.claims import claimed
from nybble.run.complete import MERGED, TEXTS
from nybble.run.results import has_results, read_results
from nybble.run.resume import check_same_options, saved_options
from nybble.tasks.sources import is_scored_by_lm_eval
from nybble.workflows import lora, plan
from nybble.workflows.compress import compress
from nybble.workflows.measure import SIXTEEN_BIT
from nybble.workflows.task_run import with_task
from nybble.workflows.tune import tune

log = logging.getLogger("nybble")

# In the order in which one process makes them. The last needs the one before.
_RUNS = (NLS_RUN, LORA_RUN, LORA16_RUN, PTWC_RUN)
_LOOK_EVERY = 2.0  # seconds between two looks at what other processes make


def compare(options: CompareOptions, callbacks: Sequence[Callback] = ()) -> Path:
    """Make all five columns for every task, as far as earlier sessions did not; returns the folder.

    A training that cannot continue ends its task; the other tasks are made.

    Raises:
        NybbleError: whatever a person can repair.
    """
    options.check()
    options = options.replace(lora_rank_space=parse_rank_space(options.ranks.lora_rank_space))
    _check(options)
    folder = options.folder
    if not options.run.overwrite:
        with claimed(folder / five_columns.FILE, wait=True):
            five_columns.check_same_setting(folder, options)
            five_columns.note_setting(folder, options)
    comparisons = {task: _TaskComparison(options, task, folder / task, callbacks) for task in options.task.tasks}
    with ExitStack() as stack:
        for path in (path for comparison in comparisons.values() for path in comparison.paths):
            if options.run.overwrite and not stack.enter_context(claimed(path)):
                raise RunError(
                    f"--overwrite must be given to one process alone; another one makes {path}; wait for it, or choose "
                    "another --output_dir"
                )
        if options.run.overwrite:
            five_columns.note_setting(folder, options)
        stopped = _make_and_show(options, comparisons)
    if stopped:
        raise TrainingError(
            f"all {len(options.task.tasks)} tasks must be tuned; {len(stopped)} could not: {'; '.join(stopped)}"
        )
    return folder


def _make_and_show(options: CompareOptions, comparisons: Mapping[str, _TaskComparison]) -> list[str]:
    """Make all columns together with the other processes that make this comparison; why trainings of tasks stopped."""
    figures: dict[str, dict[str, Figure]] = {}
    stopped: list[str] = []
    shown: ColumnComparison | None = None
    waiting, said = dict(comparisons), False
    while waiting:
        for task, comparison in tuple(waiting.items()):
            try:
                comparison.make_free_columns()
            except TrainingError as error:
                stopped.append(str(error))
                log.error("%s", error)
                del waiting[task]
                continue
            if comparison.missing:
                continue
            del waiting[task]
            figures[task] = comparison.figures()
            with claimed(options.folder / five_columns.FILE, wait=True):
                written = five_columns.write_comparison(options.folder, options, figures)
            if written != shown:  # tasks that earlier sessions finished are shown once
                _show(written)
            shown = written
        if waiting:
            if not said:
                names = [name for comparison in waiting.values() for name in comparison.missing]
                log.info("waiting for other processes, which make %s", ", ".join(names))
            said = True
            time.sleep(_LOOK_EVERY)
    return stopped


def _check(options: CompareOptions) -> None:
    """Raise now what would otherwise be raised after hours."""
    if importlib.util.find_spec("peft") is None:
        raise MissingExtraError("compare", "the column BF16 + LoRA")
    _check_measurable(options.evaluation.export)
    own = [task for task in options.task.tasks if not is_scored_by_lm_eval(task)]
    if own:
        raise OptionError(
            "--tasks takes tasks that lm-eval knows, because one of the columns is compressed and scored without the "
            f"rows of the task; got {own[0]}; use nybble tune --task"
        )
    if len(options.ranks.lora_rank_space) < 2:
        raise OptionError(
            "--lora_rank_space must have two or more ranks for a comparison; its largest alone is the column QAT + LoRA"
        )
    for name in options.task.tasks:
        task = open_task(name, options.task.data_dir, "--tasks")
        metric = main_metric(task)
        if not task.has_training_docs():
            raise OptionError(f"--tasks takes tasks with a training split; {name} has none")
        if options.task.objective == "choices" and task.OUTPUT_TYPE != "multiple_choice":
            raise OptionError(f"--objective choices needs tasks with choices; {name} has none; use --objective auto")
        if not metric.startswith(("acc", "exact_match")):
            raise OptionError(
                f"--tasks takes tasks that are scored by the share of right answers; {name} is scored by {metric}"
            )


def _check_measurable(formats: Sequence[str]) -> None:
    """Raise OptionError for formats whose measured row the table could not have."""
    if ALL in formats:
        raise OptionError(f"--export of nybble compare must name one format, which is measured; got {ALL}")
    for name in formats:
        if slow := EXPORTERS.get(name, "--export").too_slow():
            raise OptionError(f"--export of nybble compare must name a format that can be measured; {slow}; got {name}")


class _TaskComparison:
    """The five columns of one task, each a run folder inside `folder`."""

    def __init__(self, options: CompareOptions, task: str, folder: Path, callbacks: Sequence[Callback]) -> None:
        self.options, self.task, self.folder, self.callbacks = options, task, folder, callbacks
        self.finished: set[str] = set()

    @property
    def paths(self) -> list[Path]:
        """The run folders."""
        return [self.folder / name for name in _RUNS]

    @property
    def missing(self) -> list[str]:
        """The columns that are not known to be finished, as TASK/COLUMN."""
        return [f"{self.task}/{name}" for name in _RUNS if name not in self.finished]

    def make_free_columns(self) -> None:
        """Finish the columns that no other process makes."""
        make = {NLS_RUN: self._nls, LORA_RUN: self._plain_lora, LORA16_RUN: self._lora16, PTWC_RUN: self._ptwc}
        for name in _RUNS:
            # What is overwritten was claimed at the start.
            with nullcontext(True) if self.options.run.overwrite else claimed(self.folder / name) as free:
                ready = name != PTWC_RUN or LORA16_RUN in self.finished
                if free and ready and name not in self.finished:
                    make[name]()
                    self.finished.add(name)

    @property
    def _shipped(self) -> str | None:
        formats = self.options.evaluation.export
        return formats[0] if formats else None

    def _nls(self) -> None:
        options = self._tune_options(NLS_RUN)
        self._unless_done(options, self._shipped or "tuned", lambda: tune(options, self.callbacks))

    def _plain_lora(self) -> None:
        options = self._tune_options(LORA_RUN, lora_rank_space=self._largest)
        # With --quantize during, the compressed model is the same too.
        known = self._measured(SIXTEEN_BIT, *(("compressed",) if self.options.training.quantize == "during" else ()))
        self._unless_done(options, self._shipped or "tuned", lambda: tune(options, self.callbacks, known))

    def _lora16(self) -> None:
        training = self.options.training
        epochs = training.epochs + training.scale_training_epochs
        options = self._tune_options(LORA16_RUN, lora_rank_space=self._largest, export=(), epochs=epochs)
        known = self._measured(SIXTEEN_BIT)
        self._unless_done(options, "lora16", lambda: lora.tune_16bit(options, known, self.callbacks))

    def _ptwc(self) -> None:
        options, known = self._compress_options(self.folder / LORA16_RUN)
        self._unless_done(options, self._shipped or "compressed", lambda: compress(options, self.callbacks, known))

    @property
    def _largest(self) -> tuple[int]:
        return (max(self.options.ranks.lora_rank_space),)

    def _measured(self, *rows: str) -> dict[str, dict[str, Any]]:
        """Rows of the model before it is tuned, as far as the column with the whole rank space has measured them."""
        models = read_results(self.folder / NLS_RUN).models
        return {row: models[row] for row in rows if row in models}

    def figures(self) -> dict[str, Figure]:
        """Column -> figure, once all are made."""
        shipped = self._shipped
        return {
            "BF16": self._figure(NLS_RUN, SIXTEEN_BIT),
            "BF16 + LoRA": self._figure(LORA16_RUN, "lora16"),
            "INT4, LoRA + PTWC": self._figure(PTWC_RUN, shipped or "compressed"),
            "INT4, QAT + LoRA": self._figure(LORA_RUN, shipped or "tuned"),
            "INT4, QAT + NLS": self._figure(NLS_RUN, shipped or "tuned"),
        }

    def _place(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        return {"output_dir": str(path), "resume": path.exists() and not self.options.run.overwrite}

    def _tune_options(self, name: str, **changes: Any) -> TuneOptions:
        known = TuneOptions.fields()
        values = {key: value for key, value in self.options.flat().items() if key in known}
        return TuneOptions.of(**values | {"task": self.task} | self._place(name) | changes)

    def _compress_options(self, tuned: Path) -> tuple[CompressOptions, dict[str, Any]]:
        """Options that compress the merged 16-bit model, and what that model has measured on the task."""
        known = CompressOptions.fields()
        values = {key: value for key, value in self.options.flat().items() if key in known}
        results = read_results(tuned)
        assert results.task is not None, "the run of 16-bit LoRA has results of its task"
        merged = (tuned / MERGED).resolve()
        values |= {
            "pretrained": str(merged),
            "data": (str((tuned / TEXTS).resolve()),),
            "seq_len": results.task.text_length,
            "method": self._untrained_method(merged),
            "eval_tasks": (self.task,),
        }
        measured = results.models["lora16"]
        columns = ("task:", "documents:", "right:")
        known_figures = {column: value for column, value in measured.items() if column.startswith(columns)}
        return CompressOptions.of(**values | self._place(PTWC_RUN)), known_figures

    def _untrained_method(self, merged: Path) -> str:
        """The best method that trains nothing, whatever --method is."""
        if not self.options.run.overwrite and has_results(self.folder / PTWC_RUN):
            return str(saved_options(self.folder / PTWC_RUN)["method"])
        model = plan.load_model(replace(self.options.model, pretrained=str(merged))).model
        return automatic_method(model, select_layers(model).linears)

    def _unless_done(self, options: RunCommand, last: str, make: Callable[[], Path]) -> None:
        """Make a run unless its last row is measured; RunError if it was made with other options."""
        if self.options.run.overwrite or last not in read_results(options.folder).models:
            log.info("%s", options.folder)
            try:
                make()
            except TrainingError as error:
                raise TrainingError(f"{options.folder}: {error}") from error
            return
        saved = saved_options(options.folder)
        options = plan.keep_saved_choices(options)
        if isinstance(options, TuneOptions):
            options = with_task(options)
        else:  # its input lies in the comparison itself, which may have been moved
            options = options.replace(**{name: saved[name] for name in ("pretrained", "data") if name in saved})
        check_same_options(options.folder, options)

    def _figure(self, name: str, row: str) -> Figure:
        """A run's figure in the metric of the tuned run."""
        task = read_results(self.folder / NLS_RUN).task
        assert task is not None, "a run of tune has results of its task"
        measured = read_results(self.folder / name).models[row]
        right = measured.get(task.column.replace("task:", "right:", 1), "")
        return Figure(measured[task.column], int(measured[f"documents:{task.name}"]), tuple(map(float, right)))


def _show(comparison: ColumnComparison) -> None:
    """The tables as Markdown and as a page beside compare.json, and in the terminal."""
    combined, folder = combine([comparison]), comparison.folder
    write_text(folder / "compare.md", combined.markdown())
    page = html.can_draw()
    if page:
        write_text(folder / "compare.html", combined.html())
    for table in combined.tables:
        console.print(as_table(*table))
    say(combined.note)
    say(f"{folder}/compare.md, {five_columns.FILE}" + (", compare.html" if page else ""))
