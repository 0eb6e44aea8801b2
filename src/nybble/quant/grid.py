"""The arithmetic of the quantized weight. The only file that rounds or clamps weights.

    codes = clamp(round(weight / scale) + zero, 0, 2**bits - 1)        weight' = scale * (codes - zero)

Codes and zero are unsigned integers of `bits` bits; each group of `group_size` weights along the input axis shares one
scale > 0 and one zero. Scales live on a coarse grid of their own, 7 significant bits within the normal range of fp16, so that
scale, scale * (code - zero) and scale * zero have at most 11 significant bits and are exact in fp16 (4-bit codes): every
export holds the same weight to the last bit.

Shapes: O outputs, I inputs, G groups per row, K = I / G weights per group. Everything is computed in the dtype given (float32
in training, float64 in tests), rounding half to even.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.quant.scheme import QuantScheme

SCALE_BITS = 7
# Smallest and largest numbers with 7 significant bits in the normal range of fp16: 2**-14 and (2 - 2**-6) * 2**15.
SCALE_MIN, SCALE_MAX = 2.0**-14, 65024.0


def to_groups(weight_OI: Tensor, groups: int) -> Tensor:
    """[O, I] -> [O, G, K], a view."""
    return weight_OI.unflatten(-1, (groups, -1))  # type: ignore[no-any-return, no-untyped-call]


def at_least_float32(tensor: Tensor) -> Tensor:
    """In at least float32, the precision in which weights are computed with."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def round_scale(scale: Tensor) -> Tensor:
    """Round to 7 significant bits and keep within the normal fp16 range. 0.1 -> 0.099609375 = 102 / 1024."""
    mantissa, exponent = torch.frexp(scale)  # 0.5 <= mantissa < 1
    return torch.ldexp(torch.round(mantissa * 2**SCALE_BITS), exponent - SCALE_BITS).clamp(SCALE_MIN, SCALE_MAX)


def shift_within_cell(scale: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Logarithms of factors, one a scale, that `round_scale` takes back: round_scale(scale * exp(shift)) == scale.

    scale * exp(shift) is drawn uniformly, on the CPU, from the numbers that round to the scale. Trained from there, about as large a share of the
    scales crosses a rounding border as the mean scale has moved by; started from the middle, none would before all had gone half a cell
    (0.4 to 0.8 %).

    Args:
        scale: on the scale grid, any shape. Returns: the same shape and dtype.
    """
    step = torch.ldexp(torch.ones_like(scale), torch.frexp(scale).exponent - SCALE_BITS)
    drawn = scale + step * (torch.rand(scale.shape, generator=generator).to(scale) - 0.5)
    shift = (drawn / scale).log()
    return torch.where(
        round_scale(scale * shift.exp()) == scale, shift, 0
    )  # at a power of two the cell is narrower below


def min_max_qparams(weight_OI: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """Scale and zero by round-to-nearest: the range of each group, widened to hold 0, spread over all codes.

    Args:
        weight_OI: weights, any float dtype; computed in at least float32.
        grid: the grid; its group_size must divide I.

    Returns:
        scale_OG on the scale grid and zero_point_OG (whole numbers), both in the dtype of the computation.
    """
    w_OGK = to_groups(at_least_float32(weight_OI), scheme.groups(weight_OI.shape[-1]))
    if scheme.symmetric:
        scale_OG = round_scale(w_OGK.abs().amax(-1) / (scheme.middle - 1))
        return scale_OG, torch.full_like(scale_OG, scheme.middle)
    return qparams_from_range(w_OGK.amin(-1), w_OGK.amax(-1), scheme)


def qparams_from_range(low_OG: Tensor, high_OG: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """Scale and zero of an asymmetric grid that spreads all codes over a range, widened to hold 0."""
    low_OG, high_OG = low_OG.clamp(max=0), high_OG.clamp(min=0)
    scale_OG = round_scale((high_OG - low_OG) / scheme.max_code)
    return scale_OG, round_zero_point(-low_OG / scale_OG, scheme)


def round_zero_point(zero: Tensor, scheme: QuantScheme) -> Tensor:
    """Nearest valid zero: a whole number from 0 to the largest code."""
    return zero.round().clamp(0, scheme.max_code)


def quantize(weight_OI: Tensor, scale_OG: Tensor, zero_point_OG: Tensor, scheme: QuantScheme) -> Tensor:
    """Codes [O, I] uint8 of the weights. scale_OG must be on the scale grid, zero_point_OG whole."""
    return _codes(weight_OI, scale_OG, zero_point_OG, scheme).flatten(-2).to(torch.uint8)


def _codes(weight_OI: Tensor, scale_OG: Tensor, zero_point_OG: Tensor, scheme: QuantScheme) -> Tensor:
    """Codes [O, G, K] as floats."""
    codes_OGK = to_groups(weight_OI, scale_OG.shape[-1]) / scale_OG[..., None]
    return codes_OGK.round_().add_(zero_point_OG[..., None]).clamp_(0, scheme.max_code)


def dequantize(codes_OI: Tensor, scale_OG: Tensor, zero_point_OG: Tensor) -> Tensor:
    """Weights [O, I] = scale * (codes - zero), in the dtype of scale."""
    w_OGK = to_groups(codes_OI, scale_OG.shape[-1]).to(scale_OG.dtype)
    return w_OGK.sub_(zero_point_OG[..., None]).mul_(scale_OG[..., None]).flatten(-2)


def quantize_dequantize(weight_OI: Tensor, scale_OG: Tensor, zero_point_OG: Tensor, scheme: QuantScheme) -> Tensor:
    """dequantize(quantize(weight)), without the detour over integers: the same bits."""
    codes_OGK = _codes(weight_OI, scale_OG, zero_point_OG, scheme)
    return codes_OGK.sub_(zero_point_OG[..., None]).mul_(scale_OG[..., None]).flatten(-2)
