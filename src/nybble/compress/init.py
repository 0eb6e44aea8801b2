"""Start: what a compression method says of one layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.quant.grid import at_least_float32, dequantize, quantize
from nybble.quant.scheme import QuantScheme
from nybble.quant.weight import QuantizedWeight


@dataclass(frozen=True)
class QuantizedInit:
    """Where tuning of one layer starts.

    Attributes:
        weight_OI: the weight to be rounded; the model's own, or moved by the method. In the dtype of the model.
        scale_OG: float32, on the scale grid.
        zero_point_OG: float32, whole numbers.
    """

    weight_OI: Tensor
    scale_OG: Tensor
    zero_point_OG: Tensor

    @staticmethod
    def keeping(
        codes_OI: Tensor,
        weight_OI: Tensor,
        scale_OG: Tensor,
        zero_point_OG: Tensor,
        scheme: QuantScheme,
        dtype: torch.dtype,
    ) -> QuantizedInit:
        """A start in `dtype` that rounds to exactly these codes: weight_OI where it does, elsewhere the value of the code itself.

        Methods put weights close to rounding boundaries; in 16 bits some of them fall on the other side, and with them most of what the
        method gained (perplexity 39.1 became 41.2 in an early trial). The value of a code has at most 11 bits and lies in the middle of its interval, so its
        rounding to any 16-bit dtype keeps the code.
        """
        weight_OI = weight_OI.to(dtype)
        same_OI = quantize(at_least_float32(weight_OI), scale_OG, zero_point_OG, scheme) == codes_OI
        return QuantizedInit(
            torch.where(same_OI, weight_OI, dequantize(codes_OI, scale_OG, zero_point_OG).to(dtype)),
            scale_OG,
            zero_point_OG,
        )

    def quantized(self, scheme: QuantScheme) -> QuantizedWeight:
        """The compressed weight, without any tuning."""
        codes_OI = quantize(at_least_float32(self.weight_OI), self.scale_OG, self.zero_point_OG, scheme)
        return QuantizedWeight(codes_OI, self.scale_OG, self.zero_point_OG.to(codes_OI.dtype), scheme)
