"""Tables of text for the terminal and for Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.table import Table

from nybble.console import console

# Headings, and rows with one cell per heading.
Cells = tuple[list[str], list[list[str]]]
# In the first lines of every page and Markdown file that nybble report writes. It replaces no other files.
MARKER = "<!-- written by nybble report -->"

_PUNCTUATION = re.compile(r"([\\`*\[\]|~$])")
# Between letters or digits an underscore is plain text in GitHub's Markdown; elsewhere it can begin or end emphasis.
_UNDERSCORE = re.compile(r"(?<![^\W_])_|_(?![^\W_])")


def as_table(headings: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> Table:
    """A table for the terminal: the first column is aligned to the left, the others to the right.

    Where the terminal is narrow, headings of the others fold at words and the first column folds anywhere, so that no
    number is cut.
    """
    table = Table(title=title, title_justify="left")
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    narrow = sum(widths) + 3 * len(widths) + 1 > console.width
    for i, heading in enumerate(headings):
        cells = [*heading.split(), *(row[i] for row in rows)]
        width = max(map(len, cells)) if narrow and i else None
        table.add_column(heading, justify="right" if i else "left", width=width, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def as_markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, without a line break at the end. Cells are plain text; markup in them is escaped."""
    alignment = ["---"] + ["---:"] * (len(headings) - 1)
    lines = [list(map(escape_markdown, headings)), alignment, *(list(map(escape_markdown, row)) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def escape_markdown(text: str) -> str:
    """Plain text as Markdown that shows it: one line, no HTML tags, no emphasis, no links, no cell borders.

    Names of runs, models and tasks come from folders and files that may be someone else's.
    """
    text = " ".join(text.split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _UNDERSCORE.sub(r"\\_", _PUNCTUATION.sub(r"\\\1", text))
