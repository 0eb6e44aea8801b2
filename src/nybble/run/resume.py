"""What must be the same when a run is resumed: its command, its options, and what it reads."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nybble.errors import OptionError, RunError
from nybble.options.base import NONE, Command, typed_values
from nybble.options.commands import COMMANDS, CompareOptions, RunCommand
from nybble.options.toml import CONFIG, read_toml, run_values, to_toml
from nybble.run.marker import MARKER, is_run
from nybble.run.results import RunResults, has_results, read_results

# Options that may change on resume. Another microbatch size or weight cache gives the same gradients up to rounding:
# the last bits may differ. --offload changes no bit.
_MAY_CHANGE = {
    "custom_rank_config",
    "eval_batch_size",
    "export",
    "fast_eval",
    "gradient_checkpointing",
    "keep_positions",
    "microbatch_size",
    "offload",
    "other_data",
    "output_dir",
    "report_to",
    "save_steps",
    "trust_remote_code",
    "weight_cache",
}


def saved_options(folder: Path) -> dict[str, Any]:
    """Option values in the config.toml of a run; "none" is an empty list, as options have it.

    Versions without --base_weights kept the weights themselves, so their runs go on with exact ones.

    Raises:
        RunError: this is not a run folder, or its configuration is missing or damaged.
    """
    if not folder.exists():
        raise RunError(f"{folder} must be a run folder; there is nothing at this path; check the path")
    if not is_run(folder):
        guess = f"; did you mean {folder.parent}?" if is_run(folder.parent) else ""
        raise RunError(f"{folder} must be a run folder; it has no {MARKER} of nybble's{guess}")
    if not (folder / CONFIG).is_file():
        raise RunError(
            f"{folder} must be a complete run; its {CONFIG} is missing; bring it back, or make the run again"
        )
    try:
        values = read_toml(folder / CONFIG)
        # Options of the same name have the same type in every command.
        kind = next((kind for kind in COMMANDS.values() if values.keys() <= kind.fields().keys()), CompareOptions)
        typed_values(kind, values, "")
    except OptionError as error:
        raise RunError(
            f"{folder / CONFIG} must be the options of a run; {error}; bring it back, or make the run again"
        ) from error
    kept = {"base_weights": "exact"} if "base_weights" in kind.fields() else {}
    return kept | {key: [] if value == NONE else value for key, value in values.items()}


def resumed_values(kind: type[RunCommand], values: dict[str, Any]) -> dict[str, Any]:
    """The options of a start: those of the run that it continues, where there is one, and `values` in their place.

    Args:
        kind: the command.
        values: option name -> value, as given.

    Raises:
        OptionError: an unknown name, or a value of the wrong type.
        RunError: there is no run, and nothing to begin one with; or another command began it.
    """
    options = kind.of(**values)
    folder = options.folder
    names_a_run = options.run.output_dir and not options.model.pretrained and kind is not CompareOptions
    if options.run.resume and names_a_run and not is_run(folder):
        raise RunError(f"--resume must find a run in {folder}; there is none; check --output_dir")
    if not options.run.resume or not is_run(folder) or not (folder / CONFIG).is_file():
        return values
    check_same_command(folder, kind.NAME)
    saved = run_values(kind, folder)
    if values.get("eval_only"):  # the run may have been given ranks that nybble search has replaced since
        saved.pop("custom_rank_config", None)
    return saved | values


def check_same_command(folder: Path, command: str) -> None:
    """Raise RunError where another command than this one, by the name in the results, began the run in `folder`."""
    if not has_results(folder):
        return
    began = read_results(folder).command
    if began not in (command, ""):
        raise RunError(
            f"--resume must continue a run of nybble {command}; {folder} was begun by nybble {began}; choose another "
            "--output_dir"
        )


def check_same_options(folder: Path, options: Command) -> None:
    """Raise RunError, naming the option, unless these are the options of the run or may change on resume.

    An option that the run's version of nybble did not have yet was as its default is.
    """
    defaults, now = (
        {key: [] if value == NONE else value for key, value in tomllib.loads(to_toml(values)).items()}
        for values in (type(options)(), options)
    )
    before = defaults | saved_options(folder)
    # Left to the memory that is free; a run that goes on keeps what it began with.
    automatic = {key for key in ("base_weights",) if "auto" in (before.get(key), now.get(key))}
    automatic |= {"method"} if before.get("method") == "auto" else set()  # of a version that did not note the choice
    for key in sorted((before.keys() | now.keys()) - _MAY_CHANGE - automatic):
        if before.get(key) != now.get(key):
            raise RunError(
                f"--resume must use the options of the run {folder}: --{key} was {_readable(before.get(key))}, got "
                f"{_readable(now.get(key))}; give it as it was, or choose another --output_dir"
            )


def check_same_inputs(results: RunResults, now: Mapping[str, str]) -> None:
    """Note the fingerprints of what the run reads, or compare them with those noted when it began.

    Raises:
        RunError: something changed since the run began; it is named.
    """
    before = results.fingerprints
    changed = [what for what, fingerprint in now.items() if before.get(what, fingerprint) != fingerprint]
    if changed:
        it = "it" if len(changed) == 1 else "them"
        if changed == ["text of another domain"]:
            it += ", or leave it out (--other_data none)"
        raise RunError(
            f"--resume must find what the run began with; the {' and the '.join(changed)} changed; bring {it} back, or "
            "start again (--overwrite)"
        )
    results.fingerprints = dict(before or now)


def _readable(value: Any) -> str:
    return (" ".join(map(str, value)) or NONE) if isinstance(value, list) else str(value)
