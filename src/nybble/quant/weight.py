"""QuantizedWeight: the one value that leaves training. Exports see nothing else of a quantized layer.

Packed form of 4-bit codes: two codes a byte along the input axis, the even position in the low nibble.

    byte[o, i // 2] = code[o, i] | code[o, i + 1] << 4        (i even)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.quant.grid import dequantize
from nybble.quant.scheme import QuantScheme


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight matrix as codes.

    Attributes:
        codes_OI: uint8, 0 .. grid.max_code.
        scale_OG: float32, on the scale grid of grid.py, hence exact in fp16.
        zero_point_OG: uint8, in code units.
        grid: bits, group size, symmetry.
    """

    codes_OI: Tensor
    scale_OG: Tensor
    zero_point_OG: Tensor
    scheme: QuantScheme

    def dequantize(self) -> Tensor:
        """float32 [O, I] = scale * (codes - zero)."""
        return dequantize(self.codes_OI, self.scale_OG, self.zero_point_OG)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same on a device; no copy of what is there already."""
        return QuantizedWeight(
            self.codes_OI.to(device), self.scale_OG.to(device), self.zero_point_OG.to(device), self.scheme
        )

    def cpu(self) -> QuantizedWeight:
        """The same on the CPU."""
        return self.to("cpu")

    @property
    def nbytes(self) -> int:
        """Bytes when shipped: packed codes, fp16 scales, packed zeros (a fixed zero costs nothing)."""
        zero_bits = 0 if self.scheme.symmetric else self.scheme.bits
        return (self.codes_OI.numel() * self.scheme.bits + self.scale_OG.numel() * (16 + zero_bits) + 7) // 8


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 codes below 16, [..., N] with N even -> uint8 [..., N / 2], the even position in the low nibble. [1, 2] -> [0x21]."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Inverse of `pack_nibbles`: uint8 [..., N / 2] -> uint8 [..., N]."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)
