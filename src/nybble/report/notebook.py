"""How a notebook shows a run: its summary, its table, and a chart if matplotlib is installed."""

from __future__ import annotations

from functools import partial
from html import escape
from pathlib import Path

from nybble.report import charts
from nybble.report.comparison import compare_runs
from nybble.report.html import can_draw
from nybble.report.run import result_rows, summary
from nybble.run.results import RunResults


def run_as_html(results: RunResults, path: Path) -> str:
    """The results of a run as a fragment of HTML."""
    parts = [f"<p><code>{escape(str(path))}</code></p>", f"<p>{escape(summary(results))}</p>"]
    if "16bit" in results.models:
        headings, rows = result_rows(results)
        lines = [_line(headings, "th"), *(_line(row, "td") for row in rows)]
        parts.append(f"<table>{''.join(lines)}</table>")
        if can_draw():
            (comparison,) = compare_runs({path.name: results}, {})
            parts.append(str(charts.draw(partial(charts.draw_models, comparison=comparison))))
    return "\n".join(parts)


def _line(cells: list[str], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"
