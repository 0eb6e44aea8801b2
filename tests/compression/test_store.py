"""Finished blocks on disk."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from nybble.compression.store import BlockStore
from nybble.errors import RunError


@dataclass
class Note:
    errors: int = 0


EXPECTED = {"x": (torch.float32, (2,))}


def test_a_block_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    store = BlockStore(tmp_path / "blocks", "one")
    assert store.load("model.layers.0.", EXPECTED, Note) is None
    store.save("model.layers.0.", {"x": torch.tensor([1.5, 2.5])}, {"errors": 1})
    assert store.load("model.layers.1.", EXPECTED, Note) is None
    stored = store.load("model.layers.0.", EXPECTED, Note)
    assert stored is not None
    tensors, note = stored
    assert tensors["x"].tolist() == [1.5, 2.5]
    assert note == Note(1)


def test_a_block_of_another_model_text_or_method_is_ignored(tmp_path: Path) -> None:
    BlockStore(tmp_path, "one").save("model.layers.0.", {"x": torch.ones(2)}, {})
    assert BlockStore(tmp_path, "two").load("model.layers.0.", EXPECTED, Note) is None


def test_a_damaged_file_is_an_error(tmp_path: Path) -> None:
    store = BlockStore(tmp_path, "one")
    store.save("model.layers.0.", {"x": torch.ones(2)}, {})
    next(tmp_path.glob("*.safetensors")).write_bytes(b"damaged")
    with pytest.raises(RunError, match="must be a readable safetensors file"):
        store.load("model.layers.0.", EXPECTED, Note)
