"""Command line -> options. Later sources win: defaults, the run's config.toml on --resume, --config, flags."""

from __future__ import annotations

import argparse
import types
import typing
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from nybble.cli.help import OptionParser
from nybble.errors import OptionError
from nybble.options.base import NONE, Command, describe_type
from nybble.options.commands import COMMANDS, RunCommand
from nybble.options.toml import recipe_values


def parse(arguments: Sequence[str]) -> Command:
    """The options of a command.

    Raises:
        OptionError: an unknown command or flag (the nearest is named), or a value of the wrong type.
        RunError: --resume names a run of another command.
    """
    name, flags = arguments[0], [_underscored(argument) for argument in arguments[1:]]
    if name not in COMMANDS:
        raise OptionError(
            f"unknown command {name}{_nearest(name, [*COMMANDS, 'env'])}; the commands are {', '.join(COMMANDS)}, env"
        )
    kind = COMMANDS[name]
    _check_known(kind, flags)
    given = _parse_flags(kind, flags)
    config = given.pop("config", None)
    values = {} if config is None else recipe_values(kind, Path(config))
    if given.get("resume") and issubclass(kind, RunCommand):
        from nybble.run.resume import resumed_values  # it imports torch, which --help does without

        values = resumed_values(kind, values | given)
    return kind.of(**values | given)


def _check_known(kind: type[Command], flags: Sequence[str]) -> None:
    known = [f"--{name}" for name in (*kind.fields(), "config", "help", "help_all")]
    for flag in flags:
        stem = flag.split("=")[0]
        if stem.startswith("--") and stem not in known and stem.replace("--no_", "--", 1) not in known:
            raise OptionError(
                f"unknown flag {stem} of nybble {kind.NAME}{_nearest(stem, known)}; see nybble {kind.NAME} --help-all"
            )


def _parse_flags(kind: type[Command], flags: Sequence[str]) -> dict[str, Any]:
    """Option name -> value of what is given by flags, `config` included."""
    parser = OptionParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    positional, hints = kind.positional(), kind.types()
    parser.add_argument("--config")
    for name, hint in hints.items():
        if hint is bool:
            parser.add_argument(f"--{name}", dest=name, action="store_true")
            parser.add_argument(f"--no_{name}", dest=name, action="store_false")
            continue
        several = typing.get_origin(hint) is tuple
        place: dict[str, Any] = {"nargs": "+"} if several else {}
        if kind.fields()[name].metadata["repeat"]:
            place["action"] = "extend"
        if name == positional:
            place["nargs"] = "*" if several else "?"
        parser.add_argument(name if name == positional else f"--{name}", **place)
    try:
        given = vars(parser.parse_args(list(flags)))
    except ValueError as error:
        raise OptionError(f"{error}; see nybble {kind.NAME} --help") from error
    return {name: value if name not in hints else _converted(name, value, hints[name]) for name, value in given.items()}


def _converted(name: str, value: Any, hint: Any) -> Any:
    """A flag's text as a value of the option's type; OptionError if it is none."""
    if isinstance(value, bool):
        return value
    if typing.get_origin(hint) is tuple:
        if value == [NONE]:
            return ()
        return tuple(_converted(name, item, typing.get_args(hint)[0]) for item in value)
    kinds = typing.get_args(hint) if typing.get_origin(hint) is types.UnionType else (hint,)
    if value == NONE and type(None) in kinds:
        return None
    try:
        return int(value) if int in kinds else float(value) if float in kinds else value
    except ValueError as error:
        raise OptionError(f"--{name} must be {describe_type(hint)}; got {value}") from error


def _underscored(argument: str) -> str:
    stem, equals, value = argument.partition("=")
    return ("--" + stem[2:].replace("-", "_") if stem.startswith("--") else stem) + equals + value


def _nearest(word: str, words: Sequence[str]) -> str:
    near = get_close_matches(word, words, 1)
    return f"; did you mean {near[0]}?" if near else ""
