"""`nybble report`: one page about one run or several."""

from __future__ import annotations

from pathlib import Path

from nybble.options.commands import ReportOptions
from nybble.report.command import make_report


def report(options: ReportOptions) -> None:
    """Write the page, or print the table in the published form."""
    asked = options.report
    make_report([Path(run) for run in asked.runs], None if asked.out is None else Path(asked.out), asked.table)
