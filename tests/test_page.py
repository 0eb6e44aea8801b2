"""The page holds what the results hold, and needs nothing from outside of itself."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from nybble.cli.main import main
from nybble.errors import MissingExtraError
from nybble.report import comparison
from nybble.report import html as report_html
from nybble.report import run as report_run

from .test_report import COMPRESSED, RESULTS

LAYERS = [f"model.layers.{i}.{kind}" for i in range(2) for kind in ("self_attn.q_proj", "mlp.down_proj")]
WHOLE: dict[str, Any] = RESULTS | {
    "method": "blockwise",
    "training": [{"step": i, "loss": 1 / (i + 1)} for i in range(4)],
    "best_step": 3,
    "warnings": ["careful <b>now</b>"],
    "layer_errors": {
        name: {"rtn": 0.01, "compressed": 0.005 * 0.1**i, "weight": 0.1, "clipped": 0.0}
        for i, name in enumerate(LAYERS)
    },
    "layer_codes_changed": dict.fromkeys(LAYERS, 0.0123),
    "layer_scales_moved": dict.fromkeys(LAYERS, 0.0345),
    "scales_moved": 0.025,
    "decoder_errors": {"compressed": [0.031, 0.042], "tuned": [0.021, 0.032]},
    "block_losses": {"model.layers.0": [0.02, 0.01], "model.layers.1": [0.03, 0.02]},
}


class Reader(HTMLParser):
    """Checks nesting; gathers text, and addresses that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br", "img", "link"):
            self.open.append(tag)
        for key, value in attributes:
            if key in ("src", "href", "xlink:href") and not (value or "").startswith(("#", "data:")):
                self.fetched.append(f"{tag} {value}")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self.open.pop() if self.open and self.open[-1] == tag else None

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        self.text.append(text)


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


def test_page_holds_tables_charts_and_facts_and_fetches_nothing() -> None:
    html = report_html.comparison_page(comparison.compare_runs({"tuned": WHOLE, "awq": COMPRESSED}))
    reader = read(html)
    text = " ".join(reader.text)
    assert "$" not in text, "matplotlib's marks for powers, of axes that are not set as formulas"
    for part in (
        "12.500",
        "60%",
        "nybble distill --pretrained small",
        "careful <b>now</b>",
        "changed 6.2% of the codes, and scales by 2.50%",
        "1.23%",
        "3.45%",
        "model.layers.1.mlp.down_proj",
    ):
        assert part in text, part
    assert text.count("0.001%") == 2 + 1  # beside the colours of both maps of errors; in the table of layers
    for axis in (
        "token perplexity",
        "KL to 16 bit",
        "output error, round-to-nearest",
        "codes changed by training",
        "scales moved by training",
        "relative error of its outputs",
        "decoder layer",
        "4.200%",
        "3.200%",
        "seconds",
    ):
        assert axis in text, axis
    assert (
        len(re.findall("<svg", html)) == 1 + 5 + 1
    )  # the comparison; curves, layers, decoder layers, blocks, times of one run; times of the other
    assert reader.fetched == []


def test_ranks_are_mapped_where_there_was_a_choice() -> None:
    row = {"score": 0.3, "behind": 0.0, "error": 0.1, "accuracy": 0.5}
    candidates = [
        row | {"why": "median", "configuration": [4, 4]},
        row | {"why": "least loss 1", "configuration": [2, 4], "score": 0.31},
    ]
    tuned = {
        "validation": [],
        "task": {"name": "letters", "metric": "acc", "space": [4, 2], "scored_by": "share"},
        "candidates": candidates,
        "chosen": [2, 4],
        "selected_on": "held_out",
    }
    text = " ".join(read(report_html.comparison_page(comparison.compare_runs({"run": WHOLE | tuned}))).text)
    assert text.index("least loss 1 (chosen)") < text.index("median"), "best first"
    assert "decoder layer" in text
    tested = {"configuration": [4, 2], "applied": [4, 2], "tested": [{"configuration": [2, 2], "acc": 0.625}]}
    on_test = [row | {"test": value} for row, value in zip(candidates, (0.7, 0.6), strict=True)]
    found = WHOLE | tuned | tested | {"candidates": on_test, "chosen": [4, 4], "selected_on": "test"}
    text = " ".join(read(report_html.comparison_page(comparison.compare_runs({"run": found}))).text)
    places = [text.index(words) for words in ("median (chosen)", "least loss 1", "in place (found by nybble search)")]
    assert places == sorted(places), "best on test first"
    for words in ("score on the test rows", "0.6250", "Tested configurations"):
        assert words in text, words
    assert "| 0.6250 | 2 everywhere |" in report_run.markdown(found)
    assert "Ranks" in text
    assert "Ranks" not in " ".join(
        read(
            report_html.comparison_page(
                comparison.compare_runs({"run": WHOLE | tuned | {"candidates": candidates[:1]}})
            )
        ).text
    )


def test_the_same_runs_give_the_same_page() -> None:
    comparisons = comparison.compare_runs({"tuned": WHOLE})
    assert report_html.comparison_page(comparisons) == report_html.comparison_page(comparisons)


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_html, "available", lambda: False)
    with pytest.raises(MissingExtraError, match="report"):
        report_html.comparison_page(comparison.compare_runs({"tuned": WHOLE}))


def write_run(folder: Path, results: dict[str, Any]) -> str:
    import json

    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(results))
    return str(folder)


def test_command_writes_page_and_markdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / "tuned", WHOLE), write_run(tmp_path / "awq", COMPRESSED)]
    assert main(["report", *runs, "--out", str(tmp_path / "both.html")]) == 0
    assert "60%" in " ".join(read((tmp_path / "both.html").read_text()).text)
    assert "| 4 bit, distilled from blockwise (OpenVINO) |" in (tmp_path / "both.md").read_text()
    (tmp_path / "tuned" / "report.md").write_text("the run's own")
    assert main(["report", runs[0]]) == 0
    assert (tmp_path / "tuned" / "report.html").is_file()
    assert (tmp_path / "tuned" / "report.md").read_text() == "the run's own"
    (tmp_path / "notes.md").write_text("mine")
    assert main(["report", *runs, "--out", str(tmp_path / "notes.html")]) == 2
    assert (tmp_path / "notes.md").read_text() == "mine"
    capsys.readouterr()
    assert main(["report", *runs, "--table"]) == 0
    assert "| Small | INT4, QAT + LoRA | 12.000 | 20.0% |" in capsys.readouterr().out
    assert main(["report", runs[0], "--table"]) == 0
    assert "no model compressed without any training to compare with; name such a run too" in capsys.readouterr().out
    few = write_run(tmp_path / "few", COMPRESSED | {"task_limit": 2})
    assert main(["report", few, "--table"]) == 0
    assert (
        "Small: Perplexity and KL on the test split. Word perplexity and tasks on the first 2 documents only"
        in capsys.readouterr().out
    )
    assert main(["report", *runs, "--table", "--out", str(tmp_path / "t.html")]) == 2


def test_the_table_of_a_long_list_of_runs_says_which_are_not_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = {key: value for key, value in WHOLE["models"].items() if key in ("16bit", "compressed")}
    begun = {key: value for key, value in WHOLE.items() if key != "warnings"} | {"model": "Large", "models": measured}
    runs = [write_run(tmp_path / "done", WHOLE), write_run(tmp_path / "half", begun)]
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "nybble-run.json").write_text('{"format": "nybble-run-1"}')
    (tmp_path / "begun" / "config.toml").write_text('pretrained = "x"\nseed = 0\n')
    assert main(["report", *runs, str(tmp_path / "begun"), "--table"]) == 0
    printed = capsys.readouterr().out
    assert (
        f"Not finished, and shown as far as measured: {tmp_path / 'half'}, {tmp_path / 'begun'}; go on with --resume."
        in printed.replace("\n", " ")
    )
    assert "| Small | INT4, QAT + LoRA |" in printed
    assert "| Large | 16 bit |" in printed


def test_a_run_by_two_names_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "one", WHOLE)
    (tmp_path / "one" / "nybble-run.json").write_text('{"format": "nybble-run-1"}')
    (tmp_path / "one" / "config.toml").write_text('pretrained = "m"\nseed = 0\n')
    assert main(["report", run, f"{run}/", f"{run}/../one", "--table"]) == 0
    assert "seeds" not in capsys.readouterr().out


def test_command_refuses_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "new", {"model": "Small", "models": {}})
    assert main(["report", str(tmp_path)]) == 2
    assert "must be a run folder; it has no results.json" in capsys.readouterr().err
    assert main(["report", run]) == 2
    assert "has measured nothing yet" in capsys.readouterr().err
    assert main(["report"]) == 2
    good = write_run(tmp_path / "tuned", WHOLE)
    assert main(["report", good, "--out", str(tmp_path / "page.pdf")]) == 2
    assert "ending with .html" in capsys.readouterr().err
    assert main(["report", good, "--out", str(tmp_path / "none" / "page.html")]) == 2
    assert "must be writable" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "ends"),
    [
        ({"16bit": -6.96, "compressed": -7.2, "tuned": -3.5}, (-7.2 - 1.11, -3.5 + 1.11)),
        ({"16bit": -1.0, "compressed": -5.0, "tuned": -0.1}, (-5.0 - 1.47, 0.0)),
        ({"16bit": 0.25, "compressed": 0.2, "tuned": 0.5}, (0.11, 0.59)),
    ],
)
def test_bars_of_a_task_are_on_the_axis(values: dict[str, float], ends: tuple[float, float]) -> None:
    from matplotlib.figure import Figure

    models = {row: {"task:own log_likelihood": value, "bytes": 1} for row, value in values.items()}
    results = WHOLE | {
        "kind": "tune",
        "task": {"name": "own", "metric": "log_likelihood", "space": [4]},
        "models": models,
    }
    figure = Figure()
    report_html._stages(figure, comparison.compare_runs({"run": results})[0])
    assert figure.axes[0].get_xlim() == pytest.approx(ends)
