"""Options as TOML: recipes that people write, and config.toml in a run folder."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from nybble.errors import OptionError
from nybble.options.base import NONE, Command, typed_values

CONFIG = "config.toml"
# Never written to a file and never taken from one: only a flag makes nybble run code that comes with a model.
TRUST = "trust_remote_code"
# What one start was told to do is no property of the run.
_OF_ONE_START = ("resume", "overwrite", "eval_only", "shard", TRUST)


def read_toml(path: Path) -> dict[str, Any]:
    """Values of a TOML file.

    Raises:
        OptionError: missing or malformed.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"{path} must be a TOML file; it cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML
        raise OptionError(f"{path} must be a TOML file; it is not valid: {error}") from error


def recipe_values(kind: type[Command], path: Path) -> dict[str, Any]:
    """Option values from a recipe that a person gave by --config.

    Raises:
        OptionError: missing, malformed, an unknown option, a value of the wrong type, or permission to run a model's
            code.
    """
    try:
        found = read_toml(path)
    except OptionError as error:
        raise OptionError(f"--config {error}") from error
    values = {key.replace("-", "_"): value for key, value in found.items()}
    if twice := [key for key in found if "-" in key and key.replace("-", "_") in found]:
        raise OptionError(
            f"--config {path} must give each option once; {twice[0]} is there as {twice[0].replace('-', '_')} too"
        )
    if isinstance(values.get("layer"), dict):
        values["layer"] = _layer_rules(values["layer"])
    if values.get(TRUST):
        raise OptionError(
            f"--config {path} must not allow Python code that comes with a model; remove {TRUST}, and give it as a "
            f"flag "
            "if you trust the model"
        )
    return typed_values(kind, values, f"--config {path}: ")


def _layer_rules(table: dict[str, Any]) -> list[str]:
    """The rules of --layer in a table of a recipe: {"lm_head": {"bits": 4}} -> ["lm_head:bits=4"]."""
    return [
        f"{pattern}:{','.join(f'{key}={json.dumps(value)}' for key, value in settings.items())}"
        if isinstance(settings, dict)
        else f"{pattern}={settings}"  # no rule, which is said where rules are read
        for pattern, settings in table.items()
    ]


def run_values(kind: type[Command], folder: Path) -> dict[str, Any]:
    """Option values from the config.toml of a run, without permission to run code: whoever uses a run gives that again.

    Raises:
        OptionError: missing, malformed, or not the options of this command.
    """
    path = folder / CONFIG
    values = {key: value for key, value in read_toml(path).items() if key != TRUST}
    return typed_values(kind, values, f"{path}: ")


def to_toml(options: Command) -> str:
    """TOML text of all options that have a value (TOML has no word for None), except those of a single start.

    Texts, numbers and booleans are written as in JSON, apart from one character that JSON leaves bare, and numbers that
    are not finite. Empty lists are written as "none".
    """
    lines = []
    for key, value in options.flat().items():
        if value is None or key in _OF_ONE_START:
            continue
        if isinstance(value, float):
            text = str(value)
        else:
            text = json.dumps(NONE if value == () else value, ensure_ascii=False)
        lines.append(f"{key} = {text}\n")
    return "".join(lines).replace("\x7f", "\\u007f")
