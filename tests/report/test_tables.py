"""Tables show their cells as they are."""

import html
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from nybble.report import tables
from nybble.report.tables import as_markdown, as_table, escape_markdown


def shown(markdown: str) -> str:
    """What a reader of GitHub's Markdown sees of escaped text."""
    return html.unescape(re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", markdown))


def test_markdown_aligns_numbers_to_the_right() -> None:
    assert as_markdown(["model", "size"], [["a", "1"], ["b", "2"]]).splitlines() == [
        "| model | size |",
        "| --- | ---: |",
        "| a | 1 |",
        "| b | 2 |",
    ]


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("awq+se (runs/a_b-1)", "awq+se (runs/a_b-1)"),
        ("+2.0 +- 3.2", "+2.0 +- 3.2"),
        ("<img src=x>", "&lt;img src=x&gt;"),
        ("a|b", r"a\|b"),
        ("__init__", r"\_\_init\_\_"),
        ("a__b _c_ d_", r"a\_\_b \_c\_ d\_"),
        ("*bold* `code` [link](x) $x$ ~~no~~", r"\*bold\* \`code\` \[link\](x) \$x\$ \~\~no\~\~"),
        ("a\n# b", "a # b"),
        ("&lt;", "&amp;lt;"),
        ("C:\\new", r"C:\\new"),
    ],
)
def test_markup_in_names_is_escaped(text: str, escaped: str) -> None:
    assert escape_markdown(text) == escaped


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("ab _*`[]<>&|\\$~\n#")))
def test_escaped_text_is_shown_as_it_was(text: str) -> None:
    escaped = escape_markdown(text)
    assert shown(escaped) == " ".join(text.split())
    assert not re.search(r"(?<!\\)(\\\\)*[|*`\[~$]|[<>\n]", escaped), "no active markup"


def test_cells_and_headings_of_markdown_are_escaped() -> None:
    lines = as_markdown(["<b>"], [["a|b"]]).splitlines()
    assert (lines[0], lines[2]) == ("| &lt;b&gt; |", r"| a\|b |")


def test_the_terminal_shows_brackets() -> None:
    console = Console(width=60, markup=False, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(as_table(["model", "size"], [["[red]a[/red]", "1"]], title="[b]"))
    text = console.export_text()
    assert "[red]a[/red]" in text
    assert "[b]" in text


def test_a_narrow_terminal_cuts_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = Console(width=80, markup=False, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    monkeypatch.setattr(tables, "console", narrow)
    headings = ["model", "token perplexity", "KL divergence to 16-bit", "openbookqa acc_norm", "size", "recovered"]
    numbers = ["489672053.125", "0.1234", "0.3750", "123.4 MB", "100%"]
    narrow.print(as_table(headings, [["INT4, tuned on openbookqa, then awq+se+gptq, before training", *numbers]]))
    text = narrow.export_text()
    assert all(number in text for number in numbers)
    assert all(word in text for heading in headings for word in heading.split())
    assert max(map(len, text.splitlines())) <= 80


def test_the_terminal_aligns_names_to_the_left_and_numbers_to_the_right() -> None:
    columns = as_table(["model", "size"], [["a", "1"]]).columns
    assert [column.justify for column in columns] == ["left", "right"]
