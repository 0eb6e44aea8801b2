"""The charts of a report page as SVG. matplotlib draws them; nothing is fetched, and equal results give equal text."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

from nybble.report.labels import held_out_loss, metric_label, row_label
from nybble.report.ranks import replacement_text, score_label
from nybble.report.run import layer_changes
from nybble.run.results import Candidate, RunResults, TaskResults, Training

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from nybble.report.comparison import Comparison, Entry
    from nybble.report.figures import Figures

# Of the 16-bit, the compressed and the trained model; they differ without red and green.
COLORS = {"16bit": "#8a8f98", "compressed": "#d98c3f", "tuned": "#2f6db5"}
_COLUMN_COLORS = ("#8a8f98", "#555b64", "#d98c3f", "#8fb4dc", "#2f6db5")
# Names of runs may have dollar signs in them, which are no mathematics.
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "nybble",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,
}
# Number of a decoder layer and kind of a linear layer, in its name.
_LAYER = re.compile(r"\.(\d+)\.(.+)$")
_INCHES = 10.0
# Characters per line of a label; two lines fit beside a bar.
_LABEL_WIDTH = 44


def draw(chart: Callable[[Figure], None]) -> Markup:
    """A chart as SVG text that may stand in HTML as it is."""
    import matplotlib
    from markupsafe import Markup
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_SETTINGS):
        figure, text = Figure(layout="constrained"), io.StringIO()
        chart(figure)
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    svg = text.getvalue()
    return Markup(svg[svg.index("<svg") :])


def draw_models(figure: Figure, comparison: Comparison) -> None:
    """Bars of all models of a comparison: the metric that they are compared by, and the KL divergence."""
    entries = list(comparison.entries)[::-1]
    figure.set_size_inches(_INCHES, 0.6 + 0.32 * len(entries))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    places = range(len(entries))
    colors = [_entry_color(entry) for entry in entries]
    values = [comparison.value(entry) for entry in entries]
    digits = 2 if comparison.lower_is_better else 3
    left.bar_label(left.barh(places, values, color=colors), [f"{value:.{digits}f}" for value in values], padding=3)
    left.set_yticks(places, [fill(entry.label, _LABEL_WIDTH) for entry in entries])
    low, high = _ends(values)
    left.set_xlim(low, high)
    left.set_xlabel(metric_label(comparison.metric) + (" (axis does not begin at 0)" if low > 0 or high < 0 else ""))
    divergences = [entry.metrics.get("kl_to_teacher", 0.0) for entry in entries]
    right.bar_label(right.barh(places, divergences, color=colors), [f"{kl:.4f}" for kl in divergences], padding=3)
    right.set_xlim(0, (max(filter(math.isfinite, divergences), default=0.0) or 1.0) * 1.25)
    right.set_xlabel("KL divergence (nats per token)")


def _entry_color(entry: Entry) -> str:
    return COLORS["16bit" if entry.row == "16bit" else "tuned" if entry.trained else "compressed"]


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """Ends of the axis: 30 % of the range beyond the values, but not beyond 0, where bars begin."""
    finite = [value for value in values if math.isfinite(value)] or [1.0]
    low, high = min(finite), max(finite)
    margin = 0.3 * (high - low or abs(high))
    left = max(0.0, low - margin) if low >= 0 else low - margin
    right = min(0.0, high + margin) if high <= 0 else high + margin
    return left, right


def draw_training(figure: Figure, training: Training, task: TaskResults | None) -> None:
    """Loss of every step, and the validations.

    Args:
        task: of a run that has one; there the losses of training and validation are different things, which do not
            share an axis.
    """
    figure.set_size_inches(_INCHES, 2.8)
    left, right = figure.subplots(1, 2)
    steps, losses = ([row[key] for row in training.steps] for key in ("step", "loss"))
    left.plot(steps, losses, color=COLORS["tuned"], alpha=0.5, linewidth=1, label="training")
    rows = training.validation
    steps = [row["step"] for row in rows]
    style: dict[str, Any] = {"marker": "o", "color": COLORS["compressed"]}
    if task is not None:
        left.set(xlabel="step", ylabel="training loss")
        right.set(xlabel="step", ylabel=f"held-out loss\n({held_out_loss(task)})")
        right.plot(steps, [row["loss"] for row in rows], **style)
    else:
        left.plot(steps, [row["kl_to_teacher"] for row in rows], label="validation", **style)
        left.set(xlabel="step", ylabel="KL divergence to 16-bit")
        left.legend(frameon=False)
        right.plot(steps, [row["token_perplexity"] for row in rows], **style)
        right.set(xlabel="step", ylabel="validation token perplexity")
    for axes in (left, right):
        axes.locator_params(axis="x", integer=True)
        if training.best_step >= 0:
            axes.axvline(training.best_step, color=COLORS["16bit"], linestyle=":", linewidth=1, label="kept step")
    if training.best_step >= 0:
        right.legend(frameon=False)


def draw_layer_maps(figure: Figure, results: RunResults) -> None:
    """Maps of decoder layer by kind of linear layer: errors of the compression, and what training changed."""
    from matplotlib.colors import LogNorm, Normalize

    places = {name: (int(found[1]), found[2]) for name in results.layer_errors if (found := _LAYER.search(name))}
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    maps = {title: _layer_map(values, places, kinds) for title, values in _layer_errors(results).items()}
    numbers = [value for lines in maps.values() for line in lines for value in line if value > 0]  # no nan
    least, most = min(numbers, default=0), max(numbers, default=1)
    # A logarithmic color bar has labels at powers of ten only.
    shared = (LogNorm if 0 < 10 * least < most else Normalize)(least, most)
    errors = set(maps)
    for title, changes in layer_changes(results).items():
        if any(changes.values()):
            maps[title] = _layer_map(changes, places, kinds)
    lines_of_maps = -(-len(maps) // 2)
    figure.set_size_inches(_INCHES, (0.7 + 0.22 * len(kinds) + 0.2) * lines_of_maps)
    all_axes = figure.subplots(lines_of_maps, min(2, len(maps)), squeeze=False).flatten()
    for axes, (title, lines) in zip(all_axes, maps.items(), strict=False):
        image = axes.imshow(lines, aspect="auto", cmap="viridis", norm=shared if title in errors else None)
        axes.set_yticks(range(len(kinds)), [kind.removeprefix("self_attn.").removeprefix("mlp.") for kind in kinds])
        axes.set_title(title)
        _label_layers(axes)
        figure.colorbar(image, ax=axes, format=_percent).minorticks_off()
    for axes in all_axes[len(maps) :]:
        axes.set_axis_off()


def _layer_errors(results: RunResults) -> dict[str, dict[str, float | None]]:
    """Title -> layer -> output error; without calibration text there is only the error of the weights."""
    errors = results.layer_errors
    if all(error["rtn"] is None for error in errors.values()):
        return {"weight error": {name: error["weight"] for name, error in errors.items()}}
    return {
        "output error, round-to-nearest": {name: error["rtn"] for name, error in errors.items()},
        f"output error, {results.method if results.limit_blocks is None else results.described_method}": {
            name: error["compressed"] for name, error in errors.items()
        },
    }


def _layer_map(
    values: Mapping[str, float | None], places: Mapping[str, tuple[int, str]], kinds: Sequence[str]
) -> list[list[float]]:
    """[kind][decoder layer]; nan where there is no value."""
    columns = 1 + max((layer for layer, _ in places.values()), default=0)
    lines = [[float("nan")] * columns for _ in kinds]
    for name, (layer, kind) in places.items():
        value = values.get(name)
        lines[kinds.index(kind)][layer] = float("nan") if value is None else value
    return lines


def draw_decoder_errors(figure: Figure, results: RunResults) -> None:
    """Error of the hidden states after each decoder layer, compressed and trained."""
    figure.set_size_inches(_INCHES, 2.4)
    axes = figure.subplots()
    for row, errors in results.decoder_errors.items():
        axes.plot(errors, "o-", markersize=3, color=COLORS[row], label=row_label(results, row))
    axes.set(ylabel="relative error", ylim=(0, None))
    axes.yaxis.set_major_formatter(_percent)
    _label_layers(axes)
    axes.legend(frameon=False)


def draw_block_losses(figure: Figure, results: RunResults) -> None:
    """Error of each decoder layer's outputs on held-out sequences, before and after block-wise reconstruction."""
    figure.set_size_inches(_INCHES, 2.4)
    axes = figure.subplots()
    losses = list(results.block_losses.values())
    axes.plot([before for before, _ in losses], "o-", markersize=3, color=COLORS["compressed"], label="before")
    axes.plot([after for _, after in losses], "o-", markersize=3, color=COLORS["tuned"], label="after")
    axes.set(ylabel="relative error of outputs", yscale="log")
    axes.yaxis.set_major_formatter(_percent)
    axes.yaxis.set_minor_formatter(_percent if max(map(max, losses)) < 10 * min(map(min, losses)) else "")
    _label_layers(axes)
    axes.legend(frameon=False)


def _label_layers(axes: Axes) -> None:
    axes.set_xlabel("decoder layer")
    axes.locator_params(axis="x", integer=True)


def _percent(value: float, _position: float | None = None) -> str:
    return f"{100 * value:g}%"


def draw_times(figure: Figure, results: RunResults) -> None:
    """One bar with a part per stage."""
    figure.set_size_inches(_INCHES, 1.3 + 0.2 * (len(results.seconds) // 6))
    axes, start = figure.subplots(), 0.0
    for i, (stage, seconds) in enumerate(results.seconds.items()):
        axes.barh([0], [seconds], left=start, color=f"C{i}", label=f"{stage} {seconds:.0f} s", height=0.5)
        start += seconds
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("seconds")
    axes.legend(frameon=False, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def draw_tasks(figure: Figure, figures: Figures) -> None:
    """A group of bars per task, a bar per column, with standard errors."""
    figure.set_size_inches(_INCHES, 3.2)
    axes, columns = figure.subplots(), list(next(iter(figures.values())))
    for i, column in enumerate(columns):
        places = [task + (i - len(columns) / 2 + 0.5) * 0.16 for task in range(len(figures))]
        values, errors = ([getattr(row[column], name) for row in figures.values()] for name in ("value", "error"))
        color = _COLUMN_COLORS[i % len(_COLUMN_COLORS)]
        axes.bar(places, values, 0.15, yerr=errors, color=color, label=column, error_kw={"linewidth": 0.8})
    axes.set_xticks(range(len(figures)), list(figures))
    axes.set_ylabel("share of test rows right")
    axes.legend(frameon=False, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def draw_ranks(figure: Figure, task: TaskResults) -> None:
    """Ranks per decoder layer and scores, a row per candidate, best first; last what ships instead of them."""
    on_test = task.candidates[0].test is not None
    candidates = sorted(task.candidates, key=lambda candidate: -_choosing_score(candidate))
    labels = [one.why + (" (chosen)" if one.configuration == task.chosen else "") for one in candidates]
    rows = [one.configuration for one in candidates]
    if task.replaced and task.configuration is not None:
        labels, rows = [*labels, f"ships ({replacement_text(task)})"], [*rows, task.configuration]
    figure.set_size_inches(_INCHES, 0.8 + 0.28 * len(rows))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    image = left.imshow(rows, aspect="auto", cmap="viridis")
    left.set_yticks(range(len(labels)), labels)
    _label_layers(left)
    figure.colorbar(image, ax=left, label="rank", ticks=sorted(task.rank_space))
    scores = [_choosing_score(candidate) for candidate in candidates]
    errors = [0.0 if on_test else candidate.error for candidate in candidates]
    right.errorbar(scores, range(len(candidates)), xerr=errors, fmt="o", color=COLORS["tuned"], linewidth=1)
    right.set_ylim(left.get_ylim())  # each point beside the row of its candidate
    right.set_yticks([])
    right.locator_params(axis="x", nbins=5)
    score = "score on the test rows" if on_test else f"{score_label(task)} (bars: error of the difference)"
    right.set_xlabel(score)


def _choosing_score(candidate: Candidate) -> float:
    return candidate.score if candidate.test is None else candidate.test
