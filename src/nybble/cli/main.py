"""`nybble COMMAND --flags`.

Exit codes: 0 done; 2 something that a person can repair (one line on stderr says what); 70 a fault of nybble; 130, 143
and 129 interrupted by Ctrl-C, SIGTERM and SIGHUP; 141 the program that reads the output has ended (`| head`).
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module, metadata

from nybble import processes, rendezvous, runtime
from nybble.cli.help import USAGE, help_text
from nybble.cli.parse import parse
from nybble.errors import NybbleError, OptionError, first_line
from nybble.options.commands import COMMANDS

# Where the function of a command is. Imported when it is called: torch and transformers take seconds.
_FUNCTIONS = {
    "compress": "nybble.workflows.compress:compress",
    "distill": "nybble.workflows.distill:distill",
    "tune": "nybble.workflows.tune:tune",
    "compare": "nybble.workflows.compare:compare",
    "search": "nybble.workflows.search:search",
    "export": "nybble.workflows.export:export",
    "chat": "nybble.workflows.chat:chat",
    "eval": "nybble.workflows.evaluate:evaluate",
    "inspect": "nybble.workflows.inspect:inspect",
    "report": "nybble.workflows.report:report",
}
# Commands that divide their work among the processes of torchrun or accelerate launch.
_IN_SEVERAL_PROCESSES = ("compress", "distill", "tune", "search")
# Commands whose stdout is their result alone, where it is no terminal; all others report what they do there.
_RESULT_ON_STDOUT = ("eval", "chat")
# What torch raises as a RuntimeError on a CPU, on Linux and on Windows.
_NO_MEMORY = ("can't allocate memory", "cannot allocate memory", "not enough memory")
_CLOSED_PIPE = 141  # as a shell reports a process that SIGPIPE ended
_HELP = ("-h", "--help", "help")
_HELP_ALL = ("--help-all", "--help_all")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    is_program, interrupted = arguments is None, False
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not _streams_are_open():
        return _fail("stdout must be open; it is closed; redirect it, to /dev/null if nothing is to be seen", 2)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    runtime.set_openmp_spin()
    runtime.set_openmp_threads()
    runtime.keep_freed_memory()
    try:
        with runtime.interrupt_on_signals(only_once=rendezvous.launched() > 1):
            code = _exit_code(arguments)
    except KeyboardInterrupt as interruption:  # also one that came while an error was handled
        code, interrupted = _interrupted(arguments, interruption), True
    processes.end(code)
    if is_program and interrupted:  # Python's own end waits for threads, and answers another Ctrl-C with a traceback
        runtime.end_now(code)
    return code


def _exit_code(arguments: list[str]) -> int:
    """Run the command; its errors become a line on stderr."""
    try:
        with processes.joined():
            _run(arguments)
        sys.stdout.flush()  # now rather than when Python ends, which does not tell what is wrong
    except Exception as error:
        runtime.raise_if_interrupted()  # the error may be what a library made of the interruption
        if (code := _lost_output(error)) is not None:
            return code
        if isinstance(error, NybbleError | OSError):  # OSError: a full disk, no permission, a name that is too long
            return _fail(_followable(arguments, str(error).replace("\n", " ")), 2)
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which may not be loaded yet
            return _fail(
                "the device must have memory for this; it ran out; use a smaller model, or --device cpu",
                2,
            )
        if isinstance(error, MemoryError) or any(words in str(error).lower() for words in _NO_MEMORY):
            offload = " or --offload disk" if _has_option(arguments, "offload") else ""
            return _fail(
                "the machine must have memory for this; it ran out; close other programs, or use a smaller model"
                + offload,
                2,
            )
        return _unforeseen(arguments, error)
    return 0


def _streams_are_open() -> bool:
    """Open stdin and stderr where they are closed (`<&-`), as the next file would get their number; is stdout open?"""
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    return sys.stdout is not None


def _lost_output(error: Exception) -> int | None:
    """The exit code where what was printed went nowhere; None for any other error.

    nybble writes files in blocks that name them (files.reporting_full_disk), so that an error without a name is that of
    a stream.
    """
    numbers = (errno.EPIPE, errno.ENOSPC, errno.EFBIG, errno.EIO)
    if not isinstance(error, OSError) or error.filename is not None or error.errno not in numbers:
        return None
    with suppress(OSError, ValueError):  # or Python would try again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):
        said = processes.claim_end(_CLOSED_PIPE)
        return _CLOSED_PIPE if said is None else said
    return _fail(f"stdout must take what is printed; it cannot: {error.strerror}; redirect it elsewhere", 2)


def _has_option(arguments: Sequence[str], name: str) -> bool:
    kind = COMMANDS.get(arguments[0]) if arguments else None
    return kind is not None and name in kind.fields()


def _followable(arguments: Sequence[str], message: str) -> str:
    """The message without the advice to add --resume, where the command has none."""
    if _has_option(arguments, "resume"):
        return message
    return message.replace("then add --resume", "then run the command again")


def _fail(message: str, code: int) -> int:
    """Print the line of an error, unless another process has printed why all of them end; returns the exit code."""
    said = processes.claim_end(code)
    if said is None:
        with suppress(OSError):  # stderr is closed too
            print(_folded(f"nybble: {message.encode(errors='backslashreplace').decode()}"), file=sys.stderr)
    return code if said is None else said


def _folded(line: str) -> str:
    """The line, folded at spaces where stderr is a terminal."""
    if not sys.stderr.isatty():
        return line
    width = shutil.get_terminal_size().columns
    return "\n".join(textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False)) or line


def _interrupted(arguments: list[str], interruption: KeyboardInterrupt) -> int:
    remedy = ""
    if _has_option(arguments, "resume"):
        remedy = "; the same command with --resume continues from the last checkpoint"
    remedy += "".join(getattr(interruption, "__notes__", ()))  # what the workflow says of what is done
    number = interruption.signal if isinstance(interruption, runtime.Interrupted) else signal.SIGINT
    cause = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
    return _fail(f"interrupted{cause}{remedy}", 128 + number)


def _unforeseen(arguments: list[str], error: Exception) -> int:
    """Report an exception that no check foresaw; its traceback goes to a file."""
    text = f"nybble {' '.join(arguments)}\n\n{''.join(traceback.format_exception(error))}"
    try:
        descriptor, path = tempfile.mkstemp(prefix="nybble-error-", suffix=".log")
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError:  # no space even for this
        path = "stderr"
        print(text, file=sys.stderr)
    what = f"{type(error).__name__}: {first_line(error)}"
    return _fail(f"this is a fault of nybble ({what}); please report it with the details in {path}", 70)


def _run(arguments: list[str]) -> None:
    if processes.count() > 1 and (not arguments or arguments[0] not in _IN_SEVERAL_PROCESSES):
        remedy = "start it without torchrun and accelerate launch"
        if arguments[:1] == ["compare"]:
            remedy += ", once for each GPU: each takes columns that no other makes"
        raise OptionError(
            f"only {', '.join(_IN_SEVERAL_PROCESSES)} run in several processes; nybble {' '.join(arguments[:1])} was "
            f"started in {processes.count()}; {remedy}"
        )
    if not arguments or arguments[0] in _HELP:
        print(USAGE, end="")
    elif arguments[0] == "--version":
        print(f"nybble {metadata.version('nybble')}")
    elif arguments[0] == "env":
        if set(arguments[1:]) & {*_HELP, *_HELP_ALL}:
            print("usage: nybble env\n\nShow versions and hardware.")
            return
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
        from nybble.console import console, set_up_logging

        set_up_logging(options.NAME in _RESULT_ON_STDOUT)
        module, function = _FUNCTIONS[options.NAME].split(":")
        try:
            getattr(import_module(module), function)(options)
        finally:
            console.stderr = False  # for whatever this process does next
