"""The quantizer as a slow reference: Python floats (float64), one weight at a time, and plain autograd."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def round_scale(scale: float) -> float:
    """7 significant bits, rounded half to even, within the normal range of fp16. The sign stays; 0 becomes positive."""
    exponent = math.floor(math.log2(abs(scale))) if scale else -60
    unit = 2.0 ** (exponent - 6)
    return math.copysign(min(max(round(abs(scale) / unit) * unit, 2.0**-14), 65024.0), scale or 1.0)


def min_max(group: list[float], bits: int, symmetric: bool) -> tuple[float, int]:
    """Scale and zero point of one group of weights."""
    max_code, middle = 2**bits - 1, 2 ** (bits - 1)
    if symmetric and bits == 8:
        return round_scale(max(abs(w) for w in group) / (middle - 1)), middle
    if symmetric:  # code 0, which is `middle` steps from zero, becomes the weight that is farthest from it
        farthest = min(group) if -min(group) >= max(group) else max(group)
        return round_scale(farthest / -middle), middle
    low, high = min(0.0, *group), max(0.0, *group)
    scale = round_scale((high - low) / max_code)
    return scale, min(max(round(-low / scale), 0), max_code)


def code(weight: float, scale: float, zero_point: int, bits: int) -> int:
    """Code of one weight. Python's round() rounds half to even."""
    return min(max(round(weight / scale) + zero_point, 0), 2**bits - 1)


def fake_quantize(weight_OI: Tensor, scale_OG: Tensor, zero_point_OG: Tensor, bits: int) -> Tensor:
    """Fake quantization whose straight-through gradients come from autograd, by detaching the rounding."""
    scale_OG1, zero_point_OG1 = scale_OG[..., None], zero_point_OG[..., None]
    scaled_OGK = weight_OI.unflatten(1, (scale_OG.shape[1], -1)) / scale_OG1
    rounded_OGK = scaled_OGK + (scaled_OGK.round() - scaled_OGK).detach()
    codes_OGK = torch.clamp(rounded_OGK + zero_point_OG1, 0, 2**bits - 1)
    return (scale_OG1 * (codes_OGK - zero_point_OG1)).flatten(1)


@dataclass(frozen=True)
class SymmetricLoRA:
    """NNCF 3.4's SymmetricLoraQuantizer (quantize_functions.py, reference.py), one weight at a time in float64.

        scale > 0:  low = -scale            high = 7/8 scale     levels -8 .. 7
        scale < 0:  low = 7/8 scale         high = -scale        levels -7 .. 8
        step   = |scale| / 8
        output = round((clip(w, low, high) - low) / step - zero) * step        zero = round(-low / step)

    for 4 bits. Gradients, with mask = 1 where low <= w <= high:

        d/dw     = mask
        d/dscale = (output - w) / (15/8 |scale|)  inside,   -8/7 below low,   1 above high

    The gradient of the scale is that of the range 15/8 |scale| as if it were the scale, so it is no derivative of the
    output: 8/15 of it inside and 8/7 of it at both ends. For a negative scale it has the opposite sign, and the size of
    the derivative above high and (8/7)^2 of it below low.
    """

    bits: int

    @property
    def levels(self) -> tuple[int, int]:
        """-8 and 7 for 4 bits."""
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

    def output(self, weight: float, scale: float) -> float:
        low, high, step = self._range(scale)
        zero = round(-low / step)
        return round((min(max(weight, low), high) - low) / step - zero) * step

    def gradients(self, weight: float, scale: float) -> tuple[float, float]:
        """(d/dw, d/dscale) of one weight, as the reference computes them."""
        level_low, level_high = self.levels
        low, high, _ = self._range(scale)
        if weight > high:
            return 0.0, 1.0
        if weight < low:
            return 0.0, level_low / level_high
        return 1.0, (self.output(weight, scale) - weight) / (high - low)

    def _range(self, scale: float) -> tuple[float, float, float]:
        level_low, level_high = self.levels
        low = -scale if scale > 0 else -scale / level_low * level_high
        width = abs((2 + 1 / level_low) * scale)
        return low, low + width, width / (level_high - level_low)
