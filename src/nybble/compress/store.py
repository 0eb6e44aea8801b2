"""Finished blocks of a compression on disk."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from nybble.files import load_tensors, save_tensors

log = logging.getLogger("nybble")


class BlockStore:
    """Finished blocks of a compression (compress.Store), one safetensors file each. `identity` says of what; files of something else are ignored."""

    def __init__(self, path: Path, identity: str) -> None:
        self.path, self.identity = path, identity

    def _file(self, block: str) -> Path:
        return self.path / f"{block.strip('.')}.safetensors"

    def load(self, block: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        if not self._file(block).exists():
            return None
        tensors, note = load_tensors(self._file(block))
        return (tensors, note) if note.pop("identity", None) == self.identity else None

    def save(self, block: str, tensors: dict[str, Tensor], note: dict[str, Any]) -> None:
        self.path.mkdir(exist_ok=True)
        save_tensors(self._file(block), tensors, note | {"identity": self.identity})


log = logging.getLogger("nybble")


class Store(Protocol):
    """Where finished blocks are kept, so that an interrupted compression goes on."""

    def load(self, block: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and note of a finished block, or None."""

    def save(self, block: str, tensors: dict[str, Tensor], note: dict[str, Any]) -> None:
        """Keep a finished block."""
