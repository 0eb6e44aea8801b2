"""What a folder is: a run, which a file tells (other programs have a config.toml too), or more than that."""

from __future__ import annotations

import json
from pathlib import Path

from nybble.errors import RunError
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


def check_deletable(path: Path) -> None:
    """Raise RunError where --overwrite would delete from a folder that is more than a run, marker or not."""
    resolved, here, home = path.resolve(), Path.cwd().resolve(), Path.home().resolve()
    if resolved == here or resolved in here.parents:
        what = "the current folder or one above it"
    elif resolved == home or resolved in home.parents:
        what = "the home folder or one above it"
    elif (path / ".git").exists():
        what = "a git repository"
    else:
        return
    raise RunError(f"--overwrite must name the folder of a run alone; {path} is {what}; choose another --output_dir")
