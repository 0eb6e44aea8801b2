"""Write GGUF files tensor by tensor, and read the tensors of a file one at a time.

The package gguf writes and dequantizes, gguf_file.py parses. Tensors are read with plain reads: pages of a mapped file
would count as memory in use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nybble.errors import ExportError
from nybble.export.gguf.architectures import ARCHITECTURES, Architecture
from nybble.export.gguf.blocks import BLOCK, row_bytes
from nybble.export.gguf.experts import parameter_places
from nybble.export.gguf.latent import LatentHeads, heads_of_fields
from nybble.export.places import Place
from nybble.models.gguf_file import read_gguf

ARCHITECTURE = "general.architecture"
QUANTIZED = "nybble.quantized"
"""Field with the names of the quantized modules."""

FLOATS: dict[str, Callable[[Tensor], NDArray[Any]]] = {
    "F32": lambda numbers: numbers.float().numpy(),
    "F16": lambda numbers: numbers.half().numpy(),
    "BF16": lambda numbers: numbers.bfloat16().view(torch.int16).numpy(),
}
"""Types of tensors without blocks -> function that makes an array of their bytes."""

_FLOAT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_ROWS = 4096
"""Rows that are dequantized at once."""


@dataclass(frozen=True)
class TensorPlan:
    """A tensor that is to be written.

    Attributes:
        name: in the file.
        shape: of its numbers.
        kind: F32, F16, BF16, or the type of its blocks.
        read: returns its numbers, or the bytes of the blocks of each row.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    read: Callable[[], NDArray[Any]]

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers or blocks."""
        floats, columns = _FLOAT_BYTES.get(self.kind), self.shape[-1]
        row = floats * columns if floats else row_bytes(self.kind, columns)
        return prod(self.shape[:-1]) * row


def write_file(path: Path, fields: Mapping[str, Any], tensors: Iterable[TensorPlan]) -> None:
    """Write a file.

    Args:
        path: of the .gguf file.
        fields: key -> value: bool, int (0 or above, except in lists), float, text, or a list that is not empty.
        tensors: read one at a time, in the order of the file.
    """
    import gguf

    tensors = list(tensors)
    writer = gguf.GGUFWriter(path, fields[ARCHITECTURE])
    kinds = {
        bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32,
        str: gguf.GGUFValueType.STRING, list: gguf.GGUFValueType.ARRAY,
    }  # fmt: skip
    for key, value in fields.items():
        if key != ARCHITECTURE:
            writer.add_key_value(key, value, kinds[type(value)])
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[tensor.kind]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(tensor.read())
    finally:
        writer.close()


class GGUFContent:
    """A file that nybble wrote.

    Args:
        path: of the .gguf file.

    Raises:
        ExportError: another program wrote it.

    Attributes:
        fields: key -> value.
        architecture: what llama.cpp computes.
        kinds: name of a tensor -> F32, F16, BF16, or the type of its blocks.
        modules: quantized module -> where its rows are.
    """

    def __init__(self, path: Path) -> None:
        parsed = read_gguf(path)
        self._path = path
        self.fields: dict[str, Any] = {key: field.value for key, field in parsed.fields.items()}
        if QUANTIZED not in self.fields:
            raise ExportError(
                f"{path} must be a GGUF file that nybble exported; it has no field {QUANTIZED}; name the file of a run"
            )
        self.architecture = ARCHITECTURES[self.fields[ARCHITECTURE]]
        self.kinds: dict[str, str] = {tensor.name: tensor.tensor_type.name for tensor in parsed.tensors}
        self._places = {
            tensor.name: (tensor.data.offset, tensor.data.dtype, tensor.data.shape) for tensor in parsed.tensors
        }
        width = self.fields.get(f"{self.architecture.name}.expert_feed_forward_length", 0)
        latent = f"{self.architecture.name}.attention.kv_lora_rank" in self.fields
        heads = heads_of_fields(self.number) if latent else None
        places = file_places(self.architecture, self.number("block_count"), width, heads)
        self.modules = {module: places(f"{module}.weight") for module in self.fields[QUANTIZED]}

    def number(self, key: str) -> int:
        """Return the value of a field of the architecture."""
        return int(self.fields[f"{self.architecture.name}.{key}"])

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the numbers of a tensor."""
        (_, dtype, shape), kind = self._places[name], self.kinds[name]
        if kind in FLOATS:
            return (*shape[:-1], shape[-1] * dtype.itemsize // _FLOAT_BYTES[kind])  # BF16 are bytes
        return (*shape[:-1], shape[-1] // row_bytes(kind, BLOCK) * BLOCK)

    def read(self, name: str, expert: int | None = None) -> NDArray[Any]:
        """Return the numbers of a tensor, or the bytes of the blocks of each row.

        Args:
            name: of the tensor.
            expert: number of a matrix in a stack of matrices; None for the whole tensor.
        """
        shape = self._places[name][2]
        rows = self._expert_rows(shape, expert)
        return self._read_rows(name, rows.start, rows.stop).reshape(shape if expert is None else shape[1:])

    def _expert_rows(self, shape: tuple[int, ...], expert: int | None) -> range:
        """Rows of an expert, or all, where a tensor is seen as a matrix."""
        count = prod(shape[:-1] if expert is None else shape[1:-1])
        first = 0 if expert is None else expert * count
        return range(first, first + count)

    def _read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        offset, dtype, shape = self._places[name]
        width = shape[-1]
        rows = np.fromfile(self._path, dtype, (stop - start) * width, offset=offset + start * width * dtype.itemsize)
        return rows.reshape(stop - start, width)

    def read_floats(self, name: str, expert: int | None = None) -> NDArray[np.float32]:
        """Return the numbers of a tensor, dequantized by the package gguf; see `read`."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        shape, kind = self.shape(name), GGMLQuantizationType[self.kinds[name]]
        rows = self._expert_rows(shape, expert)
        numbers = np.empty((len(rows), shape[-1]), np.float32)
        for start in range(0, len(rows), _ROWS):  # its intermediate arrays are larger than the result
            stop = min(start + _ROWS, len(rows))
            numbers[start:stop] = dequantize(self._read_rows(name, rows.start + start, rows.start + stop), kind)
        return numbers.reshape(shape if expert is None else shape[1:])

    def rope_heads(self, module: str) -> int | None:
        """Return the number of heads in a module whose rows are reordered; None for all others."""
        return rope_heads(
            self.architecture, module, self.number("attention.head_count"), self.number("attention.head_count_kv")
        )


def write_floats(content: GGUFContent, path: Path) -> None:
    """Write a copy of a file whose blocks are float32 numbers.

    Args:
        content: the file.
        path: where to write.
    """
    plans = (TensorPlan(name, content.shape(name), "F32", partial(content.read_floats, name)) for name in content.kinds)
    write_file(path, content.fields, plans)


def file_places(
    architecture: Architecture, num_layers: int, expert_width: int, heads: LatentHeads | None
) -> Callable[[str], list[Place]]:
    """Return the function: name of a parameter in transformers -> where its rows are, empty where there is no tensor.

    Args:
        architecture: what llama.cpp computes.
        num_layers: of the model.
        expert_width: rows of the gates of an expert; 0 for a model without experts.
        heads: of latent attention, if the model has it.
    """
    import gguf

    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    table = gguf.get_tensor_name_map(kind, num_layers)
    suffixes = (".weight", ".bias")
    return parameter_places(
        lambda name: table.get_name(name, try_suffixes=suffixes), expert_width, architecture.interleaved_gate, heads
    )


def rope_heads(architecture: Architecture, module: str, heads: int, key_value_heads: int) -> int | None:
    """Return the number of heads in a module whose rows are reordered for rotary embeddings; None for all others.

    Args:
        architecture: what llama.cpp computes.
        module: name in transformers.
        heads: of queries.
        key_value_heads: of keys and values.
    """
    if not architecture.interleaved_rope:
        return None
    return {"q_proj": heads, "k_proj": key_value_heads}.get(module.rpartition(".")[2])
