"""The one check of what is read back from disk: JSON values against types, tensors against dtypes and shapes.

A file that a person or a fault changed is found here, before its content is used, and described in a few words; the
reader puts file and remedy around them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# Dimensions of a tensor; None fits any size.
Shape = tuple[int | None, ...]


_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class SchemaError(ValueError):
    """A value from disk does not have its type."""


def to_json(value: Any) -> str:
    """A value as JSON that every reader takes: numbers that are not finite are the texts NaN, Infinity and -Infinity.

    Args:
        value: of dictionaries, lists, tuples and plain types, as `from_json` reads it.
    """
    return json.dumps(_finite(value), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return next(name for name, number in _NOT_FINITE.items() if number == value or math.isnan(value))
    return value


def restored(value: Any) -> Any:
    """A JSON value with the numbers that `to_json` wrote as texts."""
    if isinstance(value, dict):
        return {key: restored(item) for key, item in value.items()}
    if isinstance(value, list):
        return [restored(item) for item in value]
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        SchemaError: it cannot be read, or is not JSON.
    """
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError) as error:
        raise SchemaError(f"it cannot be read ({error})") from error


def parse_json(text: str) -> Any:
    """The value of a JSON text; SchemaError if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"it is not JSON ({error})") from error


def from_json(hint: Any, value: Any, where: str = "") -> Any:
    """A JSON value as an object of type `hint`: dataclasses, lists, dictionaries, unions, enumerations, plain types.

    Raises:
        SchemaError: it does not fit; `where` and the names of fields say at which place.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _dataclass_from_json(hint, value, where)
    if origin is list and isinstance(value, list):
        return [from_json(arguments[0], item, f"{where}{i}.") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: from_json(arguments[1], item, f"{where}{key}.") for key, item in value.items()}
    if origin is types.UnionType:
        return _union_from_json(arguments, value, where)
    if isinstance(hint, type) and issubclass(hint, StrEnum) and value in list(hint):
        return hint(value)
    if hint is Any:
        return restored(value)
    if type(value) is hint or (hint is float and type(value) is int):
        return value
    if hint is float and isinstance(value, str) and value in _NOT_FINITE:
        return _NOT_FINITE[value]
    raise SchemaError(f"{where.rstrip('.') or 'it'} must be {_name(hint)}; it is {str(value)[:40]}")


def _union_from_json(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    """A value of the first type that fits; what is wrong is said of the last one."""
    if value is None and type(None) in kinds:
        return None
    *others, last = (kind for kind in kinds if kind is not type(None))
    for kind in others:
        try:
            return from_json(kind, value, where)
        except SchemaError:
            continue
    return from_json(last, value, where)


def _dataclass_from_json(hint: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise SchemaError(f"{where.rstrip('.') or 'it'} must be an object; it is {str(value)[:40]}")
    hints = typing.get_type_hints(hint)
    fields = {f.name: f for f in dataclasses.fields(hint)}
    if unknown := value.keys() - fields:
        raise SchemaError(f"{where}{min(unknown)} is unknown")
    missing = [
        name
        for name, f in fields.items()
        if name not in value and f.default is f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise SchemaError(f"{where}{missing[0]} is missing")
    return hint(**{key: from_json(hints[key], item, f"{where}{key}.") for key, item in value.items()})


def check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[Any, Shape]]) -> None:
    """Check that these are the expected tensors and no others.

    Args:
        expected: name -> dtype and shape; the dtype None fits any floating point, a dimension None any size.

    Raises:
        SchemaError: a tensor is missing, unknown, or has another dtype or shape.
    """
    if missing := sorted(expected.keys() - tensors.keys()):
        raise SchemaError(f"{missing[0]} is missing")
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise SchemaError(f"{unknown[0]} is unknown")
    for name, (dtype, shape) in expected.items():
        check_tensor(name, tensors[name], dtype, shape)


def check_tensor(name: str, tensor: Tensor, dtype: Any, shape: Shape) -> None:
    """Check one tensor, see `check_tensors`; SchemaError where it differs."""
    right = tensor.is_floating_point() if dtype is None else tensor.dtype == dtype
    fits = tensor.dim() == len(shape) and all(
        want in (None, size) for size, want in zip(tensor.shape, shape, strict=True)
    )
    if not right or not fits:
        wanted, found = [("any" if size is None else size) for size in shape], list(tensor.shape)
        raise SchemaError(
            f"{name} must be {_name(dtype or 'floating point')} {wanted}; it is {_name(tensor.dtype)} {found}"
        )


def _name(hint: Any) -> str:
    return str(getattr(hint, "__name__", hint)).removeprefix("torch.")
