"""Where a weight lies in its cell, the interval of weights that round to its code: fixed point in code units.

    u        = weight / scale + zero_point - code              -0.5 .. 0.5, and beyond where the code is clipped
    position = clamp(floor(16 * (u + 0.5)), 0, 15)             4 bits
    weight'  = scale * (code - zero_point + (position + 0.5) / 16 - 0.5)

weight' lies in the middle of a sixteenth of the cell, so it rounds to the same code and has the same position. It has
at most 16 significant bits and is exact in float32. A weight whose code is clipped moves to the edge of its cell.

Codes of up to 4 bits and their positions fit into one byte, half of a 16-bit weight:

    byte     = 16 * code + position
    weight'  = scale * ((byte + 0.5) / 16 - 0.5 - zero_point)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.quant.grid import to_groups
from nybble.quant.weight import QuantizedWeight, pack_codes, unpack_codes

POSITION_BITS = 4
MAX_CODE_BITS = 8 - POSITION_BITS
_PARTS = 1 << POSITION_BITS


def pack_positions(weight_OI: Tensor, quantized: QuantizedWeight) -> Tensor:
    """Return the positions of weights in the cells of their codes, two in a byte, the first in the low bits.

    Args:
        weight_OI: weights before rounding, any float dtype. They are compared in float32.
        quantized: the codes that they have, on the device of the weights.

    Returns:
        uint8 [O, ceil(I / 2)]. Where I is odd, the last byte of a row is half empty.
    """
    positions_OI = _positions(weight_OI, quantized)
    return pack_codes(F.pad(positions_OI, (0, positions_OI.shape[1] % 2)), POSITION_BITS)


def weight_at_positions(packed: Tensor, quantized: QuantizedWeight) -> Tensor:
    """Return weights that have the codes and the positions of `pack_positions`; float32 [O, I].

    Args:
        packed: result of `pack_positions`, on the device of the codes.
        quantized: the codes.
    """
    columns, groups = quantized.codes_OI.shape[1], quantized.scale_OG.shape[-1]
    positions_OI = unpack_codes(packed, POSITION_BITS)[:, :columns].float()
    u_OGK = to_groups(positions_OI.add_(0.5).div_(_PARTS).sub_(0.5), groups)
    centered_OGK = to_groups(quantized.codes_OI, groups).float() - quantized.zero_point_OG[..., None]
    return centered_OGK.add_(u_OGK).mul_(quantized.scale_OG[..., None]).flatten(-2)


def to_bytes(weight_OI: Tensor, quantized: QuantizedWeight) -> Tensor:
    """Return code and position of each weight in one byte; uint8 [O, I].

    Args:
        weight_OI: weights before rounding, any float dtype. They are compared in float32.
        quantized: the codes that they have, of up to `MAX_CODE_BITS` bits, on the device of the weights.
    """
    assert quantized.scheme.bits <= MAX_CODE_BITS, f"a byte holds codes of {MAX_CODE_BITS} bits, not {quantized.scheme}"
    return (quantized.codes_OI << POSITION_BITS) | _positions(weight_OI, quantized)


def from_bytes(bytes_OI: Tensor, scale_OG: Tensor, zero_point_OG: Tensor) -> Tensor:
    """Return the weights of `to_bytes`, equal to those of `weight_at_positions`; float32 [O, I].

    Args:
        bytes_OI: result of `to_bytes`.
        scale_OG, zero_point_OG: of the codes, float32.
    """
    w_OGK = to_groups(bytes_OI.float().add_(0.5).div_(_PARTS).sub_(0.5), scale_OG.shape[-1])
    return w_OGK.sub_(zero_point_OG[..., None]).mul_(scale_OG[..., None]).flatten(-2)


def _positions(weight_OI: Tensor, quantized: QuantizedWeight) -> Tensor:
    """uint8 [O, I], 0 .. 15."""
    groups = quantized.scale_OG.shape[-1]
    u_OGK = to_groups(weight_OI.float(), groups) / quantized.scale_OG[..., None]
    u_OGK = u_OGK.add_(quantized.zero_point_OG[..., None]).sub_(to_groups(quantized.codes_OI, groups))
    return u_OGK.add_(0.5).mul_(_PARTS).floor_().clamp_(0, _PARTS - 1).flatten(-2).to(torch.uint8)
