"""Codes of quantized layers as initializers of an ONNX graph, and back.

A weight [O, I] in blocks of K weights, G = I / K blocks a row, is three initializers in model.onnx.data:

    NAME.codes          uint8 [O, G, K / 2] with two 4-bit codes per byte, the first in the low nibble,
                        or uint8 [O, G, K] with 8-bit codes
    NAME.scales         float32 [O, G]
    NAME.zero_points    uint8 [O, ceil(G / 2)] with two 4-bit zero points per byte, the first in the low nibble.
                        Without it every zero point is the middle code: 8 or 128. 8-bit weights have none.

The operators MatMulNBits and GatherBlockQuantized read them and compute scale * (code - zero_point) in float32, which
is exact. A block is a group of 16, 32, 64, 128 or 256 weights.

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

from nybble.models.quantized_file import LazyMapping
from nybble.quant.scheme import QuantScheme
from nybble.quant.weight import QuantizedWeight, pack_codes, unpack_codes

BLOCK_SIZES = (16, 32, 64, 128, 256)
"""Block sizes of MatMulNBits."""

CODES, SCALES, ZERO_POINTS = ".codes", ".scales", ".zero_points"

_PREFIX = re.compile(r"(?P<name>.+?)(\[(?P<begin>\d+):\d+\])?")
"""Name of an initializer without its last component."""

_CODES_INPUT = {"MatMulNBits": 1, "GatherBlockQuantized": 0}
"""Operator -> position of the codes in its inputs."""


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
    part: Part, columns: int, scheme: QuantScheme, read: Callable[[], QuantizedWeight]
) -> dict[str, Any]:
    """Describe the initializers of a weight. Their values are read when they are written.

    Args:
        part: the rows.
        columns: I.
        scheme: of the weight; its groups have one of BLOCK_SIZES.
        read: returns the weight with all of its rows.

    Returns:
        CODES, SCALES and, for asymmetric 4-bit codes, ZERO_POINTS -> onnx_ir.LazyTensor with the name in the graph.
    """
    import onnx_ir as ir

    rows, blocks = part.end - part.begin, scheme.num_groups(columns)
    size = columns // blocks

    def codes() -> np.ndarray:
        codes_OI = read().codes_OI[part.begin : part.end]
        return pack_codes(codes_OI, scheme.bits).reshape(rows, blocks, -1).numpy()

    def scales() -> np.ndarray:
        return read().scale_OG[part.begin : part.end].float().contiguous().numpy()

    def zero_points() -> np.ndarray:
        zero_point_OG = read().zero_point_OG[part.begin : part.end]
        return pack_codes(torch.nn.functional.pad(zero_point_OG, (0, blocks % 2)), 4).numpy()

    def lazy(leaf: str, values: Callable[[], np.ndarray], dtype: Any, *shape: int) -> Any:
        return ir.LazyTensor(lambda: ir.Tensor(values()), dtype, ir.Shape([rows, *shape]), name=part.prefix + leaf)

    initializers = {
        CODES: lazy(CODES, codes, ir.DataType.UINT8, blocks, size * scheme.bits // 8),
        SCALES: lazy(SCALES, scales, ir.DataType.FLOAT, blocks),
    }
    if not scheme.symmetric:
        initializers[ZERO_POINTS] = lazy(ZERO_POINTS, zero_points, ir.DataType.UINT8, (blocks + 1) // 2)
    return initializers


def module_of(initializer: str) -> str:
    """Return the name of the module whose codes, scales or zero points an initializer holds."""
    return _split(initializer)[0]


def _split(initializer: str) -> tuple[str, int]:
    """Return the name of the module and the first of its rows."""
    matched = _PREFIX.fullmatch(initializer.rpartition(".")[0])
    assert matched, initializer
    return matched["name"], int(matched["begin"] or 0)


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
    parts: dict[str, dict[int, QuantizedPart]] = {}
    for node in graph.node:
        if node.op_type in _CODES_INPUT:
            codes = node.input[_CODES_INPUT[node.op_type]]
            bits = next(attribute.i for attribute in node.attribute if attribute.name == "bits")
            name, begin = _split(codes)
            parts.setdefault(name, {})[begin] = QuantizedPart(codes.removesuffix(CODES), bits)

    def read(part: QuantizedPart) -> QuantizedWeight:
        names = {leaf: part.prefix + leaf for leaf in (CODES, SCALES, ZERO_POINTS)}
        return _unpack(
            {
                leaf: _read_initializer(initializers[name], model_file.parent)
                for leaf, name in names.items()
                if name in initializers
            },
            part.bits,
        )

    return LazyMapping(parts, lambda name: _join([read(part) for _, part in sorted(parts[name].items())]))


class QuantizedPart(NamedTuple):
    """Some rows of a quantized module in a saved graph.

    Attributes:
        prefix: of the names of its initializers.
        bits: 4 or 8.
    """

    prefix: str
    bits: int


def _join(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Put the rows of the parts below each other."""
    if len(parts) == 1:
        return parts[0]
    return QuantizedWeight(
        torch.cat([part.codes_OI for part in parts]),
        torch.cat([part.scale_OG for part in parts]),
        torch.cat([part.zero_point_OG for part in parts]),
        parts[0].scheme,
    )


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


def _read_initializer(tensor: Any, folder: Path) -> Tensor:
    """Read the values of an initializer from the file of external data."""
    import onnx
    from onnx.external_data_helper import ExternalDataInfo

    place = ExternalDataInfo(tensor)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    values = np.fromfile(folder / place.location, dtype, int(np.prod(tensor.dims)), offset=place.offset or 0)
    return torch.from_numpy(values).reshape(*tensor.dims)
