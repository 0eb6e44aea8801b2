"""The page holds what the results hold, and needs nothing from outside of itself."""

import importlib.util
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from nybble.errors import MissingExtraError
from nybble.report.comparison import compare_runs
from nybble.report.html import can_draw, comparison_page
from nybble.report.tables import MARKER
from nybble.run.results import RunResults
from tests.helpers.runs import (
    candidate,
    compressed,
    measured_ranks,
    searched,
    task_results,
    tuned,
    with_everything,
)

needs_charts = pytest.mark.skipif(not can_draw(), reason="the extra report")


class Page(HTMLParser):
    """Checks nesting; gathers text, and addresses that a browser would fetch."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.parts: list[str] = []
        self.fetched: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.parts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br", "img", "link"):
            self.open.append(tag)
        for key, value in attrs:
            if key in ("src", "href", "xlink:href") and not (value or "").startswith(("#", "data:")):
                self.fetched.append(f"{tag} {value}")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.parts.append(data)


def page(**runs: RunResults) -> str:
    return comparison_page(compare_runs(runs, {}))


@needs_charts
def test_the_page_holds_tables_charts_and_facts_and_fetches_nothing() -> None:
    html = page(distilled=with_everything(decoder_errors={}, block_losses={}))
    read = Page(html)
    assert html.splitlines()[1] == MARKER
    assert read.fetched == []
    assert "$" not in read.text, "an axis label was not written as text"
    for part in (
        "12.000", "50%", "nybble distill --pretrained small", "careful <b>now</b>", "Linux, AVX2", "torch 2.13.0",
        "changed 6.2% of the codes, and scales by 2.50%", "1.23%", "3.45%", "model.layers.1.mlp.down_proj",
        "token perplexity", "KL divergence to 16-bit", "output error, round-to-nearest", "codes changed by training",
        "decoder layer", "seconds",
    ):  # fmt: skip
        assert part in read.text, part
    assert len(re.findall("<svg", html)) == 1 + 3, "the comparison; training, layers and times of the run"


@needs_charts
@pytest.mark.usefixtures("_no_drawing")
def test_names_of_runs_and_models_are_escaped() -> None:
    html = comparison_page(compare_runs({"<img src=x>": compressed(model="<script>m", command_line="a <b>")}, {}))
    assert "<script>" not in html
    assert "<img" not in html
    read = Page(html)
    for name in ("<script>m", "<img src=x>", "a <b>"):
        assert name in read.text


@needs_charts
@pytest.mark.usefixtures("_no_drawing")
def test_tables_of_ranks_are_shown_where_there_was_a_choice() -> None:
    def text_of(**fields: Any) -> str:
        task = task_results(candidates=[candidate("median", [4, 4])], chosen=[4, 4])
        for name, value in fields.items():
            setattr(task, name, value)
        return Page(page(run=tuned({"16bit": 0.5, "compressed": 0.4, "tuned": 0.6}, task))).text

    text = text_of()
    for part in ("Ranks", "Search for ranks", "Tested configurations"):
        assert part not in text, f"{part}: a single candidate is no choice"
    both = [candidate("median", [4, 4]), candidate("least loss 1", [2, 4])]
    text = text_of(candidates=both, search=searched(), tested=[measured_ranks([2, 2], 0.625)])
    for part in ("Ranks", "Search for ranks", "Score against sum of ranks", "fresh rows", "0.6250"):
        assert part in text, part


@pytest.mark.parametrize("missing", ["matplotlib", "jinja2"])
def test_without_its_packages_the_page_names_the_extra(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name))
    with pytest.raises(MissingExtraError, match='"report"'):
        page(run=compressed())
