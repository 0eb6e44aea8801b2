"""Report pages: one HTML file that opens offline, with tables, facts and charts (SVG)."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from typing import TYPE_CHECKING

from nybble.errors import MissingExtraError
from nybble.report import charts, ranks
from nybble.report.comparison import Comparison, comparison_note, comparison_rows
from nybble.report.figures import Figures
from nybble.report.run import (
    LAYER_NOTE,
    changes_text,
    decoder_note,
    decoder_rows,
    layer_rows,
    memory_text,
    other_rows,
    other_title,
    schemes_text,
    summary,
    training_title,
    versions_text,
)
from nybble.report.tables import MARKER, Cells
from nybble.run.results import RunResults

if TYPE_CHECKING:
    from markupsafe import Markup


@dataclass(frozen=True)
class _RunSection:
    """What the template shows of one run."""

    name: str
    summary: str
    warnings: Sequence[str]
    facts: Mapping[str, str]
    charts: Sequence[tuple[str, Markup]]  # title, SVG
    tables: Sequence[tuple[str, Cells, str]]  # title, cells, note


@dataclass(frozen=True)
class _Section:
    """A part of the page: tables and a chart that compare, then the runs."""

    title: str
    tables: Sequence[Cells]
    note: str
    chart: Markup
    runs: Sequence[_RunSection]


def can_draw() -> bool:
    """Whether the packages that pages need are installed."""
    return all(importlib.util.find_spec(package) is not None for package in ("matplotlib", "jinja2"))


def comparison_page(comparisons: Sequence[Comparison]) -> str:
    """A page about runs, grouped by what can be compared.

    Raises:
        MissingExtraError: matplotlib or Jinja is not installed.
    """
    _require_packages()
    return _render(
        [
            _Section(
                comparison.model,
                [comparison_rows(comparison)],
                comparison_note(comparison),
                charts.draw(partial(charts.draw_models, comparison=comparison)),
                [_run_section(name, results) for name, results in comparison.runs.items()],
            )
            for comparison in comparisons
        ]
    )


def columns_page(
    title: str, tables: Sequence[Cells], note: str, figures: Figures, runs: Mapping[str, RunResults]
) -> str:
    """A page about nybble compare.

    Args:
        figures: task -> column -> figure, for the chart.
        runs: name -> results of the runs that the page shows below.

    Raises:
        MissingExtraError: matplotlib or Jinja is not installed.
    """
    _require_packages()
    chart = charts.draw(partial(charts.draw_tasks, figures=figures))
    return _render([_Section(title, tables, note, chart, [_run_section(name, run) for name, run in runs.items()])])


def _require_packages() -> None:
    if not can_draw():
        raise MissingExtraError("report", "report pages with charts")


def _render(sections: Sequence[_Section]) -> str:
    from jinja2 import Environment

    source = resources.files("nybble").joinpath("report/page.html").read_text("utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source).render(sections=sections, marker=MARKER)


def _run_section(name: str, results: RunResults) -> _RunSection:
    facts = {
        "Command": results.command_line,
        "Time": f"{sum(results.seconds.values()):.0f} s",
        "Peak memory": memory_text(results),
        "Schemes": schemes_text(results),
        "Quantized weights": "" if results.changes is None else f"{changes_text(results.changes)}.",
        "Seed": str(results.seed),
        "Machine": ", ".join(
            str(results.machine[key])
            for key in ("platform", "processor", "cpu", "memory", "cuda")
            if results.machine.get(key)
        ),
        "Versions": versions_text(results),
    }
    known = {key: value for key, value in facts.items() if value}
    return _RunSection(name, summary(results), results.warnings, known, _run_charts(results), _run_tables(results))


def _run_charts(results: RunResults) -> list[tuple[str, Markup]]:
    """Title and SVG of the charts that the run has results for."""
    task = results.task
    drawn = [
        (
            f"Loss and validation{training_title(results, training)}",
            charts.draw(partial(charts.draw_training, training=training, task=task)),
        )
        for training in results.trainings
        if training.steps or training.validation
    ]
    if task is not None and len(task.candidates) > 1:
        drawn.append(("Ranks", charts.draw(partial(charts.draw_ranks, task=task))))
    if results.layer_errors:
        drawn.append(("Errors per linear layer", charts.draw(partial(charts.draw_layer_maps, results=results))))
    if results.decoder_errors:
        drawn.append(("Error per decoder layer", charts.draw(partial(charts.draw_decoder_errors, results=results))))
    if results.block_losses:
        drawn.append(("Block-wise reconstruction", charts.draw(partial(charts.draw_block_losses, results=results))))
    drawn.append(("Time", charts.draw(partial(charts.draw_times, results=results))))
    return drawn


def _run_tables(results: RunResults) -> list[tuple[str, Cells, str]]:
    """Title, cells and note of the tables that the run has results for."""
    task, tables = results.task, []
    if (other := other_rows(results))[1]:
        tables.append((other_title(results), other, ""))
    if task is not None and task.search is not None:
        tables.append(("Search for ranks", ranks.search_rows(task.search), ranks.search_note(results, task)))
        if task.search.front:
            tables.append(("Score against sum of ranks", ranks.front_rows(task.search), ranks.FRONT_NOTE))
    if task is not None and task.tested:
        tables.append(("Tested configurations", ranks.eval_only_rows(task), ranks.EVAL_ONLY_NOTE))
    if (decoder := decoder_rows(results))[1]:
        tables.append(("Table of decoder layers", decoder, decoder_note(results)))
    if results.layer_errors:
        tables.append(("Table of linear layers", layer_rows(results), LAYER_NOTE))
    return tables
