"""Comparisons of nybble compare: one alone, several seeds, several settings, and what people read of them."""

from pathlib import Path
from typing import Any

import pytest

from nybble.errors import OptionError
from nybble.report.combine import CombinedComparison, combine, difference_rows, figure_rows
from nybble.report.figures import Figure, Figures
from nybble.report.five_columns import COLUMNS, read_comparison
from tests.helpers.runs import known, write_columns

ROW = dict.fromkeys(COLUMNS, known("01"))


def combined(folder: Path, *comparisons: tuple[Figures, dict[str, Any]]) -> CombinedComparison:
    """Comparisons with their figures and options, in folders 0, 1, ..."""
    folders = [write_columns(folder / str(i), figures, **options) for i, (figures, options) in enumerate(comparisons)]
    return combine([read_comparison(path) for path in folders])


def test_figures_are_shown_in_percent_with_errors_and_mean() -> None:
    headings, rows = figure_rows(
        {"one": dict.fromkeys(COLUMNS, Figure(0.5, 101)), "two": dict.fromkeys(COLUMNS, Figure(1.0, 101))}
    )
    assert headings == ["task", *COLUMNS]
    assert [row[0] for row in rows] == ["one", "two", "mean"]
    assert (rows[0][1], rows[2][5]) == ("50.0 +- 5.0", "75.0 +- 2.5")
    assert len(figure_rows({"one": ROW})[1]) == 1, "no mean of a single task"


def test_differences_are_those_of_the_last_column() -> None:
    better, worse = known("1" * 36 + "0" * 64), known("1" * 30 + "0" * 6 + "1" * 4 + "0" * 60)
    figures = {task: dict.fromkeys(COLUMNS, worse) | {COLUMNS[-1]: better} for task in ("a", "b")}
    headings, rows = difference_rows(figures)
    assert headings == ["INT4, QAT + NLS, minus", *COLUMNS[:-1]]
    assert rows[0] == ["a", *["+2.0 +- 3.2"] * 4]
    assert rows[-1] == ["mean", *["+2.0 +- 2.2"] * 4]
    unknown = dict.fromkeys(COLUMNS, Figure(0.3, 100)) | {COLUMNS[-1]: better}
    assert difference_rows({"a": unknown})[1] == [["a", *["+6.0"] * 4]], "rows are not known: no error"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "Epochs and ranks were chosen on held-out rows."),
        (
            {"select_on": "test"},
            "ranks on the TEST rows, as in published results: the last column is no score on unseen",
        ),
        ({}, "Percent of the test rows that were right"),
        ({"limit": 20}, "Percent of the first 20 test rows (--limit) that were right"),
        ({"seed": 5}, "Seed 5."),
        ({"rank_sampling": "sandwich"}, "trained on three configurations per step, at three times the computation"),
        ({}, "The first two columns were computed in float32."),
        ({}, "PTWC (post-training weight compression): awq+se+gptq."),
        ({}, "adapters on 16-bit weights, then awq+se, then scales and norms in INT4."),
        ({"quantize": "during", "method": "rtn"}, "adapters inside the rounding, initialized by rtn."),
        ({"quantize": "during", "init_from": "runs/a"}, "adapters inside the rounding, initialized by runs/a."),
        ({}, "Loss on: choices."),
    ],
)
def test_the_note_says_how_figures_were_made(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    note = combined(tmp_path, ({"a": ROW}, options)).note
    assert words in note
    assert "best of" not in note
    assert ("three configurations" in note) == ("rank_sampling" in options)


def test_different_losses_are_named_with_their_tasks(tmp_path: Path) -> None:
    found = combined(tmp_path, ({"b": ROW, "a": ROW, "c": ROW}, {}))
    assert "Loss on: choices." in found.note
    comparison = read_comparison(tmp_path / "0")
    comparison.objectives["c"] = "answer"
    assert "Loss on: choices (a, b), answer (c)." in combine([comparison]).note


def test_seeds_are_averaged_row_by_row(tmp_path: Path) -> None:
    low, high = known("1100"), known("1010")
    rows = (dict.fromkeys(COLUMNS, low) | {COLUMNS[-1]: last} for last in (high, low))
    found = combined(tmp_path, *(({"a": row}, {"seed": seed}) for seed, row in enumerate(rows)))
    assert found.figures["a"][COLUMNS[0]] == low
    assert found.figures["a"][COLUMNS[-1]] == Figure(0.5, 4, (1.0, 0.5, 0.5, 0.0))
    assert "Means of 2 seeds; the standard errors are those of the rows" in found.note
    assert "best of" not in found.note
    assert found.tables[2] == (["mean over its tasks", *COLUMNS], [["0", *["50.0"] * 5], ["1", *["50.0"] * 5]])
    assert list(found.runs) == ["0/a/qat-nls", "0/a/qat-lora", "1/a/qat-nls", "1/a/qat-lora"]


def test_of_settings_the_best_is_shown_and_the_note_says_so(tmp_path: Path) -> None:
    def figures(value: float) -> Figures:
        return {"a": dict.fromkeys(COLUMNS, Figure(value, 4)) | {COLUMNS[1]: Figure(1 - value, 4)}}

    found = combined(
        tmp_path,
        (figures(0.25), {"epochs": 3}),
        (figures(0.75), {"epochs": 4}),
        (figures(0.5), {"epochs": 4, "seed": 1}),
    )
    values = [found.figures["a"][column].value for column in COLUMNS[:3]]
    assert values == [0.625, 0.75, 0.625], "the mean over the seeds of a setting, then the best setting"
    assert "the best of 2 settings (--epochs 3, 4), chosen by the same test rows" in found.note
    assert "Means of 1 to 2 seeds" in found.note


def test_models_have_rows_of_their_own(tmp_path: Path) -> None:
    found = combined(tmp_path, *(({"a": ROW}, {"pretrained": model}) for model in ("x/one", "x/two")))
    assert list(found.figures) == ["one a", "two a"]
    assert found.title == "x/one, x/two"
    assert "best of" not in found.note


def test_seeds_are_counted_per_task(tmp_path: Path) -> None:
    found = combined(tmp_path, ({"a": ROW}, {"seed": 0}), ({"b": ROW}, {"seed": 1}), ({"c": ROW}, {"seed": 0}))
    assert "Seed 0, 1." in found.note
    assert list(found.figures) == ["a", "b", "c"]


def test_the_same_comparison_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="must differ in model, options, seed or tasks; .*0 and .*1 do not; name one"):
        combined(tmp_path, ({"a": ROW}, {}), ({"a": ROW}, {}))


def test_markdown_is_escaped(tmp_path: Path) -> None:
    text = combined(tmp_path, ({"a": ROW}, {"pretrained": "<b>m"})).markdown()
    assert text.startswith("# &lt;b&gt;m\n\n| task |")
    assert "| a | 50.0 +- 50.0 |" in text
    assert text.endswith("Seed 0.\n")


@pytest.mark.usefixtures("_no_drawing")
def test_the_page_has_tables_and_tuned_runs(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra report")
    page = combined(tmp_path, ({"a": ROW}, {})).html()
    for part in ("INT4, QAT + NLS, minus", "50.0 +- 50.0", "<h2>a/qat-nls</h2>", "<h2>a/qat-lora</h2>"):
        assert part in page, part
