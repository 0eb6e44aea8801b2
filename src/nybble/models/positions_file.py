"""positions.safetensors in the folder quantized/: where the weights of the linear layers lie between their codes.

Training goes on from there (--init_from). Nothing else reads the file, and it may be deleted. For every linear layer
NAME it has one of

    NAME.weight.position      uint8 [O, ceil(I / 2)]: 4 bits a weight, see quant/position.py
    NAME.weight               [O, I]: the weight before rounding, in the dtype that the run computed in
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from nybble.errors import RunError
from nybble.files import TensorReader, fingerprint_of, note_of, open_tensors, save_tensors
from nybble.models.quantized_file import LayerLayout, LazyMapping
from nybble.models.tensor_writer import TensorLayout, safetensors_writer
from nybble.schema import SchemaError

POSITIONS_FILE, POSITIONS_FORMAT = "positions.safetensors", "nybble-positions-1"
_FIXED, _EXACT = ".weight.position", ".weight"


def save_positions(folder: Path, positions: Mapping[str, Tensor]) -> None:
    """Write positions.

    Args:
        folder: where to write; it exists.
        positions: name of a linear layer -> packed positions, or weights before rounding. Those of a LazyMapping with
            layouts are held one at a time.

    Raises:
        RunError: the disk is full.
    """
    file, note = folder / POSITIONS_FILE, {"format": POSITIONS_FORMAT}
    if not isinstance(positions, LazyMapping):
        save_tensors(file, {name + _leaf(tensor.dtype): tensor for name, tensor in positions.items()}, note)
        return
    layouts = {name + _leaf(layout.dtype): layout for name, layout in positions.layouts.items()}
    with safetensors_writer(file, layouts, {"note": json.dumps(note)}) as writer:
        for name, tensor in positions.items():
            writer.write(name + _leaf(tensor.dtype), tensor.cpu())


def position_layout(shape: tuple[int, int], dtype: torch.dtype, exact: bool) -> TensorLayout:
    """What the positions of a weight [O, I] will be in the file.

    Args:
        shape: O, I.
        dtype: of the model.
        exact: the weight itself is kept, instead of packed positions.
    """
    rows, columns = shape
    return TensorLayout(dtype, shape) if exact else TensorLayout(torch.uint8, (rows, (columns + 1) // 2))


def _leaf(dtype: torch.dtype) -> str:
    return _EXACT if dtype.is_floating_point else _FIXED


def has_positions(folder: Path) -> bool:
    """Whether a folder quantized/ has positions."""
    return (folder / POSITIONS_FILE).is_file()


def fingerprint(folder: Path) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of the positions of a folder quantized/."""
    return fingerprint_of(folder / POSITIONS_FILE)


def open_positions(folder: Path, layers: Mapping[str, LayerLayout]) -> Mapping[str, Tensor]:
    """Check the header of the positions; they are read when they are asked for, and not kept.

    Args:
        folder: what `save_positions` wrote.
        layers: the linear layers whose positions are needed.

    Returns:
        Layer name -> packed positions, or weights before rounding.

    Raises:
        RunError: the file is damaged, or has no such positions of a layer.
    """
    file = folder / POSITIONS_FILE
    with open_tensors(file) as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - not a dict, not iterable
        headers = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
        format_ = note_of(opened).get("format")
        if format_ != POSITIONS_FORMAT:
            raise SchemaError(f"its format must be {POSITIONS_FORMAT}; it is {format_}")
    stored = {name: _stored_name(file, name, layout, headers) for name, layout in layers.items()}
    reader = TensorReader(file)

    def read(name: str) -> Tensor:
        tensor = reader.read(stored[name])
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise _unusable(file, f"{stored[name]} has values that are not finite")
        return tensor

    return LazyMapping(layers, read)


def _stored_name(file: Path, name: str, layout: LayerLayout, headers: Mapping[str, tuple[str, tuple[int, ...]]]) -> str:
    """The tensor with the positions of a layer."""
    rows, columns = layout.shape
    expected = {_FIXED: (("U8",), (rows, (columns + 1) // 2)), _EXACT: (("F32", "BF16", "F16"), (rows, columns))}
    for leaf, (dtypes, shape) in expected.items():
        dtype, found = headers.get(name + leaf, ("", ()))
        if dtype in dtypes and found == shape:
            return name + leaf
    raise _unusable(file, f"it has none of {name} [{rows}, {columns}]")


def _unusable(file: Path, reason: str) -> RunError:
    return RunError(
        f"{file} must hold the positions of all weights; {reason}; delete the file: training then starts from the "
        "middle of the cells"
    )
