"""The file that makes a folder a run. Other programs have a config.toml too; none has this."""

from __future__ import annotations

import json
from pathlib import Path

from nybble.files import write_text
from nybble.schema import SchemaError, read_json

MARKER = "nybble-run.json"
_FORMAT = "nybble-run-1"


def is_run(folder: Path) -> bool:
    """Whether the folder has the marker of a run."""
    try:
        return bool(read_json(folder / MARKER) == {"format": _FORMAT})
    except SchemaError:
        return False


def write_marker(folder: Path) -> None:
    """Make the folder a run."""
    write_text(folder / MARKER, json.dumps({"format": _FORMAT}) + "\n")
