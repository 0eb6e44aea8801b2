"""QuantizedInit: the compressed state of one layer, from which training starts or which ships as it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.quant.grid import at_least_float32, dequantize, quantize
from nybble.quant.scheme import QuantScheme
from nybble.quant.weight import QuantizedWeight


@dataclass(frozen=True)
class RoundedWeight:
    """What a rounding method returns for some rows of a weight.

    Attributes:
        codes_OI: uint8, 0 .. scheme.max_code.
        weight_OI: the weight that rounds to these codes; the original one, or the original one moved by the method.
            At least float32.
        scale_OG: on the scale grid of quant/grid.py, in the dtype of weight_OI.
        zero_point_OG: whole numbers in code units, in the dtype of weight_OI.
    """

    codes_OI: Tensor
    weight_OI: Tensor
    scale_OG: Tensor
    zero_point_OG: Tensor


@dataclass(frozen=True)
class QuantizedInit:
    """A layer after compression. The weight keeps its position between the codes, so adapters can move it further.

    Attributes:
        weight_OI: the weight before rounding, in the dtype of the model.
        scale_OG: float32, on the scale grid of quant/grid.py.
        zero_point_OG: float32, whole numbers in code units.
    """

    weight_OI: Tensor
    scale_OG: Tensor
    zero_point_OG: Tensor

    @staticmethod
    def from_rounded(rounded: RoundedWeight, scheme: QuantScheme, dtype: torch.dtype) -> QuantizedInit:
        """An init in `dtype` that rounds to exactly the codes of `rounded`.

        Compression methods leave many weights close to a rounding boundary. In 16 bits some of them would fall on the
        other side, and most of what the method gained would be lost. Such a weight is replaced by the value of its
        code. That value has at most 11 significant bits and lies in the middle of the rounding interval, so rounding it
        to any 16-bit dtype keeps the code.
        """
        scale_OG, zero_point_OG = rounded.scale_OG, rounded.zero_point_OG
        weight_OI = rounded.weight_OI.to(dtype)
        kept_OI = quantize(at_least_float32(weight_OI), scale_OG, zero_point_OG, scheme) == rounded.codes_OI
        code_value_OI = dequantize(rounded.codes_OI, scale_OG, zero_point_OG).to(dtype)
        return QuantizedInit(torch.where(kept_OI, weight_OI, code_value_OI), scale_OG, zero_point_OG)

    @staticmethod
    def with_codes(quantized: QuantizedWeight, weight_OI: Tensor, dtype: torch.dtype) -> QuantizedInit:
        """An init in `dtype` with the codes of `quantized`, as near to `weight_OI` as it can be.

        Args:
            quantized: the codes, on the device of `weight_OI`.
            weight_OI: any float dtype. Where it does not have these codes, the value of the code is taken.
            dtype: of the init.
        """
        scale_OG, zero_point_OG = quantized.scale_OG.float(), quantized.zero_point_OG.float()
        rounded = RoundedWeight(quantized.codes_OI, at_least_float32(weight_OI), scale_OG, zero_point_OG)
        return QuantizedInit.from_rounded(rounded, quantized.scheme, dtype)

    def quantized(self, scheme: QuantScheme) -> QuantizedWeight:
        """The codes of this layer if it is not trained any further."""
        codes_OI = quantize(at_least_float32(self.weight_OI), self.scale_OG, self.zero_point_OG, scheme)
        return QuantizedWeight(codes_OI, self.scale_OG, self.zero_point_OG.to(codes_OI.dtype), scheme)
