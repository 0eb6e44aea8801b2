"""BlockStore: finished decoder blocks of a compression on disk, so that an interrupted compression can resume."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from nybble import processes
from nybble.files import TensorReader, damaged, load_tensors, open_tensors, save_tensors
from nybble.schema import SchemaError, Shape, check_tensors, from_json

T = TypeVar("T")


class BlockStore:
    """One safetensors file per finished block.

    Args:
        path: the folder; it is created by the first `save`.
        identity: identifies the model, the text and the method. Files with another identity are ignored.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self.path, self.identity = path, identity

    def load(
        self, block: str, expected: Mapping[str, tuple[Any, Shape]], kind: type[T]
    ) -> tuple[dict[str, Tensor], T] | None:
        """Read a finished block.

        Args:
            block: path of the block in the model, "model.layers.0.".
            expected: name -> dtype and shape of its tensors.
            kind: type of its note, a dataclass.

        Returns:
            What was given to `save`, with tensors on the CPU; None if there is no file with this identity.

        Raises:
            RunError: the file is damaged.
        """
        file = self._file(block)
        if not processes.on_first(file.exists):  # one answer, as the first process may be about to write it
            return None
        tensors, note = load_tensors(file)
        if note.pop("identity", None) != self.identity:
            return None
        try:
            check_tensors(tensors, expected)
            return tensors, from_json(kind, note)
        except SchemaError as error:
            raise damaged(file, error) from error

    def save(self, block: str, tensors: dict[str, Tensor], note: dict[str, Any]) -> None:
        """Write a finished block atomically.

        Args:
            block: path of the block in the model.
            tensors: name -> tensor.
            note: JSON-serializable values.

        Raises:
            RunError: the disk is full.
        """
        self.path.mkdir(exist_ok=True)
        save_tensors(self._file(block), tensors, note | {"identity": self.identity})
        processes.wait()  # the others may read it from now on

    def names(self, block: str) -> list[str]:
        """Names of the tensors of a finished block."""
        with open_tensors(self._file(block)) as file:
            return list(file.keys())

    def read(self, block: str, names: Iterable[str]) -> list[Tensor]:
        """Read some tensors of a finished block, as copies on the CPU."""
        reader = TensorReader(self._file(block))
        return [reader.read(name) for name in names]

    def _file(self, block: str) -> Path:
        return self.path / f"{block.strip('.')}.safetensors"
