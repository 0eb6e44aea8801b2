"""Several runs side by side."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nybble.report.run import (
    _IN_16_BITS,
    MADE_HERE,
    ROWS,
    _cell,
    _columns,
    chosen_on_test,
    heading,
    learns_first,
    markdown,
    measured_on,
    starts_tuned,
    task_column,
    tunes,
)
from nybble.report.tables import as_markdown

# --- several runs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One measured model.

    Attributes:
        label: what people read; no two of a comparison have the same.
        kind: key of ROWS.
        method: how it was compressed, before any tuning.
        values: what was measured.
        run: name of the run that measured it.
        tuned: whether it was trained end to end, rather than only compressed.
        training: how people call that training.
        recipe: what runs that differ only in their seed (and in where they lie) have in common.
        seed: of its run; None where that is not known.
    """

    label: str
    kind: str
    method: str
    values: Mapping[str, Any]
    run: str
    tuned: bool
    training: str
    recipe: str
    seed: int | None = None


@dataclass(frozen=True)
class Comparison:
    """Runs that measured the same model on the same text.

    Attributes:
        model: which.
        entries: the 16-bit model, then what the runs made of it.
        runs: name -> results.
    """

    model: str
    entries: Sequence[Entry]
    runs: Mapping[str, dict[str, Any]]

    @property
    def measured_on(self) -> str:
        """What the numbers are of, the same in all runs."""
        return measured_on(next(iter(self.runs.values())))

    @property
    def metric(self) -> str:
        """What the models are compared by: the task that was tuned on; else word perplexity where all have it."""
        tasks = {task_column(results) for results in self.runs.values() if "task" in results}
        if len(tasks) == 1 and all(tasks <= entry.values.keys() for entry in self.entries):
            return tasks.pop()
        return (
            "word_perplexity"
            if all("word_perplexity" in entry.values for entry in self.entries)
            else "token_perplexity"
        )

    def value(self, entry: Entry) -> float:
        return float(entry.values[self.metric])

    def best(self, entries: Iterable[Entry]) -> Entry | None:
        """The one with the lowest perplexity, or the highest score of a task."""
        return (min if self.metric.endswith("perplexity") else max)(entries, key=self.value, default=None)

    @property
    def shipped(self) -> list[Entry]:
        """The 4-bit models, those exported in place of what they were exported from."""
        exported = {(entry.run, entry.tuned) for entry in self.entries if entry.kind == "openvino"}
        quantized = [entry for entry in self.entries if entry.kind not in _IN_16_BITS]
        return [entry for entry in quantized if entry.kind == "openvino" or (entry.run, entry.tuned) not in exported]

    @property
    def untrained(self) -> list[Entry]:
        """Models compressed without any training, block-wise or end to end."""
        return [entry for entry in self.shipped if not entry.tuned and "blockwise" not in _steps(entry.method)]

    @property
    def baseline(self) -> Entry | None:
        """The best of the untrained; None where there is none."""
        return self.best(self.untrained)

    def improvement(self, entry: Entry, untrained: Sequence[Entry] = ()) -> float | None:
        """Share of the damage of `untrained` (of their mean; default: the baseline) that `entry` repaired; None where there was no damage."""
        compressed = untrained or [baseline for baseline in (self.baseline,) if baseline is not None]
        full = self.entries[0]
        if not self.metric.endswith("perplexity") or not compressed or full.kind != "16bit":
            return None
        damaged = statistics.fmean(map(self.value, compressed))
        return (damaged - self.value(entry)) / (damaged - self.value(full)) if damaged > self.value(full) else None


def _entry_label(results: dict[str, Any], row: str) -> str:
    method = results.get("method", "rtn")
    if row in ("16bit", "lora16"):
        return ROWS[row]
    if not tunes(results):
        return f"4 bit, {method}" + (" (OpenVINO)" if row == "openvino" else "")
    made = f"tuned on {Path(results['task']['name']).stem}" if "task" in results else "distilled"
    if row == "learnt":
        return f"16 bit, {made}"
    if row == "compressed":
        return (
            f"4 bit, {made}, then {method}"
            if learns_first(results)
            else f"4 bit, {method} ({'tuned before' if starts_tuned(results) else 'start'})"
        )
    made += f" before and after {method}" if learns_first(results) else f" from {method}"
    return f"4 bit, {made}" + (" (OpenVINO)" if row == "openvino" else "")


def compare_runs(runs: Mapping[str, dict[str, Any]]) -> list[Comparison]:
    """Group runs by model and test text. Args: name -> results.json."""
    groups: list[dict[str, dict[str, Any]]] = []
    for name, results in runs.items():
        fitting = next((members for members in groups if _comparable(next(iter(members.values())), results)), None)
        if fitting is None:
            groups.append({name: results})
        else:
            fitting[name] = results
    comparisons = []
    for members in groups:
        first = next(iter(members.values()))
        found = [(name, results, row) for name, results in members.items() for row in ROWS if row in results["models"]]
        found = [
            item
            for i, item in enumerate(found)
            if item[2] != "16bit" or not any(other[2] == "16bit" for other in found[:i])
        ]
        found.sort(key=lambda item: item[2] != "16bit")
        labels = [_entry_label(results, row) for _, results, row in found]
        counts = Counter(labels)
        entries = [
            Entry(
                named if counts[named] == 1 else f"{named}, {name}",
                row,
                results.get("method", "rtn"),
                results["models"][row],
                name,
                row != "16bit"
                and (
                    starts_tuned(results) or learns_first(results)
                    if row == "compressed"
                    else tunes(results) or starts_tuned(results)
                ),
                _training(results),
                _recipe(name, results),
                results.get("options", results).get("seed"),
            )
            for (name, results, row), named in zip(found, labels, strict=True)
        ]
        if entries:
            comparisons.append(Comparison(first["model"], entries, members))
    return comparisons


def _comparable(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two runs measured the same model on the same text, and as many documents of tasks: by name, and by what the 16-bit model scored there (up to 1 %:
    machines differ)."""
    if any(one.get(key) != other.get(key) for key in ("model", "test", "task_limit")):
        return False
    a, b = (results["models"].get("16bit", {}) for results in (one, other))
    values = a.get("token_perplexity"), b.get("token_perplexity")
    return a.get("tokens") == b.get("tokens") and (None in values or math.isclose(*values, rel_tol=0.01))


def _training(results: dict[str, Any]) -> str:
    """How people call a run's training: QAT + LoRA, QAT + NLS, or QAT alone where only scales and norms are trained."""
    if len(results.get("task", {}).get("space", ())) > 1:
        return "QAT + NLS" + (", chosen on test rows" if chosen_on_test(results) else "")
    return "QAT + LoRA" if results.get("lora_rank", 1) else "QAT"


# Options that say where things lie or how fast, and the seed; --start is told by how it was made.
_NO_RECIPE = (
    "seed", "start", "output_dir", "data_dir", "resume", "overwrite", "export", "tensorboard", "save_every", "cache", "microbatch", "eval_batch_size", "device",
    "trust_remote_code", "fast_eval",
)  # fmt: skip


def _recipe(name: str, results: dict[str, Any]) -> str:
    if "options" not in results:  # whoever reads results.json alone
        return name
    options = {key: value for key, value in results["options"].items() if key not in _NO_RECIPE}
    return f"{results.get('kind')} {_steps(results.get('method', 'rtn'))} {sorted(options.items())}"


def _steps(method: str) -> str:
    """ "awq+se (runs/compressed)" -> "awq+se"."""
    return method.split(" (")[0]


def comparison_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of text."""
    columns = _columns({entry.label: dict(entry.values) for entry in comparison.entries})
    repairs = comparison.metric.endswith("perplexity")  # of a task there is nothing to repair
    lines = []
    for entry in comparison.entries:
        repaired = comparison.improvement(entry) if entry.kind != "16bit" and entry is not comparison.baseline else None
        line = [entry.label, *(_cell(c, entry.values.get(c)) for c in columns)]
        lines.append([*line, "-" if repaired is None else f"{repaired:.0%}"] if repairs else line)
    return ["model", *map(heading, columns), *(["repaired"] if repairs else [])], lines


def published_rows(comparisons: Sequence[Comparison]) -> tuple[list[str], list[list[str]]]:
    """The kind of table that quantization-aware tuning is published as: per model 16 bit, the best compression without training (PTWC), and the best
    tuned model; improvement = (PTWC - tuned) / (PTWC - 16 bit). Last the mean improvement. The OpenVINO model counts where there is one. Of runs that
    differ in nothing but their seed, given with their "options", the mean counts; behind it stand the least and the most."""
    lines, improvements = [], []
    for comparison in comparisons:
        full, best = comparison.entries[0], max if not comparison.metric.endswith("perplexity") else min
        untrained, tuned = (
            best(_by_recipe(entries), key=lambda group: statistics.fmean(map(comparison.value, group)), default=[])
            for entries in (comparison.untrained, [entry for entry in comparison.shipped if entry.tuned])
        )
        lines.append([comparison.model, ROWS["16bit"], f"{comparison.value(full):.3f}", "-"])
        for group, precision in ((untrained, "best PTWC"), (tuned, tuned[0].training if tuned else "")):
            if group:
                shares = [comparison.improvement(entry, untrained) for entry in group] if group is tuned else []
                repaired = [share for share in shares if share is not None]
                improvements += [statistics.fmean(repaired)] if repaired else []
                name = (
                    f"INT4, {precision}"
                    + (f" ({_steps(group[0].method)})" if group is untrained else "")
                    + _repeats(group)
                )
                lines.append(
                    [comparison.model, name, _spread(map(comparison.value, group), ".3f"), _spread(repaired, ".1%")]
                )
    if improvements:
        lines.append(["mean", "", "", f"{statistics.fmean(improvements):.1%}"])
    metrics = {comparison.metric for comparison in comparisons}
    return ["model", "precision", heading(metrics.pop()) if len(metrics) == 1 else "measure", "improvement"], lines


def _repeats(group: Sequence[Entry]) -> str:
    """How many runs of one recipe there are, and of how many seeds."""
    seeds = len({entry.seed for entry in group})
    return (
        ""
        if len(group) == 1
        else f", {seeds} seeds"
        if seeds == len(group)
        else f", {len(group)} runs of {seeds} seed{'s'[: seeds > 1]}"
    )


def _by_recipe(entries: Iterable[Entry]) -> list[list[Entry]]:
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.kind, entry.recipe), []).append(entry)
    return list(groups.values())


def _spread(values: Iterable[float], form: str) -> str:
    found = sorted(values)
    if not found:
        return "-"
    return f"{statistics.fmean(found):{form}}" + (
        f" ({found[0]:{form}} to {found[-1]:{form}})" if len(found) > 1 else ""
    )


def comparison_markdown(comparisons: Sequence[Comparison]) -> str:
    """All comparisons, then the report of each run."""
    parts = [MADE_HERE]
    for comparison in comparisons:
        parts += [
            f"# {comparison.model}: {len(comparison.runs)} runs",
            as_markdown(*comparison_rows(comparison)),
            explained(comparison),
        ]
        parts += [
            markdown(results).replace("\n## ", "\n### ").replace("# ", f"## {name}: ", 1).rstrip()
            for name, results in comparison.runs.items()
        ]
    return "\n\n".join(parts) + "\n"


def explained(comparison: Comparison) -> str:
    """What the numbers of a comparison are."""
    text = comparison.measured_on
    if comparison.baseline is not None and comparison.metric.endswith("perplexity"):
        text += f" Repaired = share of the damage to {heading(comparison.metric)} done by the best compression without training ({comparison.baseline.label})."
    return text
