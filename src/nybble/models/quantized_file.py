"""weights.safetensors in the folder quantized/: the tensors of a quantized model.

For every quantized module NAME:

    NAME.weight.codes         uint8 [O, I * bits / 8]: packed codes (weight.py)
    NAME.weight.scale         float16 [O, G]
    NAME.weight.zero_point    uint8 [O, G]

and all other tensors of the model under their own names and in their own dtype. The note in the header of the file
holds the format ("nybble-2") and the QuantScheme of every NAME. A head that is tied to the embedding is not stored.

Everything is checked when it is read, because others than nybble may have changed it: names, dtypes and shapes against
the note, zero points and scales against their grid.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from nybble.errors import RunError
from nybble.files import TensorReader, fingerprint_of, note_of, open_tensors, save_tensors
from nybble.models.tensor_writer import TensorLayout, safetensors_writer
from nybble.quant.grid import round_scale
from nybble.quant.scheme import BITS, CODES_PER_UNIT, QuantScheme
from nybble.quant.weight import QuantizedWeight, pack_codes, unpack_codes
from nybble.schema import SchemaError, from_json

WEIGHTS_FILE, WEIGHTS_FORMAT = "weights.safetensors", "nybble-2"

_CODES, _SCALE, _ZERO_POINT = ".weight.codes", ".weight.scale", ".weight.zero_point"
REMEDY = "delete the folder and let the run make it again (--resume)"

T = TypeVar("T")


class LazyMapping(Mapping[str, T]):
    """Names whose values are read when they are asked for, and not kept.

    Args:
        names: the keys.
        read: returns the value of a name.
        layouts: name -> what the value will be: LayerLayout or TensorLayout. Only `save_weights` needs it.
    """

    def __init__(
        self, names: Iterable[str], read: Callable[[str], T], layouts: Mapping[str, Any] | None = None
    ) -> None:
        self._names, self._read, self.layouts = dict.fromkeys(names), read, dict(layouts or {})

    def __getitem__(self, name: str) -> T:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def save_weights(folder: Path, quantized: Mapping[str, QuantizedWeight], others: Mapping[str, Tensor]) -> None:
    """Write the tensors of a quantized model.

    Args:
        folder: where to write; it exists.
        quantized: module name -> quantized weight.
        others: name -> tensor for all others.

    Raises:
        RunError: the disk is full.
    """
    if isinstance(quantized, LazyMapping) and isinstance(others, LazyMapping):
        _stream_weights(folder / WEIGHTS_FILE, quantized, others)
        return
    tensors = dict(others)
    for name, weight in quantized.items():
        tensors |= _packed(name, weight)
    schemes = {name: weight.scheme for name, weight in quantized.items()}
    save_tensors(folder / WEIGHTS_FILE, tensors, _note(schemes))


def _packed(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of a quantized module."""
    return {
        name + _CODES: pack_codes(weight.codes_OI, weight.scheme.bits),
        name + _SCALE: weight.scale_OG.half(),
        name + _ZERO_POINT: weight.zero_point_OG,
    }


def _note(schemes: Mapping[str, QuantScheme]) -> dict[str, Any]:
    return {"format": WEIGHTS_FORMAT, "schemes": {name: asdict(scheme) for name, scheme in schemes.items()}}


def _stream_weights(path: Path, quantized: LazyMapping[QuantizedWeight], others: LazyMapping[Tensor]) -> None:
    """Write tensors that are read one after the other, by their layouts."""
    layouts: dict[str, TensorLayout] = dict(others.layouts)
    for name, (shape, scheme) in quantized.layouts.items():
        groups = (shape[0], scheme.num_groups(shape[1]))
        layouts[name + _CODES] = TensorLayout(torch.uint8, (shape[0], shape[1] * scheme.bits // 8))
        layouts[name + _SCALE] = TensorLayout(torch.float16, groups)
        layouts[name + _ZERO_POINT] = TensorLayout(torch.uint8, groups)
    note = _note({name: layer.scheme for name, layer in quantized.layouts.items()})
    with safetensors_writer(path, layouts, {"note": json.dumps(note)}) as writer:
        for name, weight in quantized.items():
            for tensor_name, tensor in _packed(name, weight).items():
                writer.write(tensor_name, tensor.cpu())
        for name, tensor in others.items():
            writer.write(name, tensor.cpu())


def load_weights(folder: Path) -> tuple[dict[str, QuantizedWeight], dict[str, Tensor]]:
    """Read the tensors of a quantized model.

    Args:
        folder: what `save_quantized` wrote.

    Returns:
        Module name -> quantized weight; and name -> tensor for all others. Everything is on the CPU.

    Raises:
        RunError: the file is damaged, or nybble did not write it.
    """
    quantized, others = open_weights(folder)
    return dict(quantized), dict(others)


def open_weights(folder: Path) -> tuple[Mapping[str, QuantizedWeight], Mapping[str, Tensor]]:
    """Check the header of the weights file; its tensors are read when they are asked for, and not kept.

    Args, returns and errors: see `load_weights`. A damaged tensor raises its RunError when it is read.
    """
    layout, reader = read_layout(folder), TensorReader(folder / WEIGHTS_FILE)

    def read(name: str) -> QuantizedWeight:
        return _read_weight(reader, folder / WEIGHTS_FILE, name, layout.quantized[name].scheme)

    return LazyMapping(layout.quantized, read), LazyMapping(layout.others, reader.read)


def _read_weight(reader: TensorReader, file: Path, name: str, scheme: QuantScheme) -> QuantizedWeight:
    codes, scale_OG, zero_point_OG = (reader.read(name + leaf) for leaf in (_CODES, _SCALE, _ZERO_POINT))
    weight = QuantizedWeight(unpack_codes(codes, scheme.bits), scale_OG.float(), zero_point_OG, scheme)
    if wrong := _off_grid(weight):
        raise RunError(f"{file} must hold weights as nybble writes them; in {name} {wrong}; {REMEDY}")
    return weight


class LayerLayout(NamedTuple):
    """A quantized layer as the header of the weights file describes it.

    Attributes:
        shape: (O, I).
        scheme: bits, group size and symmetry.
    """

    shape: tuple[int, int]
    scheme: QuantScheme


class WeightsLayout(NamedTuple):
    """What is in a weights file.

    Attributes:
        quantized: module name -> its layout.
        others: name of every other tensor -> its shape.
        integers: names of those whose elements are no floating-point numbers.
    """

    quantized: dict[str, LayerLayout]
    others: dict[str, tuple[int, ...]]
    integers: frozenset[str]


def read_layout(folder: Path) -> WeightsLayout:
    """Read the header of the weights file, and check that every quantized module has tensors that fit its scheme.

    Raises:
        RunError: the file is damaged, or nybble did not write it.
    """
    file = folder / WEIGHTS_FILE
    with open_tensors(file) as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - not a dict, not iterable
        headers = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
        note = note_of(opened)
    if note.get("format") != WEIGHTS_FORMAT:
        raise RunError(
            f"{file} must be a 4-bit model that nybble wrote ({WEIGHTS_FORMAT}); it is something else; name a folder "
            "quantized/ that this version of nybble wrote"
        )
    try:
        schemes = from_json(dict[str, QuantScheme], note.get("schemes"), "schemes.")
        quantized = {name: LayerLayout(_layer_shape(name, scheme, headers), scheme) for name, scheme in schemes.items()}
        if left := [name for name in headers if name.endswith((_CODES, _SCALE, _ZERO_POINT))]:
            raise SchemaError(f"{left[0]} has no scheme")
    except SchemaError as error:
        raise RunError(f"{file} must hold weights as nybble writes them; {error}; {REMEDY}") from error
    integers = frozenset(name for name, (dtype, _) in headers.items() if not dtype.startswith(("F", "BF")))
    return WeightsLayout(quantized, {name: shape for name, (_, shape) in headers.items()}, integers)


def _layer_shape(name: str, scheme: QuantScheme, headers: dict[str, tuple[str, tuple[int, ...]]]) -> tuple[int, int]:
    """Take the three tensors of a module out of the headers; returns its shape. SchemaError if they do not fit."""
    group_size = scheme.group_size
    if scheme.bits not in BITS or (group_size is not None and group_size <= 0):
        raise SchemaError(f"schemes.{name} must have 2, 3, 4 or 8 bits and a group size above 0; it is {scheme}")
    for leaf, dtype in ((_CODES, "U8"), (_SCALE, "F16"), (_ZERO_POINT, "U8")):
        found, shape = headers.get(name + leaf, ("missing", ()))
        if found != dtype or len(shape) != 2:
            raise SchemaError(f"{name}{leaf} must be {dtype} with two dimensions; it is {found} {list(shape)}")
    (rows, columns), scales, zero_points = (headers.pop(name + leaf)[1] for leaf in (_CODES, _SCALE, _ZERO_POINT))
    width = columns * 8 // scheme.bits
    if (
        not rows * width
        or width % CODES_PER_UNIT[scheme.bits]
        or width % (group_size or 1)
        or scales != (rows, scheme.num_groups(width))
        or zero_points != scales
    ):
        raise SchemaError(
            f"{name} must have a scale and a zero point for every group; codes are [{rows}, {width}], scales "
            f"{list(scales)}, zero points {list(zero_points)}, {scheme}"
        )
    return rows, width


def _off_grid(weight: QuantizedWeight) -> str:
    """What is wrong with scales and zero points; "" if nothing is. Codes cannot be wrong: they fill their bits."""
    scheme, zero_point_OG = weight.scheme, weight.zero_point_OG
    if not torch.equal(round_scale(weight.scale_OG), weight.scale_OG):
        return "a scale is not on the grid of scales (7 significant bits, finite, not 0)"
    if not scheme.signed_scales and bool((weight.scale_OG < 0).any()):
        return f"a scale is negative, which {scheme} does not have"
    if int(zero_point_OG.amax()) > scheme.max_code:
        return f"a zero point is above {scheme.max_code}"
    if scheme.symmetric and bool((zero_point_OG != scheme.middle_code).any()):
        return f"a zero point is not {scheme.middle_code}, as the symmetric scheme has it"
    return ""


def weights_fingerprint(folder: Path) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of the weights file."""
    return fingerprint_of(folder / WEIGHTS_FILE)
