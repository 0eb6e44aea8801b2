"""`nybble COMMAND --flags`.

Exit codes: 0 done; 2 something that a person can repair (one line on stderr says what); 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module, metadata

from nybble import runtime
from nybble.cli.help import USAGE, help_text
from nybble.cli.parse import parse
from nybble.errors import NybbleError, OptionError
from nybble.options.commands import COMMANDS

# Where the function of a command is. Imported when it is called: torch and transformers take seconds.
_FUNCTIONS = {
    "compress": "nybble.workflows.compress:compress",
    "distill": "nybble.workflows.distill:distill",
    "tune": "nybble.workflows.tune:tune",
    "compare": "nybble.workflows.compare:compare",
    "search": "nybble.workflows.search:search",
    "export": "nybble.workflows.export:export",
    "eval": "nybble.workflows.evaluate:evaluate",
    "inspect": "nybble.workflows.inspect:inspect",
    "report": "nybble.workflows.report:report",
}
_HELP = ("-h", "--help", "help")
_HELP_ALL = ("--help-all", "--help_all")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    runtime.set_openmp_spin()
    runtime.keep_freed_memory()
    try:
        _run(arguments)
    except (
        NybbleError,
        OSError,
    ) as error:  # OSError: a full disk, a folder without permission, a name that is too long
        print(f"nybble: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which may not be loaded yet
            raise
        print(
            "nybble: the device must have memory for this; it ran out; use a smaller model, or --device cpu",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        kind = COMMANDS.get(arguments[0]) if arguments else None
        resumable = kind is not None and "resume" in kind.fields()
        remedy = "; the same command with --resume continues from the last checkpoint" if resumable else ""
        print(f"nybble: interrupted{remedy}", file=sys.stderr)
        return 130
    return 0


def _run(arguments: list[str]) -> None:
    if not arguments or arguments[0] in _HELP:
        print(USAGE, end="")
    elif arguments[0] == "--version":
        print(f"nybble {metadata.version('nybble')}")
    elif arguments[0] == "env":
        if arguments[1:]:
            raise OptionError(f"nybble env takes no arguments; got {' '.join(arguments[1:])}")
        from nybble.cli.environment import show_environment

        show_environment()
    elif arguments[0] in COMMANDS and any(argument in (*_HELP, *_HELP_ALL) for argument in arguments[1:]):
        everything = any(argument in _HELP_ALL for argument in arguments[1:])
        print(help_text(COMMANDS[arguments[0]], everything), end="")
    else:
        options = parse(arguments)
        options.check()  # now rather than after the seconds that torch and transformers take to load
        from nybble.console import set_up_logging

        set_up_logging()
        module, function = _FUNCTIONS[options.NAME].split(":")
        getattr(import_module(module), function)(options)
