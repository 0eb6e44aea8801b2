"""The table in which quantization-aware training is published: 16-bit, best compression without training, trained."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from nybble.report.comparison import Comparison, Entry
from nybble.report.labels import metric_label
from nybble.report.tables import Cells

PUBLISHED_NOTE = (
    "PTWC: post-training weight compression. QAT: quantization-aware training. "
    "Improvement: (PTWC - QAT) / (PTWC - 16-bit)."
)


def published_rows(comparisons: Sequence[Comparison]) -> Cells:
    """Per model its 16-bit value, the best compression without training, and the best trained model.

    The last row is the mean improvement. Exported models count where there are some. Of runs that differ only in their
    seed the mean counts, and the lowest and the highest value stand behind it.
    """
    rows, improvements = [], []
    metrics = {comparison.metric for comparison in comparisons}
    for comparison in comparisons:
        model = published_name(comparison, len(metrics) > 1)
        rows.append([model, "16-bit", f"{comparison.value(comparison.entries[0]):.3f}", "-"])
        for precision in dict.fromkeys(entry.precision for entry in comparison.shipped):
            alike = [entry for entry in comparison.shipped if entry.precision == precision]
            untrained = _best_recipe(comparison, [entry for entry in alike if not comparison.is_refined(entry)])
            trained = _best_recipe(comparison, [entry for entry in alike if entry.trained])
            if untrained:
                name = f"{precision}, best PTWC ({untrained[0].method}){_repeats(untrained)}"
                rows.append([model, name, _spread(map(comparison.value, untrained), ".3f"), "-"])
            if trained:
                shares = [comparison.recovered_share(entry, untrained) for entry in trained]
                recovered = [share for share in shares if share is not None]
                improvements += [statistics.fmean(recovered)] if recovered else []
                name = f"{precision}, {trained[0].training}{_repeats(trained)}"
                values = _spread(map(comparison.value, trained), ".3f")
                rows.append([model, name, values, _spread(recovered, ".1%")])
    if improvements:
        rows.append(["mean", "", "", f"{statistics.fmean(improvements):.1%}"])
    value = metric_label(metrics.pop()) if len(metrics) == 1 else "metric"
    return ["model", "precision", value, "improvement"], rows


def published_name(comparison: Comparison, with_metric: bool) -> str:
    """The model, and what it is compared by where that differs from table row to table row."""
    return f"{comparison.model}, {metric_label(comparison.metric)}" if with_metric else comparison.model


def _best_recipe(comparison: Comparison, entries: Iterable[Entry]) -> list[Entry]:
    """The entries of the recipe with the best mean; empty if there are no entries."""
    recipes: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        recipes.setdefault((entry.row, entry.recipe), []).append(entry)
    best = min if comparison.lower_is_better else max
    return best(recipes.values(), key=lambda group: statistics.fmean(map(comparison.value, group)), default=[])


def _repeats(group: Sequence[Entry]) -> str:
    """How many runs of one recipe there are, and of how many seeds."""
    if len(group) == 1:
        return ""
    seeds = len({entry.seed for entry in group})
    return f", {seeds} seeds" if seeds == len(group) else f", {len(group)} runs of {seeds} seed{'s'[: seeds > 1]}"


def _spread(values: Iterable[float], form: str) -> str:
    """Mean, lowest and highest value; "-" if there is no value."""
    ordered = sorted(values)
    if not ordered:
        return "-"
    mean = f"{statistics.fmean(ordered):{form}}"
    return mean if len(ordered) == 1 else f"{mean} ({ordered[0]:{form}} to {ordered[-1]:{form}})"
