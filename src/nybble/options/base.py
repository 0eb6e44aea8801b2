"""Options as frozen dataclasses: a group per concern, a command as a composition of groups.

A group is a dataclass whose fields are made by `option`, which keeps the help text beside the default. A command is a
dataclass whose fields are groups. The names of options are unique within a command, so the command line, TOML files and
Python keywords all use the flat names: `DistillOptions.of(pretrained="m", lr=1e-4).training.lr`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import os
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, ClassVar, Literal, Self, Union

from nybble.errors import OptionError

# How a person writes an empty list: `--export none`.
NONE = "none"
# The order of groups in help and files; groups of other titles stand first.
_ORDER = ("Model", "Data", "Scheme", "Compression", "Training", "Ranks", "Evaluation and export", "Run")


def option(default: Any, help: str, *, basic: bool = False, required: bool = False, repeat: bool = False) -> Any:
    """A field of a group.

    Args:
        default: its default; dataclasses.MISSING where every command that has the option gives one of its own.
        help: one or two sentences; shown by --help and in the reference.
        basic: shown by --help; other options are shown by --help-all.
        required: the default is no valid value; the command says so if it is not given.
        repeat: a list whose flag can be given several times; a later flag adds to the list.
    """
    metadata = {"help": help, "basic": basic or required, "required": required, "repeat": repeat}
    return dataclasses.field(default=default, metadata=metadata)


def with_default(group: type[Group], name: str, default: Any) -> Any:
    """The option `name` of a group that this one extends, with another default and the same help."""
    return dataclasses.field(default=default, metadata=_field(group, name).metadata)


def with_help(group: type[Group], name: str, text: str, **changes: Any) -> Any:
    """The option `name` of a group that this one extends, with the same default and another help."""
    field = _field(group, name)
    return dataclasses.field(default=field.default, metadata={**field.metadata, "help": text, **changes})


def _field(group: type[Group], name: str) -> dataclasses.Field[Any]:
    return {field.name: field for field in dataclasses.fields(group)}[name]  # type: ignore[arg-type]


class Group:
    """Options of one concern. Subclasses are frozen dataclasses with keyword-only fields."""

    TITLE: ClassVar[str]

    def check(self) -> None:
        """Raise OptionError for values outside of their range."""

    def require(self, names: str, valid: Callable[[Any], bool], range_: str) -> None:
        """Raise OptionError, with option and range, unless the values of all `names` (split at spaces) are valid."""
        for name in names.split():
            value = getattr(self, name)
            if not valid(value):
                raise OptionError(f"--{name} must be {range_}; got {value}")


# The types of a dataclass's fields, which are texts until they are asked for.
_hints: Callable[[Any], dict[str, Any]] = functools.cache(typing.get_type_hints)


@dataclass(frozen=True, kw_only=True)
class Command:
    """Options of a command: every field is a Group."""

    NAME: ClassVar[str]

    @classmethod
    def groups(cls) -> dict[str, type[Group]]:
        """Field name -> group class, in the order of help."""
        hints = _hints(cls)
        groups = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
        place = {title: i for i, title in enumerate(_ORDER)}
        return dict(sorted(groups.items(), key=lambda item: place.get(item[1].TITLE, -1)))

    @classmethod
    def fields(cls) -> dict[str, dataclasses.Field[Any]]:
        """Option name -> field of its group, in the order of help."""
        return {field.name: field for group in cls.groups().values() for field in dataclasses.fields(group)}  # type: ignore[arg-type]

    @classmethod
    def types(cls) -> dict[str, Any]:
        """Option name -> type."""
        hints: dict[str, Any] = {}
        for group in cls.groups().values():
            hints |= _hints(group)
        return {name: hints[name] for name in cls.fields()}

    @classmethod
    def positional(cls) -> str | None:
        """The option that is given without a flag, in commands that take a run or a model to look at."""
        if "pretrained" in cls.fields():
            return None
        return next((name for name, field in cls.fields().items() if field.metadata["required"]), None)

    @classmethod
    def spelled(cls, name: str) -> str:
        """An option as people give it, for error messages: --lr, or RUN."""
        return name.upper() if name == cls.positional() else f"--{name}"

    @classmethod
    def of(cls, **values: Any) -> Self:
        """The command's options from flat names; what is not given has its default.

        Raises:
            OptionError: an unknown name (the nearest is named), or a value of the wrong type.
        """
        values = typed_values(cls, values, "")
        made = {
            name: group(**{f.name: values[f.name] for f in dataclasses.fields(group) if f.name in values})  # type: ignore[arg-type]
            for name, group in cls.groups().items()
        }
        return cls(**made)

    def flat(self) -> dict[str, Any]:
        """Option name -> value."""
        return {key: value for name in self.groups() for key, value in vars(getattr(self, name)).items()}

    def replace(self, **values: Any) -> Self:
        """The same options with some values replaced, by flat names."""
        return self.of(**self.flat() | values)

    def check(self) -> None:
        """Raise OptionError for values that are impossible, alone or together."""
        for name in self.groups():
            getattr(self, name).check()
        for name, field in self.fields().items():
            if field.metadata["required"] and not self.flat()[name]:
                hint = (
                    "; give the model that the run of --init_from was made from" if self.flat().get("init_from") else ""
                )
                raise OptionError(f"{self.spelled(name)} is required: {field.metadata['help'].rstrip('.')}{hint}")


def typed_values(kind: type[Command], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Values by option name, checked against the types of the options; lists become tuples, whole numbers floats.

    Args:
        where: start of the error message, such as "--config FILE: ".

    Raises:
        OptionError: an unknown name, or a value of the wrong type.
    """
    types_ = kind.types()
    for name in values:
        if name not in types_:
            near = get_close_matches(name, types_, 1)
            raise OptionError(
                f"{where}{name} is no option of nybble {kind.NAME}" + (f"; did you mean {near[0]}?" if near else "")
            )
    return {
        name: _typed(f"{where}{name}" if where else kind.spelled(name), value, types_[name])
        for name, value in values.items()
    }


def _plain(value: Any) -> Any:
    """What a value of Python stands for: a path its text, a number of numpy a number of Python."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool | int) else value


def _typed(name: str, value: Any, hint: Any) -> Any:
    value = _plain(value)
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        value = (
            ()
            if value is None or value == NONE or value == [NONE]
            else tuple(map(_plain, value))
            if isinstance(value, list | tuple)
            else (value,)
        )
        fits = all(type(element) is item for element in value)
    elif typing.get_origin(hint) is Literal:
        fits = value in typing.get_args(hint)
    else:
        kinds = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
        if value == NONE and type(None) in kinds:
            value = None
        if float in kinds and type(value) is int:
            value = float(value)
        fits = type(value) in kinds and not (isinstance(value, float) and math.isnan(value))
    if not fits:
        raise OptionError(f"{name} must be {describe_type(hint)}; got {value!r}")
    for text in value if isinstance(value, tuple) else (value,):
        if isinstance(text, str) and not _is_path_text(text):
            raise OptionError(
                f"{name} must be text that a file name can hold; {text!a} has a zero byte or half of a character in it"
            )
    return value


def _is_path_text(text: str) -> bool:
    """Whether the file system takes a text; bytes that are no UTF-8 on the command line are taken as well."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def describe_type(hint: Any) -> str:
    """The type of an option, for people."""
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return {str: "a list of texts", int: "a list of whole numbers"}[typing.get_args(hint)[0]]
    kind = next(kind for kind in (*typing.get_args(hint), hint) if kind is not type(None))
    return {float: "a number", int: "a whole number", bool: "true or false", str: "text"}[kind]
