"""Runs -> one HTML page that opens offline: what report.py says, and charts. Everything is in the file; the charts are SVG, drawn by matplotlib."""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

from nybble.errors import MissingExtraError
from nybble.report import comparison as report_comparison
from nybble.report import run
from nybble.report.comparison import Comparison

# Of 16 bit, compressed, tuned: readable without telling red from green.
COLORS = {"16bit": "#8a8f98", "compressed": "#d98c3f", "tuned": "#2f6db5"}
# Names of runs may have dollars in them: no mathematics.
_SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "nybble",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,
}
_BLOCK = re.compile(r"\.(\d+)\.(.+)$")


def available() -> bool:
    """Whether charts can be drawn here."""
    return importlib.util.find_spec("matplotlib") is not None


def _need_charts() -> None:
    if not available():
        raise MissingExtraError("report", "drawing the charts of a report")


def comparison_page(comparisons: Sequence[Comparison]) -> str:
    """The page as HTML text.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    _need_charts()
    sections = [
        {
            "title": comparison.model,
            "tables": [report_comparison.comparison_rows(comparison)],
            "explained": report_comparison.explained(comparison),
            "stages": _draw(_stages, comparison),
            "runs": [_run(name, results) for name, results in comparison.runs.items()],
        }
        for comparison in comparisons
    ]
    return _render(sections)


def tasks_page(
    title: str,
    tables: Sequence[Any],
    note: str,
    figures: Mapping[str, Mapping[str, tuple[float, float]]],
    runs: Mapping[str, dict[str, Any]],
) -> str:
    """The page of a comparison over tasks. Args: task -> column -> value and standard error; name -> results of the tuned runs. Raises: see `page`."""
    _need_charts()
    chart, details = _draw(_tasks, figures), [_run(name, found) for name, found in runs.items()]
    return _render([{"title": title, "tables": tables, "explained": note, "stages": chart, "runs": details}])


def _render(sections: Sequence[dict[str, Any]]) -> str:
    from jinja2 import Environment

    source = resources.files("nybble").joinpath("report/page.html").read_text("utf-8")
    return (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source).render(sections=sections)
    )


def _run(name: str, results: dict[str, Any]) -> dict[str, Any]:
    """What the template shows of one run."""
    errors = results.get("layer_errors", {})
    charts = [
        *(
            (f"Loss and validation{title}", _draw(_curves, {"task": results.get("task"), **training}))
            for title, training in run.trainings(results)
            if training.get("training") or training.get("validation")
        ),
        ("Ranks", _draw(_ranks, results) if len(results.get("candidates", [])) > 1 else ""),
        ("Layers", _draw(_layers, results) if errors else ""),
        ("Error after each decoder layer", _draw(_decoder, results) if results.get("decoder_errors") else ""),
        ("Block-wise reconstruction", _draw(_blocks, results) if results.get("block_losses") else ""),
        ("Time", _draw(_times, results)),
    ]
    tables = [("Search for ranks", run.search_rows(results), run.search_note(results))] if "search" in results else []
    tables += (
        [("Score against ranks (nsga2)", run.front_rows(results), run.FRONT_NOTE)]
        if results.get("search", {}).get("front")
        else []
    )
    tables += [("Tested configurations", run.tested_rows(results), run.TESTED_NOTE)] if "tested" in results else []
    decoder = run.decoder_rows(results)
    tables += [("Decoder layers", decoder, run.DECODER_NOTE)] if decoder[1] else []
    tables += [("Every layer", run.layer_rows(results), run.LAYER_NOTE)] if errors else []
    memory = ", ".join(
        f"{value / 1e9:.2f} GB ({kind})" for kind, value in results.get("peak_memory_bytes", {}).items() if value
    )
    facts = {
        "Command": results.get("command", ""),
        "Time": f"{sum(results['seconds'].values()):.0f} s",
        "Peak memory": memory,
        "4-bit weights": run.moved(results) if "codes_changed" in results else "",
        "Seed": str(results.get("seed", "")),
        "Machine": ", ".join(
            str(results.get("machine", {}).get(key, ""))
            for key in ("platform", "cpu", "cuda")
            if results.get("machine", {}).get(key)
        ),
        "Versions": ", ".join(
            f"{key} {value}" for key, value in results.get("machine", {}).get("versions", {}).items()
        ),
    }
    return {
        "name": name,
        "sentence": run.sentence(results),
        "warnings": results.get("warnings", []),
        "facts": {key: value for key, value in facts.items() if value},
        "charts": [(title, chart) for title, chart in charts if chart],
        "tables": tables,
    }


def _draw(chart: Callable[[Any, Any], None], subject: Any) -> Any:
    """A chart as SVG text, safe to put into the page."""
    import matplotlib
    from markupsafe import Markup
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_SETTINGS):
        figure, text = Figure(layout="constrained"), io.StringIO()
        chart(figure, subject)
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    return Markup(text.getvalue()[text.getvalue().index("<svg") :])


def _stages(figure: Any, comparison: Comparison) -> None:
    """A bar per model: perplexity (the axis starts near the 16-bit model's) and KL to the 16-bit model."""
    entries = list(comparison.entries)[::-1]
    figure.set_size_inches(10, 0.6 + 0.32 * len(entries))
    colors = [
        COLORS["16bit" if entry.kind == "16bit" else "tuned" if entry.tuned else "compressed"] for entry in entries
    ]
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    labels = [entry.label for entry in entries]
    values = [comparison.value(entry) for entry in entries]
    bars = left.barh(labels, values, color=colors)
    digits = 2 if comparison.metric.endswith("perplexity") else 3
    left.bar_label(bars, [f"{value:.{digits}f}" for value in values], padding=3)
    low, high = min(values), max(values)
    spread = high - low or abs(high)
    ends = (low - 0.3 * spread, high + 0.3 * spread)  # log-likelihoods are negative: their bars go to the left of 0
    left.set_xlim(max(0.0, ends[0]) if low >= 0 else ends[0], min(0.0, ends[1]) if high <= 0 else ends[1])
    left.set_xlabel(run.heading(comparison.metric) + (" (axis cut)" if ends[0] > 0 or ends[1] < 0 else ""))
    divergences = [entry.values.get("kl_to_teacher", 0.0) for entry in entries]
    bars = right.barh(labels, divergences, color=colors)
    right.bar_label(bars, [f"{value:.4f}" for value in divergences], padding=3)
    right.set_xlim(0, (max(divergences) or 1.0) * 1.25)
    right.set_xlabel("KL to 16 bit (nats a token)")


def _curves(figure: Any, results: dict[str, Any]) -> None:
    """Training loss of every step and validation KL; validation perplexity."""
    figure.set_size_inches(10, 2.8)
    left, right = figure.subplots(1, 2)
    training, validation = results.get("training", []), results.get("validation", [])
    left.plot(
        [row["step"] for row in training],
        [row["loss"] for row in training],
        color=COLORS["tuned"],
        alpha=0.5,
        linewidth=1,
        label="training",
    )
    steps = [row["step"] for row in validation]
    if results.get("task"):  # the losses of training and validation are not of the same thing: not on one axis
        left.set(xlabel="step", ylabel="training loss")
        right.set(xlabel="step", ylabel="held-out loss")
        right.plot(steps, [row["loss"] for row in validation], "o-", color=COLORS["compressed"])
    else:
        left.plot(
            steps, [row["kl_to_teacher"] for row in validation], "o-", color=COLORS["compressed"], label="validation"
        )
        left.set(xlabel="step", ylabel="KL to 16 bit")
        left.legend(frameon=False)
        right.plot(steps, [row["token_perplexity"] for row in validation], "o-", color=COLORS["compressed"])
        right.set(xlabel="step", ylabel="validation token perplexity")
    best = results.get("best_step")
    for axes in (left, right):
        if best is not None:
            axes.axvline(best, color=COLORS["16bit"], linestyle=":", linewidth=1)


def _percent(value: float, position: int | None = None) -> str:
    return f"{100 * value:g}%"


def _layers(figure: Any, results: dict[str, Any]) -> None:
    """Maps of block by kind of layer: output error (weight error without calibration text) by rtn and compressed, and what training changed."""
    from matplotlib.colors import LogNorm, Normalize

    errors = results["layer_errors"]
    places = {name: (int(found[1]), found[2]) for name in errors if (found := _BLOCK.search(name))}
    kinds, blocks = (
        list(dict.fromkeys(kind for _, kind in places.values())),
        1 + max((block for block, _ in places.values()), default=0),
    )

    def layer_grid(values: dict[str, float | None]) -> list[list[float]]:
        made = [[float("nan")] * blocks for _ in kinds]
        for name, (block, kind) in places.items():
            value = values.get(name)
            made[kinds.index(kind)][block] = float("nan") if value is None else value
        return made

    if all(error["rtn"] is None for error in errors.values()):
        maps = {"weight error": layer_grid({name: error["weight"] for name, error in errors.items()})}
    else:
        maps = {
            "output error, round-to-nearest": layer_grid({name: error["rtn"] for name, error in errors.items()}),
            f"output error, {results.get('method', 'compressed')}": layer_grid(
                {name: error["compressed"] for name, error in errors.items()}
            ),
        }
    numbers = [value for lines in maps.values() for line in lines for value in line if value > 0]  # not of nan
    least, most = min(numbers, default=0), max(numbers, default=1)
    shared = (LogNorm if 0 < 10 * least < most else Normalize)(
        least, most
    )  # a logarithmic bar has labels at powers of ten only
    maps |= {title: layer_grid(results[key]) for key, title in run.MOVED.items() if any(results.get(key, {}).values())}
    figure.set_size_inches(10, 0.7 + 0.22 * len(kinds) * -(-len(maps) // 2) + 0.5 * (-(-len(maps) // 2)))
    all_axes = figure.subplots(-(-len(maps) // 2), min(2, len(maps)), squeeze=False).flatten()
    for axes, (title, lines) in zip(all_axes, maps.items(), strict=False):
        image = axes.imshow(lines, aspect="auto", cmap="viridis", norm=shared if "error" in title else None)
        axes.set_yticks(range(len(kinds)), [kind.removeprefix("self_attn.").removeprefix("mlp.") for kind in kinds])
        axes.set(title=title, xlabel="block")
        axes.locator_params(axis="x", integer=True)
        figure.colorbar(image, ax=axes, format=_percent).minorticks_off()
    for axes in all_axes[len(maps) :]:
        axes.set_axis_off()


def _decoder(figure: Any, results: dict[str, Any]) -> None:
    """Error of what comes out of each decoder layer, compressed and tuned."""
    figure.set_size_inches(10, 2.4)
    axes = figure.subplots()
    for row, found in results["decoder_errors"].items():
        axes.plot(found, "o-", markersize=3, color=COLORS[row], label=run.label(results, row))
    axes.set(xlabel="decoder layer", ylabel="relative error", ylim=(0, None))
    axes.yaxis.set_major_formatter(_percent)
    axes.locator_params(axis="x", integer=True)
    axes.legend(frameon=False)


def _blocks(figure: Any, results: dict[str, Any]) -> None:
    """Error of each block's outputs on held-out sequences, before and after."""
    figure.set_size_inches(10, 2.4)
    axes = figure.subplots()
    losses = list(results["block_losses"].values())
    axes.plot([before for before, _ in losses], "o-", markersize=3, color=COLORS["compressed"], label="before")
    axes.plot([after for _, after in losses], "o-", markersize=3, color=COLORS["tuned"], label="after")
    axes.set(xlabel="block", ylabel="relative error of its outputs", yscale="log")
    axes.yaxis.set_major_formatter(_percent)
    axes.yaxis.set_minor_formatter(_percent if max(map(max, losses)) < 10 * min(map(min, losses)) else "")
    axes.locator_params(axis="x", integer=True)
    axes.legend(frameon=False)


def _times(figure: Any, results: dict[str, Any]) -> None:
    """One bar, a part per stage."""
    figure.set_size_inches(10, 1.3 + 0.2 * (len(results["seconds"]) // 6))
    axes, start = figure.subplots(), 0.0
    for i, (stage, seconds) in enumerate(results["seconds"].items()):
        axes.barh([0], [seconds], left=start, color=f"C{i}", label=f"{stage} {seconds:.0f} s", height=0.5)
        start += seconds
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("seconds")
    axes.legend(frameon=False, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _tasks(figure: Any, figures: Mapping[str, Mapping[str, tuple[float, float]]]) -> None:
    """A group of bars per task, with standard errors."""
    figure.set_size_inches(10, 3.2)
    axes, columns = figure.subplots(), list(next(iter(figures.values())))
    shades = ["#8a8f98", "#555b64", "#d98c3f", "#8fb4dc", "#2f6db5"]
    for i, column in enumerate(columns):
        places = [task + (i - len(columns) / 2 + 0.5) * 0.16 for task in range(len(figures))]
        values, errors = zip(*(found[column] for found in figures.values()), strict=True)
        axes.bar(
            places, values, 0.15, yerr=errors, color=shades[i % len(shades)], label=column, error_kw={"linewidth": 0.8}
        )
    axes.set_xticks(range(len(figures)), list(figures))
    axes.set_ylabel("test rows right")
    axes.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _score(row: dict[str, Any], on_test: bool) -> float:
    return float(row["test"]) if on_test else run.score_of(row)


def _ranks(figure: Any, results: dict[str, Any]) -> None:
    """The rank of every decoder layer, a row per candidate, best first, and last what was put in their place; beside it the scores they are chosen by."""
    on_test = "test" in results["candidates"][0]
    what = "score on the test rows" if on_test else f"{run.scored_by(results)[0]} (bars: error of the difference)"
    candidates = sorted(results["candidates"], key=lambda row: -_score(row, on_test))
    labels = [row["why"] + (" (chosen)" if row["configuration"] == results["chosen"] else "") for row in candidates]
    shown = [row["configuration"] for row in candidates]
    if run.replaced(results):
        labels, shown = [*labels, f"in place ({run.replaced_by(results)})"], [*shown, results["configuration"]]
    figure.set_size_inches(10, 0.8 + 0.28 * len(shown))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    image = left.imshow(shown, aspect="auto", cmap="viridis")
    left.set_yticks(range(len(labels)), labels)
    left.set_xlabel("decoder layer")
    left.locator_params(axis="x", integer=True)
    figure.colorbar(image, ax=left, label="rank", ticks=sorted(results["task"]["space"]))
    errors = [0.0 if on_test else row["error"] for row in candidates]
    right.errorbar(
        [_score(row, on_test) for row in candidates],
        range(len(candidates)),
        xerr=errors,
        fmt="o",
        color=COLORS["tuned"],
        linewidth=1,
    )
    right.set_ylim(left.get_ylim())  # each beside its row
    right.set_yticks([])
    right.locator_params(axis="x", nbins=5)  # their labels are long
    right.set_xlabel(what)
