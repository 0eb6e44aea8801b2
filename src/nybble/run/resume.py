"""Options of a run on disk, and whether they are the same on resume."""

from __future__ import annotations

import logging
import tomllib
from pathlib import Path
from typing import Any

from nybble.errors import RunError
from nybble.options.commands import read_toml, to_toml
from nybble.run.results import CONFIG, MARKER, is_run

log = logging.getLogger("nybble")
# Options that may change on resume. Another microbatch or cache gives the same gradients up to rounding: the last bits may differ.
_FREE = {
    "output_dir",
    "save_every",
    "tensorboard",
    "export",
    "eval_batch_size",
    "cache",
    "microbatch",
    "fast_eval",
    "custom_rank_config",
    "trust_remote_code",
}


def read_options(path: Path) -> dict[str, Any]:
    """Values in the config.toml of a run; RunError if this is not a run folder."""
    if not is_run(path):
        raise RunError(f"{path} must be a run folder; it has no {MARKER} of nybble's")
    if not (path / CONFIG).is_file():
        raise RunError(f"{path} must be a whole run; its {CONFIG} is missing; bring it back, or make the run again")
    return read_toml(path / CONFIG)


def check_same_options(path: Path, options: Any) -> None:
    """Raise RunError, naming the option, unless these are the options of the run, but for what may change on resume."""
    before, now = read_options(path), tomllib.loads(to_toml(options))
    for key in sorted((before.keys() | now.keys()) - _FREE):
        if before.get(key) != now.get(key):
            raise RunError(
                f"--resume must use the options of the run {path}: --{key} was {before.get(key)}, got {now.get(key)}; "
                "give it as it was, or choose another --output_dir"
            )
