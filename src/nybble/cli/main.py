"""The command line: `nybble COMMAND --flags`. One verb a command, made from the option classes in config.py.

Exit codes: 0 done, 2 something a person can repair (one line on stderr says what), 130 interrupted.
"""

from __future__ import annotations

import ctypes
import dataclasses
import io
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from difflib import get_close_matches
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import tyro

from nybble.errors import NybbleError, OptionError
from nybble.options.commands import (
    CompressOptions,
    DistillOptions,
    EvalOptions,
    ExportOptions,
    InspectOptions,
    ReportOptions,
    SearchOptions,
    TuneOptions,
    check_kind,
    from_toml,
    of_run,
)

# Numbers of mallopt(3).
_MMAP_MAX, _TRIM_THRESHOLD, _TOP_PAD = -4, -1, -2

# Command -> its options, and where the function is that takes them; imported when it is called, for torch and transformers take seconds.
COMMANDS: dict[str, tuple[type, str]] = {
    "distill": (DistillOptions, "nybble.workflows.distill:distill"),
    "tune": (TuneOptions, "nybble.workflows.compare:tune_or_compare"),
    "search": (SearchOptions, "nybble.workflows.search:search"),
    "compress": (CompressOptions, "nybble.workflows.compress:compress"),
    "export": (ExportOptions, "nybble.cli.commands:export"),
    "eval": (EvalOptions, "nybble.cli.commands:evaluate"),
    "inspect": (InspectOptions, "nybble.cli.commands:inspect"),
    "report": (ReportOptions, "nybble.cli.commands:make_report"),
}

USAGE = """nybble turns a Hugging Face causal language model into a 4-bit model that keeps its accuracy.

  nybble distill --pretrained MODEL     distil the 16-bit model into its own 4-bit self, export, measure
  nybble tune --pretrained MODEL --task T   tune it in 4 bits on a downstream task, adapters of elastic rank; export, measure
  nybble search RUN                     search for better ranks after tune, and compare with random draws
  nybble compress --pretrained MODEL    compress it without training: rtn, awq, se, gptq, blockwise; export, measure
  nybble export RUN --to openvino       export a finished run again
  nybble eval MODEL_OR_RUN              perplexity, KL to a teacher, lm-eval tasks
  nybble inspect RUN_OR_EXPORT          every quantized layer: shape, grid, error, clipped share
  nybble report RUN...                  one page: curves, bars a stage, layers; --table for the published kind of table
  nybble env                            versions and hardware

MODEL is a hub id, a local folder, a .gguf file, or smollm2 (built in). Flags may be written with _ or -; every command has
--config FILE.toml and --help.

Try:  nybble distill --pretrained smollm2 --config recipes/demo.toml
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    spin_briefly()
    keep_freed_memory()
    try:
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(USAGE, end="")
        elif arguments[0] == "--version":
            print(f"nybble {metadata.version('nybble')}")
        elif arguments == ["env"]:
            from nybble.cli.commands import environment

            environment()
        else:
            options, command = parse(arguments)
            if hasattr(options, "check"):
                options.check()  # now rather than after the seconds that torch and transformers take to load
            from nybble.console import set_up_logging

            set_up_logging()
            module, function = command.split(":")
            getattr(import_module(module), function)(options)
    except (
        NybbleError,
        OSError,
    ) as error:  # OSError: a full disk, a folder without permission, a name that is too long
        print(f"nybble: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not loaded yet
            raise
        print(
            "nybble: the device must have memory for this; it ran out; use a smaller model, or --device cpu",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        kind = COMMANDS[arguments[0]][0] if arguments[0] in COMMANDS else None
        print(
            "nybble: interrupted"
            + ("; the same command with --resume goes on from the last checkpoint" if hasattr(kind, "resume") else ""),
            file=sys.stderr,
        )
        return 130
    return 0


def spin_briefly() -> None:
    """GNU OpenMP, before torch starts its threads: a thread that waits for the others spins for some ten microseconds, then sleeps. One that sleeps at once
    costs a step of `tune` 40 % more time on 2 cores; one that spins as long as is usual nearly doubles it where other programs run on them (docs/log.md)."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def keep_freed_memory() -> None:
    """glibc: reuse freed memory instead of handing it back. Training frees and asks for the same large tensors all the time, and
    fresh pages cost more than the arithmetic on them: a step on 2 cores takes about a fifth less time (docs/log.md)."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        for parameter, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 64 << 20)):
            libc.mallopt(parameter, value)
    except (OSError, AttributeError):  # not glibc: nothing to tune
        pass


def parse(arguments: Sequence[str]) -> tuple[Any, str]:
    """Command line -> options, and where the function is that takes them.

    Values come from, the later the stronger: defaults, the run's config.toml on --resume, --config, flags.
    """
    name, flags = arguments[0], [_dashes(a) for a in arguments[1:]]
    if name == "env":
        raise OptionError(f"nybble env takes no arguments; got {' '.join(flags)}")
    if name not in COMMANDS:
        raise OptionError(
            f"unknown command {name}{_nearest(name, [*COMMANDS, 'env'])}; the commands are {', '.join(COMMANDS)}, env"
        )
    kind, command = COMMANDS[name]
    fields = {field.name: field for field in dataclasses.fields(kind)}
    known = [f"--{field.replace('_', '-')}" for field in fields] + ["--config", "--help"]
    for flag in flags:
        stem = flag.split("=")[0]
        if stem.startswith("--") and stem not in known and stem.replace("--no-", "--", 1) not in known:
            raise OptionError(
                f"unknown flag {stem.replace('-', '_').replace('__', '--', 1)} of nybble {name}{_nearest(stem, known)}; see nybble {name} --help"
            )

    flags, config = _take(flags, "--config")
    values = {} if config is None else from_toml(kind, Path(config))
    if "--resume" in flags:
        saved = _parse_flags(name, kind, flags, values).folder / "config.toml"
        if saved.is_file():
            check_kind(saved.parent, kind)
            run = of_run(kind, saved.parent)
            if (
                "--eval-only" in flags
            ):  # what the run was given need not be what is in place: `nybble search` puts other ranks there
                run.pop("custom_rank_config", None)
            values = run | values
    return _parse_flags(name, kind, flags, values), command


def _parse_flags(name: str, kind: type, flags: list[str], values: dict[str, Any]) -> Any:
    """tyro's parser; its boxes of errors become one line."""
    box = io.StringIO()
    try:
        with redirect_stderr(box):
            default = tyro.MISSING_NONPROP if not values else _with_defaults(kind, values)
            description = (kind.__doc__ or "").split("\n")[0]
            return tyro.cli(
                kind,
                args=flags,
                default=default,
                prog=f"nybble {name}",
                description=description,
                config=(tyro.conf.PositionalRequiredArgs,),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        lines = [line.strip("│╭╮╰╯─ ") for line in box.getvalue().splitlines()]
        text = " ".join(line for line in lines[1 : next((i for i, x in enumerate(lines) if i and not x), None)] if line)
        raise OptionError(f"{text or box.getvalue()}; see nybble {name} --help") from stop


def _with_defaults(kind: type, values: dict[str, Any]) -> Any:
    required = {f.name: tyro.MISSING for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING}
    return kind(**required | values)


def _take(flags: list[str], flag: str) -> tuple[list[str], str | None]:
    """Flags without `flag` and its value, and that value."""
    for i, text in enumerate(flags):
        if text == flag and i + 1 < len(flags):
            return flags[:i] + flags[i + 2 :], flags[i + 1]
        if text.startswith(flag + "="):
            return flags[:i] + flags[i + 1 :], text.split("=", 1)[1]
    if flag in flags:
        raise OptionError(f"{flag} needs a value")
    return flags, None


def _dashes(argument: str) -> str:
    stem, equals, value = argument.partition("=")
    return (stem.replace("_", "-") if stem.startswith("--") else stem) + equals + value


def _nearest(word: str, words: Sequence[str]) -> str:
    near = get_close_matches(word, words, 1)
    return f"; did you mean {near[0].replace('-', '_').replace('__', '--', 1)}?" if near else ""
