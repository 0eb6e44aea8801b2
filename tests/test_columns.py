"""Comparisons: figures, their errors and differences; one alone, several seeds, several settings; what people read of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nybble import files
from nybble.cli.main import main
from nybble.errors import RunError
from nybble.options.commands import TuneOptions
from nybble.report import five_columns
from nybble.report.five_columns import COLUMNS, Figure, differences, mean, rows
from nybble.run import results as run_results


def known(right: str) -> Figure:
    return Figure(right.count("1") / len(right), len(right), tuple(map(float, right)))


def comparison(folder: Path, figures: dict[str, dict[str, Figure]], **changes: Any) -> str:
    """A folder as `nybble tune --compare` leaves it."""
    results = {"models": {}, "dtype": "float32", "task": {"loss_on": "choices"}}
    for task in figures:
        (folder / task / "qat-nls").mkdir(parents=True)
        files.write_text(folder / task / "qat-nls" / run_results.RESULTS, json.dumps(results))
    five_columns.write(folder, TuneOptions(**{"pretrained": "m", "output_dir": str(folder)} | changes), figures)
    return str(folder)


def test_errors_and_mean() -> None:
    half = Figure(0.5, 101)
    assert half.error == pytest.approx(0.05)
    assert Figure(0.36, 100, known("1" * 36 + "0" * 64).right).error == pytest.approx(Figure(0.36, 100).error), (
        "of zeros and ones both formulas give the same"
    )
    assert mean([(0.5, 0.05), (1.0, 0.0)]) == (0.75, pytest.approx(0.025))
    headings, lines = rows({"one": dict.fromkeys(COLUMNS, half), "two": dict.fromkeys(COLUMNS, Figure(1.0, 101))})
    assert headings == ["task", *COLUMNS]
    assert [line[0] for line in lines] == ["one", "two", "mean"]
    assert lines[0][1] == "50.0 +- 5.0"
    assert lines[2][5] == "75.0 +- 2.5"


def test_what_a_column_is_better_by_is_known_row_by_row() -> None:
    better, worse = known("1" * 36 + "0" * 64), known("1" * 30 + "0" * 6 + "1" * 4 + "0" * 60)
    each = torch.tensor(better.right) - torch.tensor(worse.right)
    assert better.less(worse) == (pytest.approx(0.02), pytest.approx(each.std().item() / 10))
    assert worse.less(better)[0] == pytest.approx(-0.02)
    figures = {task: dict.fromkeys(COLUMNS, worse) | {COLUMNS[-1]: better} for task in ("a", "b")}
    headings, lines = differences(figures)
    assert headings == ["INT4, QAT + NLS, less", *COLUMNS[:-1]]
    assert lines[0] == ["a", *["+2.0 +- 3.2"] * 4]
    assert lines[-1] == ["mean", *["+2.0 +- 2.2"] * 4]
    unknown = dict.fromkeys(COLUMNS, Figure(0.3, 100)) | {COLUMNS[-1]: better}
    assert differences({"a": unknown})[1] == [["a", *["+6.0"] * 4]], "rows of an older run are not known"


def test_a_comparison_is_read_as_it_was_written(tmp_path: Path) -> None:
    figures = {"a": dict.fromkeys(COLUMNS, known("0110")), "b": dict.fromkeys(COLUMNS, Figure(0.25, 8))}
    comparison(tmp_path, figures, seed=3, epochs=2)
    found = five_columns.read(tmp_path)
    assert found.figures == figures
    assert (found.model, found.seed, found.setting["epochs"], found.learnt) == (
        "m",
        3,
        2,
        {"a": "choices", "b": "choices"},
    )
    assert json.loads((tmp_path / "compare.json").read_text())["figures"]["a"]["BF16"] == {
        "value": 0.5,
        "error": pytest.approx(0.2887, abs=1e-4),
        "documents": 4,
        "right": "0110",
    }


@pytest.mark.parametrize(
    ("select_on", "said"),
    [
        ("held_out", "chosen on held-out rows, ranks too."),
        ("test", "ranks on the TEST rows, as published results do: the last column is not one on unseen rows."),
    ],
)
def test_the_note_says_what_ranks_were_chosen_on(select_on: str, said: str, tmp_path: Path) -> None:
    comparison(tmp_path, {"a": dict.fromkeys(COLUMNS, known("01"))}, select_on=select_on, seed=5)
    note = five_columns.together([five_columns.read(tmp_path)]).note
    assert said in note
    assert "Seed 5." in note
    assert "best of" not in note
    assert "three configurations a step" not in note


def test_the_note_says_that_the_sandwich_rule_costs_more(tmp_path: Path) -> None:
    comparison(tmp_path, {"a": dict.fromkeys(COLUMNS, known("01"))}, sampling="sandwich")
    assert (
        "trained on three configurations a step, three times the computation"
        in five_columns.together([five_columns.read(tmp_path)]).note
    )


def test_seeds_are_averaged_row_by_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    low, high = known("1100"), known("1010")
    folders = [
        comparison(tmp_path / f"s{seed}", {"a": dict.fromkeys(COLUMNS, low) | {COLUMNS[-1]: last}}, seed=seed)
        for seed, last in ((0, high), (1, low))
    ]
    found = five_columns.together([five_columns.read(Path(folder)) for folder in folders])
    assert found.figures["a"][COLUMNS[0]] == low
    last = found.figures["a"][COLUMNS[-1]]
    assert last == Figure(0.5, 4, (1.0, 0.5, 0.5, 0.0))
    assert last.error == pytest.approx(torch.tensor(last.right).std().item() / 2)
    assert "Means of 2 seeds; the errors are those of the rows" in found.note
    assert "best of" not in found.note
    assert found.tables[2] == (["mean over its tasks", *COLUMNS], [["s0", *["50.0"] * 5], ["s1", *["50.0"] * 5]])
    assert list(found.runs) == ["s0/a/qat-nls", "s1/a/qat-nls"]
    assert main(["report", *folders, "--table"]) == 0
    said = capsys.readouterr().out
    assert "| a | 50.0 +- 28.9 |" in said
    assert "Means of 2 seeds" in said


def test_of_settings_the_best_is_shown_and_said_to_be(tmp_path: Path) -> None:
    def figures(value: float) -> dict[str, dict[str, Figure]]:
        return {"a": dict.fromkeys(COLUMNS, Figure(value, 4)) | {COLUMNS[1]: Figure(1 - value, 4)}}

    for name, value, changes in (
        ("e3", 0.25, {"epochs": 3}),
        ("e4", 0.75, {"epochs": 4}),
        ("e4s1", 0.5, {"epochs": 4, "seed": 1}),
    ):
        comparison(tmp_path / name, figures(value), **changes)
    found = five_columns.together([five_columns.read(tmp_path / name) for name in ("e3", "e4", "e4s1")])
    assert [found.figures["a"][column].value for column in COLUMNS[:3]] == [0.625, 0.75, 0.625], (
        "the mean of the seeds of one setting, then the best setting"
    )
    assert "best of 2 settings (--epochs 3, 4) on these very rows" in found.note
    assert "Means of 1 to 2 seeds" in found.note


def test_models_have_rows_of_their_own(tmp_path: Path) -> None:
    for model in ("x/one", "x/two"):
        comparison(tmp_path / Path(model).name, {"a": dict.fromkeys(COLUMNS, known("01"))}, pretrained=model)
    found = five_columns.together([five_columns.read(tmp_path / name) for name in ("one", "two")])
    assert list(found.figures) == ["one a", "two a"]
    assert found.title == "x/one, x/two"
    assert "best of" not in found.note


def test_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="the page needs the extra report")
    folder = comparison(tmp_path / "runs", {"a": dict.fromkeys(COLUMNS, known("01"))})
    monkeypatch.setattr(five_columns, "TUNED", ())  # runs have pages of their own, tested in test_page.py
    assert main(["report", folder]) == 0
    html = (tmp_path / "runs" / "report.html").read_text()
    assert "INT4, QAT + NLS, less" in html
    assert "<svg" in html
    assert "| a | 50.0 +- 50.0 |" in (tmp_path / "runs" / "report.md").read_text()
    assert "report.html" in capsys.readouterr().out


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error_of(*arguments: str) -> str:
        assert main(["report", *arguments]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    figures = {"a": dict.fromkeys(COLUMNS, known("01"))}
    one, other = (comparison(tmp_path / name, figures) for name in ("one", "other"))
    assert "must differ in seed, setting, model or tasks" in error_of(one, other, "--table")
    (tmp_path / "run").mkdir()
    assert f"got {one}, which is a comparison, and {tmp_path / 'run'}, which is none" in error_of(
        str(tmp_path / "run"), one
    )
    (tmp_path / "one" / "compare.json").write_text('{"openbookqa": {"BF16": [0.5, 12]}}')
    assert "must be written by this version of nybble tune --compare" in error_of(one)


def test_tasks_that_are_compared_one_after_the_other_stay_together(tmp_path: Path) -> None:
    row = dict.fromkeys(COLUMNS, known("01"))
    comparison(tmp_path, {"a": row}, epochs=2)
    comparison(tmp_path, {"b": row}, epochs=2)
    assert list(five_columns.read(tmp_path).figures) == ["a", "b"]
    comparison(tmp_path, {"c": row}, epochs=3)
    assert list(five_columns.read(tmp_path).figures) == ["c"], "another setting"


def test_a_comparison_with_other_options_is_not_lost(tmp_path: Path) -> None:
    five_columns.check_same(tmp_path, TuneOptions(pretrained="m"))  # none yet
    comparison(tmp_path, {"a": dict.fromkeys(COLUMNS, known("01"))}, epochs=2)
    five_columns.check_same(tmp_path, TuneOptions(pretrained="m", epochs=2, eval_batch_size=3))
    for changes, what in (
        ({}, "--epochs 2; got 3"),
        ({"epochs": 2, "pretrained": "n"}, "--pretrained m; got n"),
        ({"epochs": 2, "seed": 7}, "--seed 0; got 7"),
    ):
        with pytest.raises(RunError, match=f"has a comparison of a with {what}; give each its own --output_dir"):
            five_columns.check_same(tmp_path, TuneOptions(**{"pretrained": "m"} | changes))
    (tmp_path / five_columns.FILE).write_text("{}")
    five_columns.check_same(tmp_path, TuneOptions(pretrained="m"))  # what cannot be read is written anew
    comparison(tmp_path, {"b": dict.fromkeys(COLUMNS, known("01"))})
    assert list(five_columns.read(tmp_path).figures) == ["b"]


def test_seeds_are_counted_task_by_task(tmp_path: Path) -> None:
    row = dict.fromkeys(COLUMNS, known("01"))
    one, two = (
        five_columns.read(Path(comparison(tmp_path / name, {name: row}, seed=seed)))
        for name, seed in (("a", 0), ("b", 1))
    )
    assert "Seed 0, 1." in five_columns.together([one, two]).note
    same = five_columns.read(Path(comparison(tmp_path / "c", {"c": row}, seed=0)))
    assert list(five_columns.together([one, same]).figures) == ["a", "c"], "of one seed, but not of the same tasks"


def test_one_comparison_by_two_names_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = comparison(tmp_path / "runs", {"a": dict.fromkeys(COLUMNS, known("01"))})
    assert main(["report", folder, f"{folder}/../runs", "--table"]) == 0
    assert "Seed 0." in capsys.readouterr().out


def test_a_comparison_without_matplotlib_names_the_extra(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = comparison(tmp_path / "runs", {"a": dict.fromkeys(COLUMNS, known("01"))})
    monkeypatch.setattr("nybble.report.html.available", lambda: False)
    assert main(["report", folder]) == 2
    assert "report" in capsys.readouterr().err
