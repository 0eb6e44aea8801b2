"""Several runs side by side: runs that measured the same 16-bit model on the same text share one table."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nybble.report.labels import (
    ROWS_16_BIT,
    format_label,
    is_export,
    metric_cell,
    metric_columns,
    metric_label,
    ordered_rows,
    row_label,
)
from nybble.report.markdown import run_markdown
from nybble.report.run import kept_compressed, measured_on
from nybble.report.tables import Cells, as_markdown, escape_markdown
from nybble.run.results import Metrics, RunResults

# Options that name places or change speed, the seed, and those that RunResults.method stands for: --method, with auto
# resolved, and the run that --init_from names. Runs that differ in nothing else repeat one recipe.
NO_RECIPE = (
    "seed", "method", "init_from", "output_dir", "data_dir", "resume", "overwrite", "export", "report_to",
    "save_steps", "weight_cache", "microbatch_size", "eval_batch_size", "device", "trust_remote_code", "fast_eval",
    "gradient_checkpointing",
)  # fmt: skip
# 16-bit models of two machines score this close, relative to their perplexity.
_SAME_PERPLEXITY = 0.01


@dataclass(frozen=True)
class Entry:
    """One measured model.

    Attributes:
        label: its name, unique in a comparison.
        row: key in RunResults.models.
        method: how it was compressed before any training.
        metrics: what was measured.
        run: name of the run that measured it.
        trained: whether it was trained end to end, rather than only compressed.
        training: the published name of that training, such as QAT + LoRA.
        recipe: equal for runs that differ only in their seed, and in where and how fast they computed.
        precision: of the linear layers, such as INT4.
    """

    label: str
    row: str
    method: str
    metrics: Metrics
    run: str
    trained: bool
    training: str
    recipe: str
    seed: int
    precision: str


@dataclass(frozen=True)
class Comparison:
    """Runs that measured the same model on the same text.

    Attributes:
        model: name of the 16-bit model.
        entries: the 16-bit model, then the models of the runs.
        runs: name -> results.
    """

    model: str
    entries: Sequence[Entry]
    runs: Mapping[str, RunResults]

    @property
    def measured_on(self) -> str:
        """What the metrics were measured on, the same in all runs."""
        columns = {key for entry in self.entries for key in entry.metrics}
        return measured_on(next(iter(self.runs.values())), columns)

    @property
    def metric(self) -> str:
        """The metric that models are compared by: the task of all runs; else word perplexity where all have it."""
        tasks = {results.task.column for results in self.runs.values() if results.task is not None}
        if len(tasks) == 1 and all(tasks <= entry.metrics.keys() for entry in self.entries):
            return tasks.pop()
        has_words = all("word_perplexity" in entry.metrics for entry in self.entries)
        return "word_perplexity" if has_words else "token_perplexity"

    @property
    def lower_is_better(self) -> bool:
        """Whether the metric is a perplexity, rather than the score of a task."""
        return self.metric.endswith("perplexity")

    def value(self, entry: Entry) -> float:
        """The metric of an entry."""
        return float(entry.metrics[self.metric])

    @property
    def shipped(self) -> list[Entry]:
        """The 4-bit models; where a model was exported, its exports in its place."""
        exported = {(entry.run, entry.trained) for entry in self.entries if is_export(entry.row)}
        quantized = [entry for entry in self.entries if entry.row not in ROWS_16_BIT]
        return [entry for entry in quantized if is_export(entry.row) or (entry.run, entry.trained) not in exported]

    @property
    def untrained(self) -> list[Entry]:
        """The shipped models that were compressed without any training, block-wise or end to end."""
        return [entry for entry in self.shipped if not self.is_refined(entry)]

    @property
    def baselines(self) -> dict[str, Entry]:
        """The best untrained model of each precision."""
        best = min if self.lower_is_better else max
        precisions = dict.fromkeys(entry.precision for entry in self.untrained)
        return {p: best((e for e in self.untrained if e.precision == p), key=self.value) for p in precisions}

    @property
    def shows_recovered(self) -> bool:
        """Whether there is a model that training or reconstruction could have repaired, and one to compare it with."""
        refined = {entry.precision for entry in self.entries if self.is_refined(entry)}
        return self.lower_is_better and not refined.isdisjoint(self.baselines)

    def is_refined(self, entry: Entry) -> bool:
        """Whether an entry is a 4-bit model that was trained, or reconstructed block by block."""
        return entry.row not in ROWS_16_BIT and (entry.trained or "blockwise" in entry.method)

    def recovered_share(self, entry: Entry, untrained: Sequence[Entry] = ()) -> float | None:
        """Share of the compression damage of untrained models that an entry recovered.

        (mean untrained - entry) / (mean untrained - 16-bit)

        Args:
            untrained: models whose mean is the damaged value; by default the baseline of its precision.

        Returns: None if there is no baseline, or if its compression did no damage.
        """
        baseline = self.baselines.get(entry.precision)
        compressed = untrained or ([] if baseline is None else [baseline])
        full = self.entries[0]
        if not self.lower_is_better or not compressed or full.row != "16bit":
            return None
        if entry.row != "compressed" and kept_compressed(self.runs[entry.run]):
            return 0.0
        damaged = statistics.fmean(map(self.value, compressed))
        return (damaged - self.value(entry)) / (damaged - self.value(full)) if damaged > self.value(full) else None


def compare_runs(runs: Mapping[str, RunResults], options: Mapping[str, Mapping[str, Any]]) -> list[Comparison]:
    """Group runs by model and test text.

    Args:
        runs: name -> results.
        options: name -> saved options. A run without them is taken for a recipe of its own.
    """
    groups: list[dict[str, RunResults]] = []
    for name, results in runs.items():
        group = next((group for group in groups if _are_comparable(next(iter(group.values())), results)), None)
        if group is None:
            groups.append({name: results})
        else:
            group[name] = results
    comparisons = (Comparison(next(iter(group.values())).model, _entries(group, options), group) for group in groups)
    return [comparison for comparison in comparisons if comparison.entries]


def _are_comparable(one: RunResults, other: RunResults) -> bool:
    """Whether two runs measured the same model on the same text and as many documents.

    Names can be equal by chance, so the 16-bit models must have scored alike as well.
    """
    if (one.model, one.test_data, one.limit) != (other.model, other.test_data, other.limit):
        return False
    first, second = (results.models.get("16bit", {}) for results in (one, other))
    a, b = first.get("token_perplexity"), second.get("token_perplexity")
    close = a is None or b is None or math.isclose(a, b, rel_tol=_SAME_PERPLEXITY)
    return first.get("tokens") == second.get("tokens") and close


def _entries(runs: Mapping[str, RunResults], options: Mapping[str, Mapping[str, Any]]) -> list[Entry]:
    """The 16-bit model of the first run that has it, then all other models in the order of runs."""
    places = [(name, row) for name, results in runs.items() for row in ordered_rows(results.models)]
    first = next((place for place in places if place[1] == "16bit"), None)
    places = [*([] if first is None else [first]), *(place for place in places if place[1] != "16bit")]
    labels = [_entry_label(runs[name], row) for name, row in places]
    counts = Counter(labels)
    return [
        _entry(name, row, label if counts[label] == 1 else f"{label}, {name}", runs[name], options.get(name))
        for (name, row), label in zip(places, labels, strict=True)
    ]


def _entry(name: str, row: str, label: str, results: RunResults, options: Mapping[str, Any] | None) -> Entry:
    if row == "compressed":
        trained = results.init_trained or results.tuned_in_16_bit
    else:
        trained = row != "16bit" and (results.trains or results.init_trained)
    return Entry(
        label=label,
        row=row,
        method=results.method,
        metrics=results.models[row],
        run=name,
        trained=trained,
        training=_training_name(results),
        recipe=name if options is None else _recipe(results, options),
        seed=results.seed if options is None else options.get("seed", results.seed),
        precision=results.precision,
    )


def _entry_label(results: RunResults, row: str) -> str:
    """The name of a model among those of other runs."""
    if row in ("16bit", "lora16"):
        return row_label(results, row)
    method = results.described_method
    runtime = f" ({format_label(row)})" if is_export(row) else ""
    if not results.trains:
        return f"{results.precision}, {method}{runtime}"
    training = "distilled" if results.task is None else f"tuned on {Path(results.task.name).stem}"
    if row == "tuned16":
        return f"16-bit, {training}"
    if results.tuned_in_16_bit:
        return f"{results.precision}, {training}, then {method}" + (
            "" if row == "compressed" else f", scales trained{runtime}"
        )
    if row == "compressed":
        return (
            f"{results.precision}, {method}, {'trained before this run' if results.init_trained else 'before training'}"
        )
    return f"{results.precision}, {method}, {training}{runtime}"


def _training_name(results: RunResults) -> str:
    """The published name: QAT + NLS, QAT + LoRA, or QAT where only scales and norms are trained."""
    task = results.task
    if task is not None and len(task.rank_space) > 1:
        return "QAT + NLS" + (", chosen on test rows" if task.chosen_on_test else "")
    if results.train != "lora":
        return "QAT of all weights" if results.train == "full" else "QAT of rounding scales"
    return "QAT" if results.lora_rank == 0 else "QAT + LoRA"


def _recipe(results: RunResults, options: Mapping[str, Any]) -> str:
    chosen = sorted((key, value) for key, value in options.items() if key not in NO_RECIPE)
    return f"{results.command} {results.method} {chosen}"


def comparison_rows(comparison: Comparison) -> Cells:
    """A row per model, a column per metric."""
    first = "" if comparison.lower_is_better else comparison.metric
    columns = metric_columns({entry.label: entry.metrics for entry in comparison.entries}, first)
    rows = []
    for entry in comparison.entries:
        row = [entry.label, *(metric_cell(column, entry.metrics.get(column)) for column in columns)]
        if comparison.shows_recovered:
            share = comparison.recovered_share(entry) if comparison.is_refined(entry) else None
            row.append("-" if share is None else f"{share:.0%}")
        rows.append(row)
    return ["model", *map(metric_label, columns), *(["recovered"] if comparison.shows_recovered else [])], rows


def comparison_note(comparison: Comparison) -> str:
    """What the numbers of a comparison are."""
    text = comparison.measured_on
    if comparison.shows_recovered:
        name = metric_label(comparison.metric)
        baselines = "; ".join(entry.label for entry in comparison.baselines.values())
        text += (
            f" Recovered: share of the damage to {name} that training repairs, (compressed - trained) / (compressed - "
            f"16-bit); compressed is the best model of its bits without training: {baselines}."
        )
    return text


def comparison_markdown(comparisons: Sequence[Comparison]) -> str:
    """All comparisons, each followed by the reports of its runs."""
    parts = []
    for comparison in comparisons:
        count = len(comparison.runs)
        parts += [
            f"# {escape_markdown(comparison.model)}: {count} run{'s'[: count > 1]}",
            as_markdown(*comparison_rows(comparison)),
            escape_markdown(comparison_note(comparison)),
            *(run_markdown(results, name).rstrip() for name, results in comparison.runs.items()),
        ]
    return "\n\n".join(parts) + "\n"
