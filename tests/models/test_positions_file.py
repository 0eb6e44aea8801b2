"""positions.safetensors: what is written is read back, and what others changed is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nybble.errors import RunError
from nybble.models.positions_file import POSITIONS_FILE, open_positions, save_positions
from nybble.models.quantized_file import LayerLayout
from nybble.quant.scheme import QuantScheme

SCHEME = QuantScheme(4, 8)
LAYERS = {"fixed": LayerLayout((3, 8), SCHEME), "exact": LayerLayout((2, 8), SCHEME)}
POSITIONS = {
    "fixed": torch.arange(12, dtype=torch.uint8).view(3, 4),
    "exact": torch.linspace(-1, 1, 16, dtype=torch.bfloat16).view(2, 8),
}


def test_both_kinds_are_read_back_equal(tmp_path: Path) -> None:
    save_positions(tmp_path, POSITIONS)
    assert load_file(tmp_path / POSITIONS_FILE).keys() == {"fixed.weight.position", "exact.weight"}
    found = open_positions(tmp_path, LAYERS)
    assert found.keys() == POSITIONS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in POSITIONS.items())


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda t: t.pop("fixed.weight.position"), r"it has none of fixed \[3, 8\]"),
        (lambda t: t.update({"fixed.weight.position": torch.zeros(3, 5, dtype=torch.uint8)}), "it has none of fixed"),
        (lambda t: t.update({"exact.weight": torch.zeros(2, 8, dtype=torch.int8)}), "it has none of exact"),
        (lambda t: t["exact.weight"].fill_(float("nan")), "exact.weight has values that are not finite"),
    ],
)
def test_what_others_changed_is_refused(damage: Callable[[dict[str, Tensor]], Any], words: str, tmp_path: Path) -> None:
    save_positions(tmp_path, POSITIONS)
    tensors = {name: tensor.clone() for name, tensor in load_file(tmp_path / POSITIONS_FILE).items()}
    damage(tensors)
    save_file(tensors, tmp_path / POSITIONS_FILE, {"note": '{"format": "nybble-positions-1"}'})
    with pytest.raises(RunError, match=f"must hold the positions of all weights; {words}.*; delete the file"):
        dict(open_positions(tmp_path, LAYERS))


def test_another_file_is_refused(tmp_path: Path) -> None:
    save_file({"fixed.weight.position": POSITIONS["fixed"].clone()}, tmp_path / POSITIONS_FILE)
    with pytest.raises(RunError, match="its format must be nybble-positions-1; it is None; delete it"):
        open_positions(tmp_path, LAYERS)
    (tmp_path / POSITIONS_FILE).write_bytes(b"no tensors")
    with pytest.raises(RunError, match="must be a readable safetensors file"):
        open_positions(tmp_path, LAYERS)
