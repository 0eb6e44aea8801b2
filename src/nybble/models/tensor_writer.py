"""Write one safetensors file without holding its tensors: the layout first, then the tensors in any order.

    8 bytes             length N of the header, unsigned, little-endian; a multiple of 8
    N bytes             header: JSON object of name -> dtype, shape, data_offsets; padded with spaces
    rest                tensors, row-major, little-endian, without gaps

Tensors with wider elements come first. Each then begins at a multiple of the size of its elements, as readers need that
map the file. The key "__metadata__" of the header holds texts.

https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from nybble.files import reporting_full_disk

_DTYPES = {
    torch.int64: "I64", torch.float64: "F64", torch.int32: "I32", torch.uint32: "U32", torch.float32: "F32",
    torch.int16: "I16", torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip


class TensorLayout(NamedTuple):
    """What the header says about a tensor.

    Attributes:
        dtype: of the elements.
        shape: of the tensor; () for a scalar.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> TensorLayout:
        """Return the layout of a tensor."""
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """The file between its header and its end; `safetensors_writer` makes one.

    Args:
        file: open for writing, empty.
        layouts: name -> layout of every tensor that will be written.
        metadata: texts for the header.
    """

    def __init__(self, file: BinaryIO, layouts: Mapping[str, TensorLayout], metadata: Mapping[str, str]) -> None:
        self._file, self._layouts = file, layouts
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        self._offsets, end = {}, 0
        for name in sorted(layouts, key=lambda name: (-layouts[name].dtype.itemsize, name)):
            layout = layouts[name]
            self._offsets[name], end = end, end + layout.nbytes
            header[name] = {
                "dtype": _DTYPES[layout.dtype],
                "shape": list(layout.shape),
                "data_offsets": [self._offsets[name], end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        self._start, self._missing = file.tell(), set(layouts)

    def write(self, name: str, *blocks: Tensor) -> None:
        """Write a tensor at its place; see `write_blocks`."""
        self.write_blocks(name, blocks)

    def write_blocks(self, name: str, blocks: Iterable[Tensor]) -> None:
        """Write a tensor at its place, block by block.

        Args:
            name: one of the layout that has not been written yet.
            blocks: consecutive parts of the tensor along its first axis, on the CPU, in its dtype.
        """
        layout, written = self._layouts[name], 0
        assert name in self._missing, f"{name} was written already"
        self._file.seek(self._start + self._offsets[name])
        for block in blocks:
            assert block.dtype == layout.dtype, f"{name} must be {layout.dtype}; it is {block.dtype}"
            written += self._file.write(block.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        assert written == layout.nbytes, f"{name} must have {layout.nbytes} bytes; it has {written}"
        self._missing.remove(name)

    def check_complete(self) -> None:
        """Check that every tensor has been written."""
        assert not self._missing, f"tensors that were not written: {sorted(self._missing)[:3]}"


@contextmanager
def safetensors_writer(
    path: Path, layouts: Mapping[str, TensorLayout], metadata: Mapping[str, str]
) -> Iterator[SafetensorsWriter]:
    """Open a safetensors file whose tensors are written in this block.

    Args:
        path: the file, in a folder that appears whole or not at all (`files.atomic_folder`).
        layouts: name -> layout of every tensor.
        metadata: texts for the header.

    Yields:
        The writer. Every tensor must be written to it before the block ends.

    Raises:
        RunError: the disk is full.
    """
    with reporting_full_disk(path):
        with path.open("wb") as file:
            writer = SafetensorsWriter(file, layouts, metadata)
            yield writer
        writer.check_complete()
