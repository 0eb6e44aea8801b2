"""The file that makes a folder a run. Other programs have a config.toml too; none has this."""

from __future__ import annotations

import json
from pathlib import Path

from nybble.files import write_text

MARKER = "nybble-run.json"
_FORMAT = "nybble-run-1"


def is_run(folder: Path) -> bool:
    """Whether the folder has the marker of a run."""
    try:
        return json.loads((folder / MARKER).read_text(encoding="utf-8"))["format"] == _FORMAT  # type: ignore[no-any-return]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_marker(folder: Path) -> None:
    """Make the folder a run."""
    write_text(folder / MARKER, json.dumps({"format": _FORMAT}) + "\n")
