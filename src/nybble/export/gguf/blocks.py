"""Codes as blocks of GGUF, and back.

A row of I weights is a sequence of I / 32 blocks. All numbers are little endian.

    Q4_1   20 bytes   f16 d, f16 m, 16 bytes of codes    w = d * code + m    d = scale, m = -scale * zero point
    Q4_0   18 bytes   f16 d, 16 bytes of codes           w = d * (code - 8)  d = scale, zero point 8
    Q8_0   34 bytes   f16 d, 32 signed bytes             w = d * byte        d = scale, byte = code - 128

Byte i of 4-bit codes holds code i in its low nibble and code i + 16 in its high nibble. A group is one block. scale and
scale * zero point are exact in f16 (grid.py), and d * code + m has no rounding in float32, so a reader gets the same
weights to the last bit.

Source: https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from nybble.quant.scheme import QuantScheme
from nybble.quant.weight import QuantizedWeight

BLOCK = 32
"""Weights in a block."""

_HALF = BLOCK // 2
_DTYPES = {
    "Q4_0": np.dtype([("d", "<f2"), ("codes", "u1", _HALF)]),
    "Q4_1": np.dtype([("d", "<f2"), ("m", "<f2"), ("codes", "u1", _HALF)]),
    "Q8_0": np.dtype([("d", "<f2"), ("codes", "u1", BLOCK)]),
}
_SIGN = np.uint8(0x80)
"""code ^ 0x80 is the byte of code - 128 in two's complement."""


def block_type(scheme: QuantScheme) -> str:
    """Return the name of the block type that holds weights of a scheme: Q4_0, Q4_1 or Q8_0."""
    if scheme.bits == 8:
        return "Q8_0"
    return "Q4_0" if scheme.symmetric else "Q4_1"


def row_bytes(kind: str, in_features: int) -> int:
    """Return the bytes of a row of `in_features` weights, a multiple of 32, in blocks of a type."""
    return in_features // BLOCK * _DTYPES[kind].itemsize


def to_blocks(weight: QuantizedWeight) -> NDArray[np.uint8]:
    """Write a weight as blocks.

    Args:
        weight: 4 bits, or 8 bits and symmetric; groups of 32 weights.

    Returns:
        uint8 [O, bytes of a row].
    """
    kind = block_type(weight.scheme)
    codes_OBK = weight.codes_OI.unflatten(1, (-1, BLOCK)).numpy()  # type: ignore[no-untyped-call]
    rows, count, _ = codes_OBK.shape
    blocks_OB = np.empty((rows, count), _DTYPES[kind])
    blocks_OB["d"] = weight.scale_OG.numpy()
    if kind == "Q8_0":
        blocks_OB["codes"] = codes_OBK ^ _SIGN
    else:
        blocks_OB["codes"] = codes_OBK[..., :_HALF] | codes_OBK[..., _HALF:] << 4
    if kind == "Q4_1":
        blocks_OB["m"] = (-weight.scale_OG * weight.zero_point_OG).numpy()
    return blocks_OB.view(np.uint8).reshape(rows, -1)


def from_blocks(data: NDArray[np.uint8], kind: str) -> QuantizedWeight:
    """Read codes, scales and zero points of blocks.

    Args:
        data: uint8 [O, bytes of a row].
        kind: type of the blocks: Q4_0, Q4_1 or Q8_0.

    Returns:
        The weight, in groups of 32.
    """
    blocks_OB = np.ascontiguousarray(data).view(_DTYPES[kind])
    rows = len(blocks_OB)
    codes_OBK = blocks_OB["codes"]
    if kind == "Q8_0":
        codes_OBK, scheme = codes_OBK ^ _SIGN, QuantScheme(8, BLOCK, symmetric=True)
    else:
        codes_OBK = np.concatenate([codes_OBK & np.uint8(0xF), codes_OBK >> np.uint8(4)], axis=2)
        scheme = QuantScheme(4, BLOCK, symmetric=kind == "Q4_0")
    scale_OG = torch.from_numpy(blocks_OB["d"].astype(np.float32))
    if kind == "Q4_1":
        zero_point_OG = torch.from_numpy(-blocks_OB["m"].astype(np.float32)) / scale_OG
    else:
        zero_point_OG = torch.full_like(scale_OG, scheme.middle_code)
    return QuantizedWeight(torch.from_numpy(codes_OBK.reshape(rows, -1)), scale_OG, zero_point_OG.byte(), scheme)
