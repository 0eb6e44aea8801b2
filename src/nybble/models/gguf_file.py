"""Parse GGUF files. While `stands_in` is active, two functions of the package gguf are replaced.

The reader of the package gguf makes an array for every string, which takes seconds for a vocabulary, and fails at
damaged files in many ways. Here each value of the header is read once, with its limits checked. transformers gets the
result in place of gguf.GGUFReader. It also asks gguf.get_tensor_name_map for the same table once per module, so the
answers are kept.

Layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), little endian:

    "GGUF", version u32, tensors u64, fields u64
    field:  key string, type u32, value            string: length u64, UTF-8      array: type u32, length u64, values
    tensor: name string, axes u32, lengths u64 (fastest first), type u32, offset u64
    data of the tensors, from the next multiple of general.alignment (32)
"""

from __future__ import annotations

import functools
import importlib.util
import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from nybble.errors import MissingExtraError, ModelError, first_line

_VERSIONS = (2, 3)
_UINT32, _STRING, _ARRAY = 4, 8, 9
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Type of a number -> its format for struct."""

_MOST_AXES = 4
_VALUES_FOR_TOKENIZERS = ("tokenizer.ggml.merges", "tokenizer.ggml.scores", "tokenizer.ggml.token_type")
"""Arrays that a configuration is not made from. transformers would convert them element by element."""


@dataclass(frozen=True)
class Field:
    """A value in the form of gguf.ReaderField.

    Attributes:
        value: number, text, or list of either.
        types: its type; for an array also that of the elements.
    """

    value: Any
    types: list[int]

    @functools.cached_property
    def parts(self) -> list[Any]:
        """The elements as arrays: a number as [number], a text as its bytes."""
        values = self.value if self.types[0] == _ARRAY else [self.value]
        return [value.encode() for value in values] if self.types[-1] == _STRING else [[value] for value in values]

    @property
    def data(self) -> range:
        """Indices of `parts`."""
        return range(len(self.value)) if self.types[0] == _ARRAY else range(1)


@dataclass(frozen=True)
class TensorData:
    """A tensor in the form of gguf.ReaderTensor.

    Attributes:
        name: in the file.
        tensor_type: gguf.GGMLQuantizationType.
        data: numbers, or the bytes of the blocks of each row; mapped from the file.
    """

    name: str
    tensor_type: Any
    data: Any


@dataclass(frozen=True)
class GGUFFile:
    """A parsed file.

    Attributes:
        path: of the file.
        fields: key -> value.
        tensors: in the order of the file.
    """

    path: Path
    fields: dict[str, Field]
    tensors: list[TensorData]


def read_gguf(path: Path) -> GGUFFile:
    """Parse a file.

    Args:
        path: the .gguf file.

    Returns:
        Its fields and tensors. The data of the tensors are read when they are used.

    Raises:
        MissingExtraError: the extra "gguf" is not installed.
        ModelError: the file is damaged, or is no GGUF file.
    """
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError("gguf", "reading .gguf files")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            parser = _Parser(content)
            fields, table = parser.header()
        return GGUFFile(path, fields, [_tensor(path, parser, row) for row in table])
    except (OSError, ValueError, struct.error) as error:  # ValueError: also text that is not UTF-8, an empty file
        raise ModelError(
            f"--pretrained {path} must be a complete GGUF file; {first_line(error)}; download it again"
        ) from error


@contextmanager
def stands_in(file: GGUFFile) -> Iterator[None]:
    """Let transformers use a parsed file instead of parsing it again."""
    import gguf

    fields = {key: field for key, field in file.fields.items() if key not in _VALUES_FOR_TOKENIZERS}
    parsed = GGUFFile(file.path, fields, file.tensors)
    name_map = functools.cache(gguf.get_tensor_name_map)
    with patch.object(gguf, "GGUFReader", lambda path: parsed), patch.object(gguf, "get_tensor_name_map", name_map):
        yield


class _Parser:
    """Reads a file from its beginning. ValueError or struct.error where the file ends or a value is impossible."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.size, self.position, self.alignment = content, len(content), 0, 32

    def header(self) -> tuple[dict[str, Field], list[tuple[Any, ...]]]:
        """Fields, and (name, shape, type, offset) of each tensor."""
        magic, version, tensors, count = self.numbers("4sIQQ")
        if magic != b"GGUF" or version not in _VERSIONS:
            raise ValueError(f"it begins with {magic!r}, version {version}; GGUF, version 2 or 3, is needed")
        fields: dict[str, Field] = {}
        for _ in range(count):
            key = self.text()
            if key in fields:
                raise ValueError(f"the field {key} is there twice")
            fields[key] = self.field(*self.numbers("I"))
        if "general.alignment" in fields:
            field = fields["general.alignment"]
            if field.types != [_UINT32] or not field.value or field.value & (field.value - 1):
                raise ValueError(f"general.alignment is {field.value}, which is no power of two")
            self.alignment = field.value
        table = [self.tensor() for _ in range(tensors)]
        names = {row[0] for row in table}
        if len(names) < len(table):
            raise ValueError("two tensors have the same name")
        self.position += -self.position % self.alignment
        return fields, table

    def numbers(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from("<" + form, self.content, self.position)
        self.position += struct.calcsize("<" + form)
        return found

    def text(self) -> str:
        (length,) = self.numbers("Q")
        start, self.position = self.position, self.position + length
        if self.position > self.size:
            raise ValueError("it ends in the middle of a text")
        return self.content[start : self.position].decode()

    def field(self, kind: int) -> Field:
        if kind == _ARRAY:
            kind, length = self.numbers("IQ")
            return Field(self.array(kind, length), [_ARRAY, kind])
        return Field(self.array(kind, 1)[0], [kind])

    def array(self, kind: int, length: int) -> list[Any]:
        if length > self.size - self.position:  # each element has a byte at least
            raise ValueError("it ends in the middle of an array")
        if kind == _STRING:
            return [self.text() for _ in range(length)]
        if kind not in _FORMATS:
            raise ValueError(f"it has a value of the unknown type {kind}")
        return list(self.numbers(f"{length}{_FORMATS[kind]}"))

    def tensor(self) -> tuple[Any, ...]:
        name, (axes,) = self.text(), self.numbers("I")
        if axes > _MOST_AXES:
            raise ValueError(f"the tensor {name} has {axes} axes; {_MOST_AXES} are allowed")
        shape = self.numbers(f"{axes}Q")[::-1]
        return name, shape, *self.numbers("IQ")


def _tensor(path: Path, parser: _Parser, row: tuple[Any, ...]) -> TensorData:
    """Map the data of a tensor."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quant_shape_to_byte_shape

    name, shape, kind, offset = row
    tensor_type = GGMLQuantizationType(kind)
    size = GGML_QUANT_SIZES[tensor_type][1]
    number = _NUMPY.get(tensor_type.name)
    if number is None and shape:
        shape = quant_shape_to_byte_shape(shape, tensor_type)
    nbytes = prod(shape) * (size if number is not None else 1)
    start = parser.position + offset
    if not nbytes or offset % parser.alignment or start + nbytes > parser.size:
        raise ValueError(f"the tensor {name} of {nbytes} bytes at {start} is not in its {parser.size} bytes")
    data = np.memmap(path, number or np.uint8, "r", start, tuple(shape))
    return TensorData(name, tensor_type, data)


_NUMPY: dict[str, type[np.generic]] = {
    "F16": np.float16, "F32": np.float32, "F64": np.float64,
    "I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64,
}  # fmt: skip
"""Types that hold numbers; the others hold blocks."""
