"""How a notebook shows a run."""

from pathlib import Path

import pytest

from nybble.report import notebook
from nybble.report.html import can_draw
from tests.helpers.runs import compressed, distilled


@pytest.mark.skipif(not can_draw(), reason="the extra report")
def test_a_run_is_shown_with_summary_table_and_chart() -> None:
    html = notebook.run_as_html(distilled(), Path("runs/<a>"))
    for part in ("runs/&lt;a&gt;", "Training recovered 50%", "<td>INT4, distilled (Toy)</td>", "<svg"):
        assert part in html, part


def test_without_matplotlib_there_is_no_chart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notebook, "can_draw", lambda: False)
    html = notebook.run_as_html(distilled(), Path("run"))
    assert "<svg" not in html
    assert "<table>" in html


def test_a_run_that_measured_nothing_is_shown_as_unfinished() -> None:
    html = notebook.run_as_html(compressed(models={}), Path("run"))
    assert "the run is not finished" in html
    assert "<table>" not in html
