"""Tables for the terminal and in Markdown."""

from __future__ import annotations

from rich.table import Table


def as_table(headings: list[str], lines: list[list[str]], title: str | None = None) -> Table:
    """For the terminal."""
    made = Table(title=title, title_justify="left")
    for i, text in enumerate(headings):
        made.add_column(text, justify="left" if i == 0 else "right", no_wrap=i == 0)
    for line in lines:
        made.add_row(*line)
    return made


def as_markdown(headings: list[str], lines: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(
        "| " + " | ".join(row) + " |" for row in (headings, ["---"] + ["---:"] * (len(headings) - 1), *lines)
    )
