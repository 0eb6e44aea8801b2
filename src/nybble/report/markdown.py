"""report.md: everything about one run in Markdown. Names and texts are escaped; see tables.escape_markdown."""

from __future__ import annotations

from dataclasses import dataclass

from nybble.report import ranks
from nybble.report.labels import held_out_loss, ranks_text
from nybble.report.run import (
    LAYER_NOTE,
    changes_text,
    decoder_note,
    decoder_rows,
    layer_rows,
    measured_on,
    memory_text,
    other_rows,
    other_title,
    result_rows,
    schemes_text,
    shows_recovered,
    summary,
    training_title,
    validation_rows,
    versions_text,
)
from nybble.report.tables import Cells, as_markdown, escape_markdown
from nybble.run.results import RunResults, TaskResults

_RECOVERED_NOTE = (
    "Recovered: share of the compression damage recovered by training, (perplexity before training - after) / "
    "(before - 16-bit)."
)


@dataclass(frozen=True)
class _Section:
    """A part of the report: a note, a table, and a note below it; notes can be empty."""

    title: str
    note: str
    cells: Cells
    below: str = ""

    def parts(self, level: str) -> list[str]:
        note, below = ([escape_markdown(text)] if text else [] for text in (self.note, self.below))
        return [f"{level} {escape_markdown(self.title)}", *note, as_markdown(*self.cells), *below]


def run_markdown(results: RunResults, name: str | None = None) -> str:
    """The report of a run.

    Args:
        name: name of the run, where the report is a part of a page about several runs; headings are one level lower.
    """
    level = "#" if name is None else "##"
    title = f"{results.model}: {_title(results)}"
    note = measured_on(results) + (f" {_RECOVERED_NOTE}" if shows_recovered(results) else "")
    schemes = schemes_text(results)
    parts = [
        f"{level} {escape_markdown(title if name is None else f'{name}: {title}')}",
        escape_markdown(summary(results)),
        *([escape_markdown(f"Schemes: {schemes}")] if schemes else []),
        as_markdown(*result_rows(results)),
        escape_markdown(note),
        *(f"**Warning:** {escape_markdown(warning)}" for warning in results.warnings),
    ]
    for section in (
        *_other_domain(results),
        *_trainings(results),
        *_task_sections(results),
        *_layer_sections(results),
        _cost(results),
    ):
        parts += section.parts(f"{level}#")
    command = results.command_line.replace("\n", "\n    ")
    parts += [
        f"{level}# How to repeat this run",
        f"    {command}",
        escape_markdown(f"Seed {results.seed}. {versions_text(results)}"),
    ]
    return "\n\n".join(parts) + "\n"


def _title(results: RunResults) -> str:
    task = "" if results.task is None else f" on {results.task.name}"
    if "lora16" in results.models:
        return f"16-bit LoRA tuning{task}"
    what = "compression" if not results.trains else "distillation" if results.task is None else f"tuning{task}"
    return f"{results.precision} {what} ({results.described_method})"


def _other_domain(results: RunResults) -> list[_Section]:
    cells = other_rows(results)
    return [_Section(other_title(results), "", cells)] if cells[1] else []


def _trainings(results: RunResults) -> list[_Section]:
    note = "" if results.task is None else f"Held-out loss: {held_out_loss(results.task)}."
    return [
        _Section(f"Validation{training_title(results, training)}", note, validation_rows(training))
        for training in results.trainings
        if training.validation
    ]


def _task_sections(results: RunResults) -> list[_Section]:
    task, sections = results.task, []
    if task is None:
        return []
    if task.candidates:
        note = ranks.candidates_note(results, task)
        sections.append(_Section("Configurations", note, ranks.candidate_rows(task), _replacement(task)))
    if task.search is not None:
        note = f"The first {task.search.trials} trials of each sampler. {ranks.search_note(results, task)}"
        sections.append(_Section("Search", note, ranks.search_rows(task.search)))
        if task.search.front:
            sections.append(_Section("Score against sum of ranks", ranks.FRONT_NOTE, ranks.front_rows(task.search)))
    if task.tested:
        sections.append(_Section("Tested configurations", ranks.EVAL_ONLY_NOTE, ranks.eval_only_rows(task)))
    return sections


def _replacement(task: TaskResults) -> str:
    if not task.replaced or task.configuration is None:
        return ""
    return f"The model ships with the ranks {ranks_text(task.configuration)}, {ranks.replacement_text(task)}."


def _layer_sections(results: RunResults) -> list[_Section]:
    sections, decoder = [], decoder_rows(results)
    if decoder[1]:
        sections.append(_Section("Errors per decoder layer", decoder_note(results), decoder))
    if results.layer_errors:
        title = f"Errors per linear layer ({results.described_method})"
        sections.append(_Section(title, LAYER_NOTE, layer_rows(results)))
    return sections


def _cost(results: RunResults) -> _Section:
    """Time and memory, and what training changed for it."""
    stages = results.seconds | {"all": sum(results.seconds.values())}
    below = []
    if memory := memory_text(results):
        below.append(f"Peak memory: {memory}.")
    if results.changes is not None:
        layers = "" if results.layers is None else f" in {results.layers.int4} layers"
        below.append(f"{changes_text(results.changes)}{layers}.")
    cells = ["stage", "seconds"], [[stage, f"{value:.1f}"] for stage, value in stages.items()]
    return _Section("Cost", "", cells, " ".join(below))
