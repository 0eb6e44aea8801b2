"""QuantizedWeight: a weight matrix as codes. Exports see nothing else of a quantized layer.

Packed form of codes: consecutive along the input axis, the first in the lowest bits.

    2 bits   byte[o, i / 4] = code[o, i] | code[o, i + 1] << 2 | code[o, i + 2] << 4 | code[o, i + 3] << 6
    3 bits   eight codes in three bytes: code[o, i] | code[o, i + 1] << 3 | ... | code[o, i + 7] << 21, low byte first
    4 bits   byte[o, i / 2] = code[o, i] | code[o, i + 1] << 4
    8 bits   byte[o, i] = code[o, i]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.quant.grid import dequantize, to_groups
from nybble.quant.scheme import CODES_PER_UNIT, QuantScheme


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized weight matrix.

    Attributes:
        codes_OI: uint8, 0 .. scheme.max_code, one code per byte.
        scale_OG: float32, on the scale grid of grid.py and therefore exact in fp16.
        zero_point_OG: uint8, 0 .. scheme.max_code.
        scheme: bits, group size and symmetry.
    """

    codes_OI: Tensor
    scale_OG: Tensor
    zero_point_OG: Tensor
    scheme: QuantScheme

    def dequantize(self) -> Tensor:
        """Return the weights scale * (code - zero_point), float32 [O, I]."""
        return dequantize(self.codes_OI, self.scale_OG, self.zero_point_OG)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """Return this weight on a device. Tensors that are already there are shared, not copied."""
        return QuantizedWeight(
            self.codes_OI.to(device), self.scale_OG.to(device), self.zero_point_OG.to(device), self.scheme
        )

    def recoded(self, scheme: QuantScheme) -> QuantizedWeight:
        """Return the same weights as codes of another scheme: of more bits, symmetric, or with smaller groups.

            code' = code - zero_point + zero_point'        scale' = scale, repeated for the parts of a group

        Args:
            scheme: each of its groups lies within a group of this weight.

        Raises:
            AssertionError: the scheme cannot hold these weights exactly.
        """
        columns, groups = self.codes_OI.shape[1], self.scale_OG.shape[1]
        repeats = scheme.num_groups(columns) // groups
        assert repeats * groups == scheme.num_groups(columns), f"groups of {self.scheme} must be split by {scheme}"
        if scheme == self.scheme:
            return self
        scale_OG, zero_point_OG = (part.repeat_interleave(repeats, 1) for part in (self.scale_OG, self.zero_point_OG))
        if not scheme.symmetric:
            fits = scheme.bits >= self.scheme.bits and not self.scheme.symmetric
            assert fits, f"{scheme} must hold {self.scheme}"
            return QuantizedWeight(self.codes_OI, scale_OG, zero_point_OG, scheme)
        codes_OGK = to_groups(self.codes_OI, scale_OG.shape[1]).short()
        codes_OI = (codes_OGK - zero_point_OG[..., None].short()).add_(scheme.middle_code).flatten(-2)
        low, high = codes_OI.aminmax()
        fits = int(low) >= 0 and int(high) <= scheme.max_code
        assert fits, f"{scheme} must hold {self.scheme}"
        middle_OG = torch.full_like(zero_point_OG, scheme.middle_code)
        return QuantizedWeight(codes_OI.to(torch.uint8), scale_OG, middle_OG, scheme)

    @property
    def nbytes(self) -> int:
        """Size in bytes as exported: packed codes, fp16 scales and, unless they are fixed, packed zero points."""
        zero_point_bits = 0 if self.scheme.symmetric else self.scheme.bits
        return (self.codes_OI.numel() * self.scheme.bits + self.scale_OG.numel() * (16 + zero_point_bits) + 7) // 8


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into bytes, the first in the lowest bits. Examples: 4 bits [1, 2] -> [0x21]; 2 bits [1, 2, 3, 0] ->
    [0x39].

    Args:
        codes: uint8 [..., N], values 0 .. 2^bits - 1. N must be a multiple of `CODES_PER_UNIT`.
        bits: 2, 3, 4 or 8.

    Returns:
        uint8 [..., N * bits / 8].

    Raises:
        AssertionError: N is no such multiple. Callers pad.
    """
    unit, width = CODES_PER_UNIT[bits], codes.shape[-1]
    assert width % unit == 0, f"pack_codes needs a multiple of {unit} {bits}-bit codes per row, got {width}"
    if bits == 8:
        return codes
    if bits == 3:  # eight codes are the 24 bits of three bytes
        words = sum(codes[..., i::8].int() << 3 * i for i in range(8))
        assert isinstance(words, Tensor)
        return torch.stack([words >> 8 * j & 0xFF for j in range(3)], dim=-1).flatten(-2).to(torch.uint8)
    packed = codes[..., 0::unit].clone()
    for i in range(1, unit):
        packed |= codes[..., i::unit] << bits * i
    return packed


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """Unpack the result of `pack_codes`: uint8 [..., N * bits / 8] -> uint8 [..., N]."""
    unit, mask = CODES_PER_UNIT[bits], (1 << bits) - 1
    if bits == 8:
        return packed
    if bits == 3:
        words = sum(packed[..., j::3].int() << 8 * j for j in range(3))
        assert isinstance(words, Tensor)
        return torch.stack([words >> 3 * i & mask for i in range(8)], dim=-1).flatten(-2).to(torch.uint8)
    return torch.stack([packed >> bits * i & mask for i in range(unit)], dim=-1).flatten(-2)
