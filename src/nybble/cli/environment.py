"""`nybble env`: versions and hardware."""

from __future__ import annotations

from rich.table import Table

from nybble.console import console
from nybble.run.machine import describe_machine


def show_environment() -> None:
    """Print versions and hardware."""
    facts = describe_machine()
    table = Table("what", "value")
    for key, value in (facts | facts.pop("versions")).items():
        table.add_row(key, "none" if value is None else str(value))
    console.print(table)
