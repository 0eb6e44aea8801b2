"""Write src/nybble/keywords.py: the options of the commands as typed keywords, for type checkers and editors.

python dev/make_keywords.py
"""

import dataclasses
import typing
from pathlib import Path

from nybble.options.base import Command
from nybble.options.commands import CompareOptions, CompressOptions, DistillOptions, TuneOptions

TARGET = Path(__file__).parents[1] / "src" / "nybble" / "keywords.py"
HEAD = '''"""Keywords of nybble.compress, distill, tune and compare. Written by dev/make_keywords.py; do not edit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict
'''


def type_text(hint: typing.Any) -> str:
    """The annotation of an option as a keyword."""
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0].__name__
        return f"{item} | Sequence[{item}]" if item != "str" else "str | Sequence[str]"
    if typing.get_origin(hint) is Literal:
        return "Literal[" + ", ".join(f'"{value}"' for value in typing.get_args(hint)) + "]"
    return getattr(hint, "__name__", None) or str(hint)


Literal = typing.Literal


def keywords(kind: type[Command]) -> str:
    """A TypedDict of a command's options."""
    name = kind.__name__.replace("Options", "Keywords")
    lines = [f"class {name}(TypedDict, total=False):", f'    """Options of nybble {kind.NAME}."""', ""]
    types = kind.types()
    lines += [f"    {field.name}: {type_text(types[field.name])}" for field in kind.fields().values()]
    return "\n".join(lines)


def text() -> str:
    """The file."""
    kinds = (CompressOptions, DistillOptions, TuneOptions, CompareOptions)
    return HEAD + "".join(f"\n\n{keywords(kind)}\n" for kind in kinds)


if __name__ == "__main__":
    assert dataclasses.is_dataclass(CompressOptions)
    TARGET.write_text(text(), encoding="utf-8")
