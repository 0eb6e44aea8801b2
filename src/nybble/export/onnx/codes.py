"""Codes of quantized layers as initializers of an ONNX graph, and back.

A weight [O, I] in blocks of K weights, G = I / K blocks a row, is three initializers in model.onnx.data:

    NAME.codes          uint8 [O, G, K / 2] with two 4-bit codes per byte, the first in the low nibble,
                        or uint8 [O, G, K] with 8-bit codes
    NAME.scales         float32 [O, G]
    NAME.zero_points    uint8 [O, ceil(G / 2)] with two 4-bit zero points per byte, the first in the low nibble.
                        Without it every zero point is the middle code: 8 or 128. 8-bit weights have none.

The operators MatMulNBits and GatherBlockQuantized read them and compute scale * (code - zero_point) in float32, which
is exact. A block is a group of 16, 32, 64, 128 or 256 weights.

Experts of a layer are one weight PATH.*.NAME with the number of the expert as the first axis of all initializers.
QMoE reads it; rows of gate_up_proj are gates and ups in turns there (experts.py).

A layer that the graph splits, such as a fused projection of query, key and value, is one weight for each range of
rows, with the names NAME[BEGIN:END].codes and so on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nybble.export.places import Place, by_name, join_weights, reorder_weight, to_halves
from nybble.models.quantized_file import LazyMapping
from nybble.quant.scheme import QuantScheme
from nybble.quant.weight import QuantizedWeight, pack_codes, unpack_codes

BLOCK_SIZES = (16, 32, 64, 128, 256)
"""Block sizes of MatMulNBits."""

CODES, SCALES, ZERO_POINTS = ".codes", ".scales", ".zero_points"

_PREFIX = re.compile(r"(?P<name>.+?)(\[(?P<begin>\d+):\d+\])?")
"""Name of an initializer without its last component."""

_CODES_INPUTS = {"MatMulNBits": (1,), "GatherBlockQuantized": (0,), "QMoE": (2, 5)}
"""Operator -> positions of codes in its inputs."""

ANY_EXPERT = ".*."
"""Stands for the number of the expert in the name of a stack."""

GATE_UP = "gate_up_proj"
"""Projection whose rows are interleaved in a stack."""


class Part(NamedTuple):
    """Rows of a quantized module.

    Attributes:
        name: of the module.
        begin, end: the rows.
        whole: whether these are all rows.
    """

    name: str
    begin: int
    end: int
    whole: bool = True

    @property
    def prefix(self) -> str:
        """Names of the initializers without their last component."""
        return self.name if self.whole else f"{self.name}[{self.begin}:{self.end}]"


def lazy_initializers(
    prefix: str, rows: Sequence[int], columns: int, scheme: QuantScheme, read: Callable[[], QuantizedWeight]
) -> dict[str, Any]:
    """Describe the initializers of a weight. Their values are read when they are written.

    Args:
        prefix: of their names.
        rows: [O], or [E, O] of a stack of experts.
        columns: I.
        scheme: of the weight; its groups have one of BLOCK_SIZES.
        read: returns the weight with these rows.

    Returns:
        CODES, SCALES and, for asymmetric 4-bit codes, ZERO_POINTS -> onnx_ir.LazyTensor with the name in the graph.
    """
    import onnx_ir as ir

    blocks = scheme.num_groups(columns)
    row_bytes = columns * scheme.bits // 8

    def codes() -> np.ndarray:
        return pack_codes(read().codes_OI, scheme.bits).numpy()

    def scales() -> np.ndarray:
        return read().scale_OG.float().contiguous().numpy()

    def zero_points() -> np.ndarray:
        return pack_codes(torch.nn.functional.pad(read().zero_point_OG, (0, blocks % 2)), 4).numpy()

    def lazy(leaf: str, values: Callable[[], np.ndarray], dtype: Any, *axes: int) -> Any:
        shape = [*rows, *axes]
        return ir.LazyTensor(lambda: ir.Tensor(values().reshape(shape)), dtype, ir.Shape(shape), name=prefix + leaf)

    axes = (row_bytes,) if len(rows) > 1 else (blocks, row_bytes // blocks)  # of QMoE, of MatMulNBits
    initializers = {
        CODES: lazy(CODES, codes, ir.DataType.UINT8, *axes),
        SCALES: lazy(SCALES, scales, ir.DataType.FLOAT, blocks),
    }
    if not scheme.symmetric:
        initializers[ZERO_POINTS] = lazy(ZERO_POINTS, zero_points, ir.DataType.UINT8, (blocks + 1) // 2)
    return initializers


def module_of(initializer: str) -> str:
    """Return the name of the module whose codes, scales or zero points an initializer holds."""
    matched = _PREFIX.fullmatch(initializer.rpartition(".")[0])
    assert matched, initializer
    return matched["name"]


def read_graph(model_file: Path) -> Mapping[str, QuantizedWeight]:
    """Find the quantized weights that the operators of a saved graph use.

    Args:
        model_file: the graph; its external data is beside it.

    Returns:
        Module name -> quantized weight, read at each access.
    """
    import onnx

    graph = onnx.load(model_file, load_external_data=False).graph
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    bits, places = dict[str, int](), list[Place]()
    for node in graph.node:
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        for position in _CODES_INPUTS.get(node.op_type, ()):
            prefix = node.input[position].removesuffix(CODES)
            if prefix not in bits:  # the codes of a tied head are used twice
                places += _places(prefix, initializers[prefix + SCALES].dims)
            bits[prefix] = attributes["bits" if "bits" in attributes else "expert_weight_bits"]
    modules = by_name(places)

    def read(place: Place) -> QuantizedWeight:
        names = {leaf: place.tensor + leaf for leaf in (CODES, SCALES, ZERO_POINTS)}
        leaves = {
            leaf: _read_initializer(initializers[name], model_file.parent, place.matrix)
            for leaf, name in names.items()
            if name in initializers
        }
        interleaved = place.matrix is not None and place.tensor.endswith(GATE_UP)
        return reorder_weight(_unpack(leaves, bits[place.tensor]), 1 if interleaved else None, to_halves)

    return LazyMapping(modules, lambda name: join_weights(modules[name], [read(place) for place in modules[name]]))


def _places(prefix: str, scales: Sequence[int]) -> list[Place]:
    """Where the rows of initializers are in memory; `scales` is the shape of their scales."""
    path, is_stack, leaf = prefix.partition(ANY_EXPERT)
    if is_stack:
        return [Place(prefix, f"{path}.{i}.{leaf}", matrix=i) for i in range(scales[0])]
    matched = _PREFIX.fullmatch(prefix)
    assert matched, prefix
    begin = int(matched["begin"] or 0)
    return [Place(prefix, matched["name"], slice(begin, begin + scales[0]))]


def _unpack(leaves: Mapping[str, Tensor], bits: int) -> QuantizedWeight:
    packed, scale_OG = leaves[CODES].flatten(1), leaves[SCALES]
    codes_OI = unpack_codes(packed, bits)
    blocks = scale_OG.shape[1]
    if ZERO_POINTS in leaves:
        zero_point_OG = unpack_codes(leaves[ZERO_POINTS], 4)[:, :blocks]
    else:
        zero_point_OG = torch.full(scale_OG.shape, 1 << (bits - 1), dtype=torch.uint8)
    scheme = QuantScheme(bits, codes_OI.shape[1] // blocks, symmetric=ZERO_POINTS not in leaves)
    return QuantizedWeight(codes_OI, scale_OG, zero_point_OG, scheme)


def _read_initializer(tensor: Any, folder: Path, matrix: int | None) -> Tensor:
    """Read the values of an initializer, or of one expert of a stack, from the file of external data."""
    import onnx
    from onnx.external_data_helper import ExternalDataInfo

    place, dtype = ExternalDataInfo(tensor), np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    shape = list(tensor.dims) if matrix is None else list(tensor.dims)[1:]
    count = int(np.prod(shape))
    offset = (place.offset or 0) + (matrix or 0) * count * dtype.itemsize
    return torch.from_numpy(np.fromfile(folder / place.location, dtype, count, offset=offset)).reshape(*shape)
