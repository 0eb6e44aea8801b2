"""The arithmetic of quantized weights. Weights are rounded and clamped in this package only.

    code    = clamp(round(weight / scale) + zero_point, 0, 2^bits - 1)
    weight' = scale * (code - zero_point)

Codes and zero points are unsigned integers of `bits` bits. Each group of K weights along the input axis shares one
scale and one zero point. `round` rounds half to even. Scales are positive, but for symmetric codes of less than 8 bits,
where a negative one turns the longer side of the codes to the positive weights (`QuantScheme.signed_scales`).

Scales have 7 significant bits and their sizes lie in the normal range of fp16; these values are called the scale grid.
With codes of up to 4 bits, scale * (code - zero_point) and scale * zero_point then have at most 11 significant bits. Up
to the largest fp16 number both are exact in fp16, so every export format holds the same weights to the last bit. With
8-bit codes, whose zero point is 128, the product has at most 14 significant bits and is exact in float32: formats that
hold codes hold these weights to the last bit too, and those that hold values in fp16 round them.

Shapes: O outputs, I inputs, G groups per row, K = I / G weights per group. Every function computes in the dtype of its
arguments: float32 in training, float64 in tests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.quant.scheme import QuantScheme

SCALE_BITS = 7
# Smallest and largest numbers with 7 significant bits in the normal range of fp16: 2^-14 and (2 - 2^-6) * 2^15.
SCALE_MIN, SCALE_MAX = 2.0**-14, 65024.0


def to_groups(weight_OI: Tensor, num_groups: int) -> Tensor:
    """Split the input axis into groups: [..., I] -> [..., G, K]. Returns a view."""
    return weight_OI.unflatten(-1, (num_groups, -1))  # type: ignore[no-any-return, no-untyped-call]


def at_least_float32(tensor: Tensor) -> Tensor:
    """Cast fp16 and bfloat16 tensors to float32; return float32 and float64 tensors unchanged."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def round_scale(scale: Tensor) -> Tensor:
    """Round to 7 significant bits and clamp the size to the normal range of fp16; the sign stays, and 0 becomes
    positive. Example: 0.1 -> 0.099609375 = 102 / 1024.

    Args:
        scale: any shape, float32 or float64.

    Returns:
        The nearest values of the scale grid, in the same shape and dtype.
    """
    mantissa, exponent = torch.frexp(scale.abs())  # 0.5 <= mantissa < 1
    size = torch.ldexp(torch.round(mantissa * 2**SCALE_BITS), exponent - SCALE_BITS).clamp_(SCALE_MIN, SCALE_MAX)
    return torch.where(scale < 0, -size, size)


def random_log_shift(scale: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw initial log shifts of trainable scales that leave the rounded scales unchanged.

        round_scale(scale * exp(shift)) == scale

    scale * exp(shift) is uniform over the interval of values that round to the scale. If all shifts were zero, every
    scale would sit in the middle of its interval, and none would change before training had moved it by half an
    interval (0.4 % to 0.8 %). With uniform positions, small movements of the shifts already change a proportional
    share of the scales.

    Args:
        scale: any shape, values on the scale grid, float32 or float64.
        generator: CPU random generator. None uses the global one.

    Returns:
        Log shifts in the shape, dtype and device of `scale`. They are drawn on the CPU, so they do not depend on the
        device.
    """
    step = torch.ldexp(torch.ones_like(scale), torch.frexp(scale).exponent - SCALE_BITS)
    drawn = scale + step * (torch.rand(scale.shape, generator=generator).to(scale) - 0.5)
    shift = (drawn / scale).log()
    # Below a power of two the interval is only half as wide. A draw outside of it becomes a shift of zero.
    return torch.where(round_scale(scale * shift.exp()) == scale, shift, 0)


def min_max_qparams(weight_OI: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """Round-to-nearest (RTN) scale and zero point: the range of each group, extended to contain 0, spans all codes.

        asymmetric:        scale = round_scale((max - min) / max_code)       zero_point = clamp(round(-min / scale))
        symmetric:         scale = round_scale(-farthest / middle_code)      zero_point = middle_code
        symmetric, 8 bits: scale = round_scale(max |w| / (middle_code - 1))  zero_point = middle_code

    farthest is the weight with the largest |w|. It gets code 0, the only one that is middle_code steps from zero.

    Args:
        weight_OI: weights, any float dtype. fp16 and bfloat16 are computed in float32.
        scheme: quantization scheme. Its group_size must divide I.

    Returns:
        scale_OG on the scale grid and zero_point_OG (integral values), both in the dtype of the computation.
    """
    w_OGK = to_groups(at_least_float32(weight_OI), scheme.num_groups(weight_OI.shape[-1]))
    low_OG, high_OG = w_OGK.amin(-1), w_OGK.amax(-1)
    if not scheme.symmetric:
        return qparams_from_range(low_OG, high_OG, scheme)
    if scheme.signed_scales:
        farthest_OG = torch.where(-low_OG >= high_OG, low_OG, high_OG)
        scale_OG = round_scale(farthest_OG / -scheme.middle_code)
    else:
        scale_OG = round_scale(torch.maximum(-low_OG, high_OG) / (scheme.middle_code - 1))
    return scale_OG, torch.full_like(scale_OG, scheme.middle_code)


def below_grid(weight_OI: Tensor, scheme: QuantScheme) -> Tensor:
    """Return which groups are too small for the scale grid: the smallest scale leaves them fewer than 8 codes, or fewer
    than half of the codes of less than 4 bits.

        0 < max(w, 0) - min(w, 0) < min(8, middle_code) * SCALE_MIN

    Groups below 1e-10 count as zero: models have such rows for tokens that no text uses.

    Args:
        weight_OI: weights, any float dtype.
        scheme: quantization scheme. Its group_size must divide I.

    Returns:
        bool [O, G].
    """
    w_OGK = to_groups(weight_OI, scheme.num_groups(weight_OI.shape[-1]))
    span_OG = at_least_float32(w_OGK.amax(-1)).clamp(min=0) - at_least_float32(w_OGK.amin(-1)).clamp(max=0)
    return (span_OG > 1e-10) & (span_OG < min(8, scheme.middle_code) * SCALE_MIN)


def qparams_from_range(low_OG: Tensor, high_OG: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """Asymmetric scale and zero point whose codes span the range low .. high, extended to contain 0.

    Args:
        low_OG, high_OG: range of each group, float32 or float64.
        scheme: asymmetric quantization scheme.

    Returns:
        scale_OG on the scale grid and zero_point_OG (integral values), in the dtype of the range.
    """
    low_OG, high_OG = low_OG.clamp(max=0), high_OG.clamp(min=0)
    scale_OG = round_scale((high_OG - low_OG) / scheme.max_code)
    return scale_OG, (-low_OG / scale_OG).round().clamp(0, scheme.max_code)


def quantize(weight_OI: Tensor, scale_OG: Tensor, zero_point_OG: Tensor, scheme: QuantScheme) -> Tensor:
    """Quantize weights to codes.

    Args:
        weight_OI: weights, float32 or float64.
        scale_OG: scales on the scale grid, in the dtype of the weights.
        zero_point_OG: zero points (integral values), in the dtype of the weights.
        scheme: quantization scheme.

    Returns:
        Codes, uint8 [O, I].
    """
    return _float_codes(weight_OI, scale_OG, zero_point_OG, scheme).flatten(-2).to(torch.uint8)


def _float_codes(weight_OI: Tensor, scale_OG: Tensor, zero_point_OG: Tensor, scheme: QuantScheme) -> Tensor:
    """Codes as floats, [O, G, K]."""
    codes_OGK = to_groups(weight_OI, scale_OG.shape[-1]) / scale_OG[..., None]
    return codes_OGK.round_().add_(zero_point_OG[..., None]).clamp_(0, scheme.max_code)


def dequantize(codes_OI: Tensor, scale_OG: Tensor, zero_point_OG: Tensor) -> Tensor:
    """Compute the weights of codes: scale * (code - zero_point).

    Args:
        codes_OI: uint8 codes.
        scale_OG: scales, any float dtype.
        zero_point_OG: zero points (integral values), any dtype.

    Returns:
        Weights [O, I] in the dtype of `scale_OG`.
    """
    w_OGK = to_groups(codes_OI, scale_OG.shape[-1]).to(scale_OG.dtype)
    return w_OGK.sub_(zero_point_OG[..., None]).mul_(scale_OG[..., None]).flatten(-2)


def quantize_dequantize(weight_OI: Tensor, scale_OG: Tensor, zero_point_OG: Tensor, scheme: QuantScheme) -> Tensor:
    """Compute dequantize(quantize(weight)) without the conversion to uint8 and back. The result is equal to the bit.

    Args:
        weight_OI, scale_OG, zero_point_OG, scheme: see `quantize`.

    Returns:
        Weights [O, I] in the dtype of `scale_OG`.
    """
    codes_OGK = _float_codes(weight_OI, scale_OG, zero_point_OG, scheme)
    return codes_OGK.sub_(zero_point_OG[..., None]).mul_(scale_OG[..., None]).flatten(-2)
