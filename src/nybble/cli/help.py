"""Help texts: commands, and the options of a command in groups. --help shows the basic ones, --help-all all of them."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import textwrap
import typing
from typing import Any

from nybble.options.base import NONE, Command, Group, describe_type

USAGE = """\
usage: nybble COMMAND [options]

nybble turns a Hugging Face causal language model into an INT4 model that keeps
its accuracy.

  compress       compress a model to INT4 without training; export, measure
  distill        distill a 16-bit model into its own INT4 copy; export, measure
  tune           tune a model on a downstream task, in INT4; export, measure
  compare        compare INT4 tuning with 16-bit LoRA on several tasks
  search RUN     search for better adapter ranks after tune
  export RUN     export a finished run to other runtimes
  chat RUN       talk to a run, an export or a model in the terminal
  eval MODEL     measure perplexity, KL divergence and lm-eval tasks
  inspect RUN    show every quantized layer
  report RUN...  write one page about one run or several
  env            show versions and hardware

nybble COMMAND --help shows the basic options of a command, --help-all all of
them. --config FILE.toml holds any of them. Flags may be written with _ or -.

Example: nybble compress --pretrained smollm2 --data python-docs
"""


class OptionParser(argparse.ArgumentParser):
    """argparse without its own exit: the caller turns errors into one line."""

    def error(self, message: str) -> typing.NoReturn:
        """Raise ValueError with the message."""
        raise ValueError(message)


class _Formatter(argparse.HelpFormatter):
    """Help that folds at spaces alone: values such as python-docs stay whole."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


def help_text(kind: type[Command], everything: bool) -> str:
    """The help of a command.

    Args:
        everything: show all options instead of the basic ones.
    """
    width = min(100, max(60, shutil.get_terminal_size().columns)) - 2

    def formatter(prog: str) -> argparse.HelpFormatter:
        return _Formatter(prog, max_help_position=28, width=width)

    positional = kind.positional()
    usage = f"nybble {kind.NAME}" + (f" {positional.upper()}" if positional else "") + " [options]"
    parser = OptionParser(usage=usage, description=(kind.__doc__ or "").split("\n")[0], formatter_class=formatter,
                          add_help=False)  # fmt: skip
    hidden = 0
    types = kind.types()
    for title, fields in _by_title(kind).items():
        shown = [field for field in fields if everything or field.metadata["basic"]]
        hidden += len(fields) - len(shown)
        group = parser.add_argument_group(title)
        for field in sorted(shown, key=lambda field: not field.metadata["required"]):
            text = _help_of(field)
            if field.name == positional:
                group.add_argument(field.name, metavar=field.name.upper(), help=text)
            elif types[field.name] is bool:
                group.add_argument(f"--{'no_' if field.default else ''}{field.name}", action="store_true", help=text)
            else:
                group.add_argument(f"--{field.name}", metavar=_metavar(types[field.name]), help=text)
    other = parser.add_argument_group("Help and files")
    other.add_argument("--config", metavar="FILE", help="TOML file with options by the same names; flags override it.")
    other.add_argument("--help", action="store_true", help="Show the basic options.")
    if hidden:
        other.add_argument("--help-all", action="store_true", help=f"Show all options ({hidden} more).")
    return parser.format_help()


def _by_title(kind: type[Command]) -> dict[str, list[dataclasses.Field[Any]]]:
    titles: dict[str, list[dataclasses.Field[Any]]] = {}
    groups: dict[str, type[Group]] = kind.groups()
    for group in groups.values():
        titles.setdefault(group.TITLE, []).extend(dataclasses.fields(group))  # type: ignore[arg-type]
    return titles


def _help_of(field: dataclasses.Field[Any]) -> str:
    text = field.metadata["help"]
    if field.metadata["required"]:
        return f"Required. {text}".replace("%", "%%")
    default = field.default
    if isinstance(default, bool) or default in (None, "") or "Default:" in text:
        shown = ""
    elif isinstance(default, tuple):
        shown = f" [{' '.join(map(str, default)) or NONE}]"
    else:
        shown = f" [{default}]"
    return f"{text}{shown}".replace("%", "%%")


def _metavar(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "{" + ",".join(typing.get_args(hint)) + "}"
    words = {"a number": "X", "a whole number": "N", "text": "TEXT", "a list of texts": "NAME ...",
             "a list of whole numbers": "N ..."}  # fmt: skip
    return words[describe_type(hint)]
