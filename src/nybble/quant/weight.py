"""QuantizedWeight: a weight matrix as codes. Exports see nothing else of a quantized layer.

Packed form of 4-bit codes: two codes per byte along the input axis, the even position in the low nibble.

    byte[o, i / 2] = code[o, i] | code[o, i + 1] << 4        (i even)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.quant.grid import dequantize
from nybble.quant.scheme import QuantScheme


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

    @property
    def nbytes(self) -> int:
        """Size in bytes as exported: packed codes, fp16 scales and, unless they are fixed, packed zero points."""
        zero_point_bits = 0 if self.scheme.symmetric else self.scheme.bits
        return (self.codes_OI.numel() * self.scheme.bits + self.scale_OG.numel() * (16 + zero_point_bits) + 7) // 8


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack two 4-bit codes into a byte. Example: [1, 2] -> [0x21].

    Args:
        codes: uint8 [..., N], values 0 .. 15. N must be even.

    Returns:
        uint8 [..., N / 2], the even position in the low nibble.

    Raises:
        AssertionError: N is odd. Callers pad.
    """
    assert codes.shape[-1] % 2 == 0, f"pack_nibbles needs an even number of codes per row, got {codes.shape[-1]}"
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Unpack the result of `pack_nibbles`: uint8 [..., N / 2] -> uint8 [..., N]."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)
