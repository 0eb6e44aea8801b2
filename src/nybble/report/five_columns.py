"""What `nybble tune --compare` found, one comparison or several -> tables and a page.

A comparison is a folder with compare.json. Several are put together: of those that differ in nothing but their seed the mean counts, row by row; of
different settings the best for each task and column, as published figures are chosen, and the note says so.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nybble import files
from nybble.errors import OptionError, RunError
from nybble.options.commands import TuneOptions
from nybble.report import html as report_html
from nybble.report import run
from nybble.report import tables as report_tables
from nybble.run import results as run_results

FILE = "compare.json"
COLUMNS = ("BF16", "BF16 + LoRA", "INT4, LoRA + PTWC", "INT4, QAT + LoRA", "INT4, QAT + NLS")
# What the third column is compressed by, whatever --start is: the best method that trains nothing (docs/log.md), as far as a family has it.
PTWC, PTWC_WITHOUT_AWQ = "awq+se+gptq", "se+gptq"
# Of the runs of a task, those that a page shows.
TUNED = ("qat-nls", "qat-lora")
# Options that say where things lie, or how fast; and those that every run of a comparison has its own value of.
_NO_SETTING = (
    "pretrained", "output_dir", "data_dir", "resume", "overwrite", "tensorboard", "save_every", "seed", "compare", "task", "tasks",
    "custom_rank_config", "eval_only", "fast_eval", "eval_batch_size", "microbatch", "cache", "device", "trust_remote_code", "test_samples",
)  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """A task's metric on its test rows.

    Attributes:
        documents: rows.
        right: of each row 1 or 0, or the share of the seeds that had it right; empty where that is not known.
    """

    value: float
    documents: int
    right: tuple[float, ...] = ()

    @property
    def error(self) -> float:
        """Standard error of the mean over rows: sqrt(p (1 - p) / (n - 1)) of zeros and ones."""
        return (
            run.standard_error(self.right)
            if self.right
            else math.sqrt(self.value * (1 - self.value) / max(self.documents - 1, 1))
        )

    def less(self, other: Figure) -> tuple[float, float]:
        """Difference to another figure of the same rows, and its standard error; the error is nan where rows are not known."""
        if not self.right or len(self.right) != len(other.right):
            return self.value - other.value, math.nan
        each = [mine - theirs for mine, theirs in zip(self.right, other.right, strict=True)]
        return statistics.fmean(each), run.standard_error(each)


Figures = Mapping[str, Mapping[str, Figure]]  # task -> column -> figure


@dataclass(frozen=True)
class Compared:
    """One comparison.

    Attributes:
        folder: where it lies.
        setting: the options that its seeds have in common.
        dtype: of the first two columns.
        ptwc: what the third column is compressed by.
        learnt: task -> what the loss was on.
    """

    folder: Path
    model: str
    seed: int
    setting: dict[str, Any]
    dtype: str
    ptwc: str
    learnt: Mapping[str, str]
    figures: Figures


def setting_of(options: TuneOptions) -> dict[str, Any]:
    """The options that all seeds of a comparison have in common, as compare.json has them."""
    found: dict[str, Any] = json.loads(
        json.dumps({key: value for key, value in asdict(options).items() if key not in _NO_SETTING})
    )
    return found


def check_same(folder: Path, options: TuneOptions) -> None:
    """Raise RunError, naming the option, if the folder has a comparison with others: that one would be lost."""
    try:
        earlier = read(folder)
    except RunError:  # none yet, or of another version
        return
    before = {"pretrained": earlier.model, "seed": earlier.seed} | earlier.setting
    now = {"pretrained": options.pretrained, "seed": options.seed} | setting_of(options)
    for key in now:
        if before.get(key) != now[key]:
            raise RunError(
                f"{folder} has a comparison of {', '.join(earlier.figures)} with --{key} {_readable(before.get(key))}; got {_readable(now[key])}; "
                "give each its own --output_dir, or --overwrite"
            )


def write(folder: Path, options: TuneOptions, figures: Figures) -> Compared:
    """Save compare.json, from the figures and what the runs say of themselves; returns what was saved. Other tasks that were compared there before, in the same
    setting, stay in it."""
    setting = setting_of(options)
    with suppress(RunError):  # none yet, or of another version
        earlier = read(folder)
        if (earlier.model, earlier.seed, earlier.setting) == (options.pretrained, options.seed, setting):
            figures = {
                task: row
                for task, row in earlier.figures.items()
                if (folder / task / TUNED[0] / run_results.RESULTS).is_file()
            } | dict(figures)
    results = {task: run_results.read_results(folder / task / TUNED[0]) for task in figures}
    found = {
        "model": options.pretrained,
        "seed": options.seed,
        "dtype": next(iter(results.values()))["dtype"],
        "ptwc": run_results.read_results(folder / next(iter(figures)) / "ptwc").get("method", PTWC),
        "setting": setting,
        "learnt": {task: of["task"].get("loss_on", options.loss_on) for task, of in results.items()},
        "figures": {
            task: {
                column: {
                    "value": one.value,
                    "error": one.error,
                    "documents": one.documents,
                    "right": "".join(f"{row:.0f}" for row in one.right),
                }
                for column, one in row.items()
            }
            for task, row in figures.items()
        },
    }
    files.write_text(folder / FILE, json.dumps(found, indent=2) + "\n")
    return read(folder)


def read(folder: Path) -> Compared:
    """A comparison; RunError where the folder has none, or one that cannot be read."""
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
        figures = {
            task: {
                column: Figure(row[column]["value"], row[column]["documents"], tuple(map(float, row[column]["right"])))
                for column in COLUMNS
            }
            for task, row in found["figures"].items()
        }
        return Compared(
            folder,
            found["model"],
            found["seed"],
            found["setting"],
            found["dtype"],
            found.get("ptwc", PTWC),
            found["learnt"],
            figures,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{folder / FILE} must be written by this version of nybble tune --compare; it is not ({type(error).__name__}: {error}); "
            "the same command again writes it, and makes no finished run twice"
        ) from error


@dataclass(frozen=True)
class Together:
    """Comparisons, put together: what people read.

    Attributes:
        tables: headings and rows: figures by task, what the last column is better by, and of several comparisons the means of each.
    """

    title: str
    tables: Sequence[tuple[list[str], list[list[str]]]]
    note: str
    figures: Figures
    runs: Mapping[str, dict[str, Any]]

    def markdown(self) -> str:
        return (
            f"# {self.title}\n\n"
            + "\n\n".join(report_tables.as_markdown(*table) for table in self.tables)
            + f"\n\n{self.note}\n"
        )

    def html(self) -> str:
        bars = {
            task: {column: (figure.value, figure.error) for column, figure in row.items()}
            for task, row in self.figures.items()
        }
        return report_html.tasks_page(self.title, self.tables, self.note, bars, self.runs)


def together(compared: Sequence[Compared]) -> Together:
    """Put comparisons together; OptionError where two are of the same setting, seed and task."""
    settings: list[tuple[Any, list[Compared]]] = []
    for one in compared:
        key = (one.model, one.setting)
        same = next((members for found, members in settings if found == key), None)
        if same is None:
            settings.append((key, same := []))
        for other in same:
            if other.seed == one.seed and other.figures.keys() & one.figures.keys():
                raise OptionError(
                    f"comparisons must differ in seed, setting, model or tasks; {other.folder} and {one.folder} do not; name one of them"
                )
        same.append(one)
    models = list(dict.fromkeys(one.model for one in compared))
    figures: dict[str, dict[str, Figure]] = {}
    for model in models:
        for task in dict.fromkeys(task for one in compared if one.model == model for task in one.figures):
            groups = [
                [one.figures[task] for one in members if task in one.figures]
                for (of, _), members in settings
                if of == model
            ]
            found = [{column: _mean([row[column] for row in rows]) for column in COLUMNS} for rows in groups if rows]
            best = {column: max((row[column] for row in found), key=lambda figure: figure.value) for column in COLUMNS}
            figures[task if len(models) == 1 else f"{Path(model).name} {task}"] = best
    tables = [rows(figures), differences(figures)]
    if len(compared) > 1:
        lines = [
            [
                one.folder.resolve().name,
                *(f"{100 * statistics.fmean(row[c].value for row in one.figures.values()):.1f}" for c in COLUMNS),
            ]
            for one in compared
        ]
        tables.append((["mean over its tasks", *COLUMNS], lines))
    several = len(compared) > 1
    runs = {
        f"{one.folder.resolve().name}/{task}/{name}" if several else f"{task}/{name}": run_results.read_results(
            one.folder / task / name
        )
        for one in compared
        for task in one.figures
        for name in TUNED
        if (one.folder / task / name / run_results.RESULTS).is_file()
    }
    return Together(", ".join(models), tables, _note(compared, [members for _, members in settings]), figures, runs)


def _mean(figures: Sequence[Figure]) -> Figure:
    """Of one setting, over its seeds; row by row where all know the same rows."""
    known = len({len(figure.right) for figure in figures}) == 1
    right = tuple(map(statistics.fmean, zip(*(figure.right for figure in figures), strict=True))) if known else ()
    return Figure(statistics.fmean(figure.value for figure in figures), figures[0].documents, right)


def _note(compared: Sequence[Compared], settings: Sequence[Sequence[Compared]]) -> str:
    """What the figures are."""
    honest = all(one.setting["select_on"] == "held_out" for one in compared)
    losses: dict[str, set[str]] = {}
    for one in compared:
        for task, loss in one.learnt.items():
            losses.setdefault(loss, set()).add(task)
    learnt = (
        next(iter(losses))
        if len(losses) == 1
        else ", ".join(f"{loss} ({', '.join(sorted(tasks))})" for loss, tasks in losses.items())
    )
    text = (
        "Percent of the test rows that were right, and its standard error; in the second table, differences row by row. "
        "Epochs were chosen on held-out rows, ranks "
        + (
            "too."
            if honest
            else "on the TEST rows, as published results do: the last column is not one on unseen rows."
        )
        + f" The first two columns are computed in {', '.join(dict.fromkeys(one.dtype for one in compared))}."
        + f" PTWC: {', '.join(dict.fromkeys(one.ptwc for one in compared))};"
        + f" QAT: {', '.join(dict.fromkeys(_qat(one.setting) for one in compared))}. Loss on: {learnt}."
    )
    seeds = {
        sum(task in one.figures for one in members)
        for members in settings
        for task in dict.fromkeys(task for one in members for task in one.figures)
    }
    if seeds == {1}:
        text += f" Seed {', '.join(dict.fromkeys(str(one.seed) for one in compared))}."
    else:
        count = str(min(seeds)) if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"
        text += f" Means of {count} seeds; the errors are those of the rows, and know nothing of other seeds."
    if any(one.setting.get("sampling") == "sandwich" for one in compared):
        text += " The last column's adapters were trained on three configurations a step, three times the computation of the others'."
    most = max(sum(other[0].model == members[0].model for other in settings) for members in settings)
    if most > 1:
        first = compared[0].setting
        changed = [
            key
            for key in dict.fromkeys(key for one in compared for key in one.setting)
            if any(one.setting.get(key) != first.get(key) for one in compared)
        ]
        values = (", ".join(dict.fromkeys(_readable(one.setting.get(key)) for one in compared)) for key in changed)
        differ = "; ".join(f"--{key} {value}" for key, value in zip(changed, values, strict=True))
        text += f" Each figure is the best of {most} settings ({differ}) on these very rows, as published figures are: none is one on unseen rows."
    return text


def _qat(setting: Mapping[str, Any]) -> str:
    """How the last two columns were tuned."""
    start = setting["start"]
    return (
        f"adapters in 16 bit, then {start}, then scales and norms in 4 bits"
        if setting.get("adapters") == "before"
        else f"adapters inside the rounding, from {start}"
    )


def _readable(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def rows(figures: Figures) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: a task each, then the mean."""
    return _table(
        COLUMNS,
        {task: [(found[column].value, found[column].error) for column in COLUMNS] for task, found in figures.items()},
    )


def differences(figures: Figures) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: what the last column is better by than each of the others, row by row."""
    *others, last = COLUMNS
    return _table(
        others,
        {task: [found[last].less(found[column]) for column in others] for task, found in figures.items()},
        f"{last}, less",
        "+",
    )


def _table(
    columns: Sequence[str], values: Mapping[str, list[tuple[float, float]]], heading: str = "task", sign: str = ""
) -> tuple[list[str], list[list[str]]]:
    """Headings and rows in percent, of values and their standard errors by task; the last one is the mean over tasks."""
    every = dict(values)
    if len(values) > 1:
        every["mean"] = [mean(column) for column in zip(*values.values(), strict=True)]

    def cell(value: float, error: float) -> str:
        return f"{100 * value:{sign}.1f}" + ("" if math.isnan(error) else f" +- {100 * error:.1f}")

    return [heading, *columns], [[task, *(cell(*one) for one in found)] for task, found in every.items()]


def mean(values: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Mean of values with independent standard errors, and its own."""
    return sum(value for value, _ in values) / len(values), math.sqrt(sum(error**2 for _, error in values)) / len(
        values
    )
