"""results.json of a run."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from nybble.errors import RunError

log = logging.getLogger("nybble")

CONFIG, RESULTS = "config.toml", "results.json"
# The file that makes a folder a run, and what it holds. Other programs have a config.toml too; none has this.
MARKER, _MARKER_FORMAT = "nybble-run.json", "nybble-run-1"


def is_run(path: Path) -> bool:
    """Whether the folder has the marker of a run."""
    try:
        return json.loads((path / MARKER).read_text(encoding="utf-8"))["format"] == _MARKER_FORMAT  # type: ignore[no-any-return]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read_results(path: Path) -> dict[str, Any]:
    """results.json of a run; {} where there is none, RunError where it is not what nybble wrote."""
    file = path / RESULTS
    if not file.is_file():
        return {}
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        if "models" in results.keys():  # noqa: SIM118 (a list has no keys: AttributeError)
            return results  # type: ignore[no-any-return]
        problem = "it has no models"
    except (OSError, ValueError, AttributeError) as error:
        problem = f"it cannot be read ({error})"
    raise RunError(f"{file} must be the results of a run; {problem}; repair it, or make the run again")
