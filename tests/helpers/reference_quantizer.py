"""The quantizer as a slow reference: Python floats (float64), one weight at a time, and plain autograd."""

import math

import torch
from torch import Tensor


def round_scale(scale: float) -> float:
    """7 significant bits, rounded half to even, within the normal range of fp16."""
    exponent = math.floor(math.log2(scale)) if scale > 0 else -60
    unit = 2.0 ** (exponent - 6)
    return min(max(round(scale / unit) * unit, 2.0**-14), 65024.0)


def min_max(group: list[float], bits: int, symmetric: bool) -> tuple[float, int]:
    """Scale and zero point of one group of weights."""
    max_code = 2**bits - 1
    if symmetric:
        return round_scale(max(abs(w) for w in group) / (2 ** (bits - 1) - 1)), 2 ** (bits - 1)
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
