"""One or several comparisons of `nybble compare` as tables, notes and a page.

Of comparisons that differ only in their seed the mean is shown, row by row. Of different settings the best is shown,
per task and column, as published figures are chosen; the note says so.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nybble.errors import OptionError
from nybble.report import html
from nybble.report.figures import Figure, Figures, mean_figure, mean_of
from nybble.report.five_columns import COLUMNS, LORA_RUN, NLS_RUN, ColumnComparison, setting_text
from nybble.report.tables import Cells, as_markdown, escape_markdown
from nybble.run.results import RunResults, has_results, read_results

# Comparisons of one model with one setting, which differ in seed or tasks.
_Setting = list[ColumnComparison]


@dataclass(frozen=True)
class CombinedComparison:
    """Comparisons, combined for people to read.

    Attributes:
        title: the models.
        tables: figures by task; differences of the last column; of several comparisons also the means of each.
        note: what the figures are.
        runs: name -> results of the tuned runs.
    """

    title: str
    tables: Sequence[Cells]
    note: str
    figures: Figures
    runs: Mapping[str, RunResults]

    def markdown(self) -> str:
        """Title, tables and note."""
        tables = (as_markdown(*table) for table in self.tables)
        return "\n\n".join([f"# {escape_markdown(self.title)}", *tables, escape_markdown(self.note)]) + "\n"

    def html(self) -> str:
        """The page.

        Raises:
            MissingExtraError: matplotlib or Jinja is not installed.
        """
        return html.columns_page(self.title, self.tables, self.note, self.figures, self.runs)


def combine(comparisons: Sequence[ColumnComparison]) -> CombinedComparison:
    """Combine comparisons.

    Raises:
        OptionError: two of them have the same model, setting, seed and task.
    """
    settings = _group_by_setting(comparisons)
    figures = _best_figures(comparisons, settings)
    tables = [figure_rows(figures), difference_rows(figures)]
    if len(comparisons) > 1:
        tables.append(_mean_rows(comparisons))
    models = dict.fromkeys(one.model for one in comparisons)
    return CombinedComparison(", ".join(models), tables, _note(comparisons, settings), figures, _runs(comparisons))


def _group_by_setting(comparisons: Sequence[ColumnComparison]) -> list[_Setting]:
    settings: list[_Setting] = []
    for one in comparisons:
        members = next((s for s in settings if (s[0].model, s[0].setting) == (one.model, one.setting)), None)
        if members is None:
            settings.append(members := [])
        for other in members:
            if other.seed == one.seed and other.figures.keys() & one.figures.keys():
                raise OptionError(
                    f"comparisons must differ in model, options, seed or tasks; {other.folder} and {one.folder} do "
                    "not; name one of them"
                )
        members.append(one)
    return settings


def _best_figures(
    comparisons: Sequence[ColumnComparison], settings: Sequence[_Setting]
) -> dict[str, dict[str, Figure]]:
    """Task -> column -> the mean over seeds of the setting with the best mean; with several models, "MODEL TASK"."""
    models = list(dict.fromkeys(one.model for one in comparisons))
    figures = {}
    for model in models:
        own = [members for members in settings if members[0].model == model]
        for task in _tasks(one for one in comparisons if one.model == model):
            seeds = [[one.figures[task] for one in members if task in one.figures] for members in own]
            means = [
                {column: mean_figure([row[column] for row in rows]) for column in COLUMNS} for rows in seeds if rows
            ]
            name = task if len(models) == 1 else f"{Path(model).name} {task}"
            figures[name] = {
                column: max((row[column] for row in means), key=lambda figure: figure.value) for column in COLUMNS
            }
    return figures


def _tasks(comparisons: Iterable[ColumnComparison]) -> list[str]:
    return list(dict.fromkeys(task for one in comparisons for task in one.figures))


def _runs(comparisons: Sequence[ColumnComparison]) -> dict[str, RunResults]:
    """Name -> results of the runs of nybble tune."""
    runs = {}
    for one in comparisons:
        for task in one.figures:
            for name in (NLS_RUN, LORA_RUN):
                folder = one.folder / task / name
                prefix = f"{one.folder.resolve().name}/" if len(comparisons) > 1 else ""
                if has_results(folder):
                    runs[f"{prefix}{task}/{name}"] = read_results(folder)
    return runs


def figure_rows(figures: Figures) -> Cells:
    """A row per task with value and standard error of every column, then the mean, in percent."""
    values = {task: [(row[column].value, row[column].error) for column in COLUMNS] for task, row in figures.items()}
    return ["task", *COLUMNS], _percent_rows(values, "")


def difference_rows(figures: Figures) -> Cells:
    """A row per task with the differences of the last column to each of the others, then the mean, in percent."""
    *others, last = COLUMNS
    values = {task: [row[last].minus(row[column]) for column in others] for task, row in figures.items()}
    return [f"{last}, minus", *others], _percent_rows(values, "+")


def _percent_rows(values: Mapping[str, list[tuple[float, float]]], sign: str) -> list[list[str]]:
    """Rows of values and their standard errors; of several tasks also the mean."""
    rows = dict(values)
    if len(values) > 1:
        rows["mean"] = [mean_of(column) for column in zip(*values.values(), strict=True)]

    def cell(value: float, error: float) -> str:
        return f"{100 * value:{sign}.1f}" + ("" if math.isnan(error) else f" +- {100 * error:.1f}")

    return [[task, *(cell(*value) for value in row)] for task, row in rows.items()]


def _mean_rows(comparisons: Sequence[ColumnComparison]) -> Cells:
    """A row per comparison with the means over its tasks, in percent."""
    rows = []
    for one in comparisons:
        means = (statistics.fmean(row[column].value for row in one.figures.values()) for column in COLUMNS)
        rows.append([one.folder.resolve().name, *(f"{100 * mean:.1f}" for mean in means)])
    return ["mean over its tasks", *COLUMNS], rows


def _note(comparisons: Sequence[ColumnComparison], settings: Sequence[_Setting]) -> str:
    """What the figures are."""
    sentences = [
        f"Percent of the {_rows(comparisons)} that were right, with standard errors.",
        "The second table has the differences row by row.",
    ]
    if all(one.setting["select_on"] == "held_out" for one in comparisons):
        sentences.append("Epochs and ranks were chosen on held-out rows.")
    else:
        sentences.append(
            "Epochs were chosen on held-out rows, ranks on the TEST rows, as in published results: the last column is "
            "no score on unseen rows."
        )
    sentences += [
        f"The first two columns were computed in {_distinct(one.dtype for one in comparisons)}.",
        f"PTWC (post-training weight compression): {_distinct(one.ptwc for one in comparisons)}.",
        f"QAT (quantization-aware training): {_distinct(_qat(one.setting) for one in comparisons)}.",
        f"Loss on: {_objectives(comparisons)}.",
        _seeds(comparisons, settings),
    ]
    if any(one.setting.get("rank_sampling") == "sandwich" for one in comparisons):
        sentences.append(
            "The adapters of the last column were trained on three configurations per step, at three times the "
            "computation of the other columns."
        )
    counts = [sum(other[0].model == members[0].model for other in settings) for members in settings]
    if max(counts) > 1:
        sentences.append(
            f"Each figure is the best of {max(counts)} settings ({_changed_options(comparisons)}), chosen by the same "
            "test rows, as in published results: it is no score on unseen rows."
        )
    return " ".join(sentences)


def _rows(comparisons: Sequence[ColumnComparison]) -> str:
    """Which test rows were scored."""
    limits = {one.setting.get("limit") for one in comparisons}
    if limits == {None}:
        return "test rows"
    counts = [f"first {limit} test rows (--limit)" for limit in sorted(limit for limit in limits if limit is not None)]
    return " or ".join([*counts, *(["all test rows"] if None in limits else [])])


def _distinct(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _qat(setting: Mapping[str, Any]) -> str:
    """How the last two columns were trained."""
    init = setting.get("init_from") or setting["method"]
    if setting["quantize"] == "after":
        return f"adapters on 16-bit weights, then {init}, then scales and norms in INT4"
    return f"adapters inside the rounding, initialized by {init}"


def _objectives(comparisons: Sequence[ColumnComparison]) -> str:
    tasks: dict[str, set[str]] = {}
    for one in comparisons:
        for task, objective in one.objectives.items():
            tasks.setdefault(objective, set()).add(task)
    if len(tasks) == 1:
        return next(iter(tasks))
    return ", ".join(f"{objective} ({', '.join(sorted(names))})" for objective, names in tasks.items())


def _seeds(comparisons: Sequence[ColumnComparison], settings: Sequence[_Setting]) -> str:
    """The seed, or how many seeds the figures are means of; seeds are counted per task."""
    counts = {sum(task in one.figures for one in members) for members in settings for task in _tasks(members)}
    if counts == {1}:
        return f"Seed {_distinct(str(one.seed) for one in comparisons)}."
    count = str(min(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    return f"Means of {count} seeds; the standard errors are those of the rows and do not include the spread of seeds."


def _changed_options(comparisons: Sequence[ColumnComparison]) -> str:
    """The options that differ between settings, with their values."""
    first = comparisons[0].setting
    names = dict.fromkeys(name for one in comparisons for name in one.setting)
    changed = [name for name in names if any(one.setting.get(name) != first.get(name) for one in comparisons)]
    values = (_distinct(setting_text(one.setting.get(name)) for one in comparisons) for name in changed)
    return "; ".join(f"--{name} {value}" for name, value in zip(changed, values, strict=True))
