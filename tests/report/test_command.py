"""nybble report: tables, pages, and refusals."""

from pathlib import Path

import pytest

from nybble.errors import OptionError, RunError
from nybble.report.command import make_report, write_report
from nybble.report.five_columns import COLUMNS
from nybble.report.html import can_draw
from nybble.report.tables import MARKER
from nybble.run.marker import write_marker
from nybble.run.results import Phase
from tests.helpers.runs import compressed, distilled, known, measured, write_columns, write_run

needs_charts = pytest.mark.skipif(not can_draw(), reason="the extra report")
pytestmark = pytest.mark.usefixtures("_no_drawing")
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [write_run(tmp_path / "distilled", distilled()), write_run(tmp_path / "awq", compressed())]


@needs_charts
def test_page_and_markdown_are_written_and_tables_are_printed(
    runs: list[Path], tmp_path: Path, capsys: Capture
) -> None:
    make_report(runs, tmp_path / "both.html", table=False)
    printed = capsys.readouterr().out
    assert "INT4, rtn, distilled (Toy)" in printed
    assert "Recovered: share of the damage to token perplexity" in printed
    assert "both.html (" in printed
    assert "kB, opens offline) and both.md" in printed
    assert "INT4, rtn, distilled (Toy)" in (tmp_path / "both.html").read_text()
    markdown = (tmp_path / "both.md").read_text()
    assert markdown.startswith(f"{MARKER}\n\n# Small: 2 runs\n")
    write_report(runs[1:], tmp_path / "both.html")
    assert "Small: 1 run\n" in (tmp_path / "both.md").read_text(), "its own files are replaced"


@needs_charts
def test_the_page_of_one_run_goes_into_its_folder_beside_its_own_report(runs: list[Path]) -> None:
    (runs[0] / "report.md").write_text("written by the run")
    assert write_report(runs[:1], None) == runs[0] / "report.html"
    assert (runs[0] / "report.html").is_file()
    assert (runs[0] / "report.md").read_text() == "written by the run"


@needs_charts
def test_the_page_of_several_runs_goes_into_the_current_folder(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert write_report(runs, None).resolve() == tmp_path / "here" / "report.html"
    assert (tmp_path / "here" / "report.md").is_file()


@needs_charts
@pytest.mark.parametrize("name", ["notes.md", "notes.html"])
def test_files_that_nybble_report_did_not_write_are_not_replaced(name: str, runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / name).write_text("<!doctype html>\nmine")
    with pytest.raises(OptionError, match=f"must not replace a file that nybble report did not write; .*{name}"):
        write_report(runs, tmp_path / "notes.html")
    assert (tmp_path / name).read_text() == "<!doctype html>\nmine"
    assert {path.name for path in tmp_path.glob("notes*")} == {name}, "nothing else was written"


def test_a_foreign_page_in_a_run_folder_is_not_replaced(runs: list[Path]) -> None:
    (runs[0] / "report.html").write_text("mine")
    with pytest.raises(OptionError, match="must not replace"):
        write_report(runs[:1], None)


def test_the_published_table_is_printed(runs: list[Path], tmp_path: Path, capsys: Capture) -> None:
    make_report(runs, None, table=True)
    printed = capsys.readouterr().out
    assert "| Small | INT4, QAT + LoRA | 12.000 | 20.0% |" in printed
    assert "PTWC: post-training weight compression." in printed
    assert "there is no improvement" not in printed
    assert not list(tmp_path.rglob("report.html"))


def test_the_published_table_names_what_it_lacks(tmp_path: Path, capsys: Capture) -> None:
    trained = write_run(tmp_path / "trained", distilled(init_trained=True))
    make_report([trained], None, table=True)
    assert (
        "Small: there is no improvement without a model that was compressed without training; name such a run too"
        in capsys.readouterr().out
    )
    few = compressed(limit=2)
    few.models["compressed"]["task:arc_easy acc"] = 0.5
    make_report([write_run(tmp_path / "few", few)], None, table=True)
    assert "Tasks were measured on the first 2 documents only (--limit)" in capsys.readouterr().out


def test_unfinished_runs_are_shown_as_far_as_they_are(runs: list[Path], tmp_path: Path, capsys: Capture) -> None:
    results = compressed(model="Large", phase=Phase.QUANTIZED)
    half = write_run(tmp_path / "half", results)
    begun = tmp_path / "begun"
    begun.mkdir()
    write_marker(begun)
    make_report([*runs, half, begun], None, table=True)
    printed = capsys.readouterr().out
    assert f"Not finished, and shown as far as measured: {half}, {begun}. Continue with --resume." in printed
    assert "| Large | 16-bit |" in printed


def test_a_run_by_several_names_is_one_run(runs: list[Path], capsys: Capture) -> None:
    make_report([runs[0], runs[0] / ".." / "distilled"], None, table=True)
    printed = capsys.readouterr().out
    assert "seeds" not in printed
    assert "| Small | INT4, QAT + LoRA |" in printed


def test_runs_in_folders_of_the_same_name_are_both_shown(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [
        write_run(tmp_path / parent / "run", measured(distilled(), toy={"token_perplexity": value}), seed=seed)
        for parent, value, seed in (("a", 11.0, 0), ("b", 12.0, 1))
    ]
    make_report(folders, None, table=True)
    assert "INT4, QAT + LoRA, 2 seeds" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path / "b")
    make_report([folders[0], Path("run")], None, table=True)
    assert "INT4, QAT + LoRA, 2 seeds" in capsys.readouterr().out


def test_results_without_options_can_be_shown(tmp_path: Path, capsys: Capture) -> None:
    tmp_path.joinpath("alone").mkdir()
    distilled().save(tmp_path / "alone")
    make_report([tmp_path / "alone"], None, table=True)
    assert "| Small | INT4, QAT + LoRA | 12.000 | 50.0% |" in capsys.readouterr().out


def test_a_comparison_is_printed(tmp_path: Path, capsys: Capture) -> None:
    folder = write_columns(tmp_path / "columns", {"a": dict.fromkeys(COLUMNS, known("1100"))})
    make_report([folder, folder / ".." / "columns"], None, table=True)
    printed = capsys.readouterr().out
    assert "| a | 50.0 +- 28.9 |" in printed
    assert "Seed 0." in printed


@needs_charts
def test_the_page_of_a_comparison_is_written(tmp_path: Path, capsys: Capture) -> None:
    folder = write_columns(tmp_path / "columns", {"a": dict.fromkeys(COLUMNS, known("01"))})
    make_report([folder], None, table=False)
    assert "INT4, QAT + NLS, minus" in (folder / "report.html").read_text()
    assert "| a | 50.0 +- 50.0 |" in (folder / "report.md").read_text()
    assert "report.html (" in capsys.readouterr().out


def test_what_is_no_run_is_refused(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        RunError, match=r"empty must be a run folder; it has no results\.json; name the folder of a run"
    ):
        make_report([*runs, tmp_path / "empty"], None, table=True)
    new = write_run(tmp_path / "new", compressed(models={}, phase=Phase.OPENED))
    with pytest.raises(
        RunError, match="new must have measured a model; nothing is measured yet; continue with --resume"
    ):
        make_report([new], None, table=True)


def test_contradictions_are_refused(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="needs one or more folders"):
        make_report([], None, table=True)
    with pytest.raises(OptionError, match="--table prints and writes no page; --out names a page; give one of them"):
        make_report(runs, tmp_path / "page.html", table=True)
    with pytest.raises(OptionError, match=r"--out must be a file name that ends with \.html; got .*page\.pdf"):
        make_report(runs, tmp_path / "page.pdf", table=False)
    folder = write_columns(tmp_path / "columns", {"a": dict.fromkeys(COLUMNS, known("01"))})
    with pytest.raises(OptionError, match=r"got .*columns, which is a comparison, and .*distilled, which is none"):
        make_report([runs[0], folder], None, table=True)


@needs_charts
def test_a_page_that_cannot_be_written_is_named(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(
        RunError, match=r"--out .*page\.html must be writable; No such file or directory; choose another"
    ):
        write_report(runs, tmp_path / "missing" / "page.html")
