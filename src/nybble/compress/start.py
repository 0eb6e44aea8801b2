"""Start: what a compression method says of one layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nybble.grid import Grid, quantize
from nybble.quantized import QuantizedWeight


@dataclass(frozen=True)
class Start:
    """Where tuning of one layer starts.

    Attributes:
        weight_OI: the weight to be rounded; the model's own, or moved by the method.
        scale_OG: float32, on the scale grid.
        zero_OG: float32, whole numbers.
    """

    weight_OI: Tensor
    scale_OG: Tensor
    zero_OG: Tensor

    def quantized(self, grid: Grid) -> QuantizedWeight:
        """The compressed weight, without any tuning."""
        codes_OI = quantize(self.weight_OI.float(), self.scale_OG, self.zero_OG, grid)
        return QuantizedWeight(codes_OI, self.scale_OG, self.zero_OG.to(codes_OI.dtype), grid)
